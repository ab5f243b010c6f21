"""The decoders of T5, mT5 and UMT5: causal self-attention with T5's bias, and attention to the encoder's tokens.

Packed as encoders are, see ``t5``; the encoder's tokens are packed too, by their own mask. A cache that such a call
fills is the model's own, with zeros at padding. Calls with a cache that is given, as generation makes them for one
token each, keep the model's own code: they have no padding.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from onepeace_fast.attention_structures import Segments
from onepeace_fast.fusion.families.t5 import (
    CROSS,
    HARMLESS,
    NO_TOKEN,
    PACKED,
    Packed,
    T5Encoder,
    Unpacking,
    has_empty_sample,
    is_stack,
    mask_of,
    plan_of,
    projected,
)
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.ops.relative_bias_attention import relative_bias_attention
from onepeace_fast.route_plan import RoutePlan


class PackedPair(NamedTuple):
    """What a decoder's attention knows of its own packed tokens and of the encoder's."""

    own: Packed
    plan: RoutePlan
    keys: Segments
    key_plan: RoutePlan


class T5Decoder(T5Encoder):
    """A stack of blocks that attend to their own earlier tokens, then to the encoder's."""

    family = "T5 decoder"
    is_decoder = True
    layers = ("SelfAttention", CROSS)
    known: ClassVar[set[str]] = HARMLESS | {"encoder_hidden_states", "encoder_attention_mask", "use_cache"}

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return is_stack(module) and module.__dict__["is_decoder"] is True

    def declines(self, *args: Any, **kwargs: Any) -> str:
        given = self._given(*args, **kwargs)
        if given.get("cache") is not None:
            return "cache: it is filled token by token"
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None:
            return "encoder_hidden_states: there are none"
        if not isinstance(states, Tensor) or states.dim() != 3:
            return "encoder_hidden_states: they are not [batch, length, width]"
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != states.shape[:2]):
            return "encoder_attention_mask: it is not one of the encoder's tokens, [batch, length]"
        if has_empty_sample(mask):
            return f"encoder_{NO_TOKEN}"
        return super().declines(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given(*args, **kwargs)
        plan, packed = self._pack_tokens(given)
        own = packed._replace(segments=packed.segments._replace(order=plan.causal_order()))
        states = given["encoder_hidden_states"]
        batch, length = states.shape[:2]
        keys = plan_of(given.get("encoder_attention_mask"), batch, length, states.device)
        given["encoder_hidden_states"] = keys.pack({"tokens": states})[None]
        given["encoder_attention_mask"] = mask_of(keys)
        pair = PackedPair(own, plan, keys.segments, keys)
        return Unpacking(plan).of(self.replacements[0].original(**given, **{PACKED: pair}))

    def attention(self, replacement: Replacement, *args: Any, **kwargs: Any) -> Any:
        """The forward of an attention: over packed tokens, or the module's own."""
        pair: PackedPair | None = kwargs.get(PACKED)
        if pair is None:
            return replacement.original(*args, **kwargs)
        module: Any = replacement.module
        x = args[0] if args else kwargs["hidden_states"]
        others = kwargs.get("key_value_states")  # as T5 calls them, and UMT5
        others = kwargs.get("encoder_hidden_states") if others is None else others
        q, k, v = projected(module, x, x if others is None else others)
        if (cache := kwargs.get("cache")) is not None:
            fill(cache, module.layer_idx, others is not None, pair.key_plan if others is not None else pair.plan, k, v)
        if others is None:
            out, vector = self.attend(pair.own, module, (q, k, v), kwargs.get("position_bias"))
            return (out, vector, None) if self.shares_bias else (out, None)
        own = pair.own.segments
        out = relative_bias_attention(
            (q, k, v), cu_seqlens=own.cu_seqlens, modality=own.modality, code=own.code, is_cls=own.is_cls,
            keys=pair.keys, max_length=own.max_length, scale=module.scaling,
        )  # fmt: skip
        out = module.o(out.flatten(1)[None])
        return (out, None, None) if self.shares_bias else (out, None)


def fill(cache: Any, layer: int, crosses: bool, plan: RoutePlan, k: Tensor, v: Tensor) -> None:
    """Put a call's keys and values, [rows, heads, size], into a new cache of transformers, padded."""
    part = getattr(cache, "cross_attention_cache" if crosses else "self_attention_cache", cache)
    padded = (plan.unpack(x.flatten(1))["tokens"].unflatten(2, x.shape[1:]).transpose(1, 2) for x in (k, v))
    part.update(*padded, layer)
    if crosses and hasattr(cache, "is_updated"):
        cache.is_updated[layer] = True
