"""The encoders of T5, mT5 and UMT5, as Hugging Face's transformers writes them from 5.23 on; ``t5_decoder`` the others.

The tokens of a batch are packed once into one row of tokens, [1, tokens, width], and the model's own stack runs on it:
all but attention works token by token. So its layers, norms, feed-forward, adapters such as LoRA, clamping of float16,
checkpointing and recording of hidden states are the model's own. Attention alone is replaced: it calls its projections
and keeps the texts apart by the packing's segments.

Trusted: that stack, blocks and layers hand their further keywords and the first block's bias down to attention.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.attention_structures import Segments
from onepeace_fast.fusion.family import TOO_LITTLE_PADDING, FusedCall, Refusal, packing_is_chosen
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.ops.relative_bias_attention import relative_bias_attention
from onepeace_fast.relative_position import CLS_ENTRIES, t5_index
from onepeace_fast.remembered import remembered
from onepeace_fast.route_plan import RoutePlan

# Of the stack's arguments those that mean nothing to attention, or that are known here.
HARMLESS: set[str] = {
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
}
PACKED = "onepeace_fast_packed"  # the keyword by which a block's attention gets what it knows of the tokens
CROSS = "EncDecAttention"
KINDS = ("t5", "mt5", "umt5", "pop2piano")  # others of these parts route, add or mask by what packing changes
NO_TOKEN = "attention_mask: a sample has no token; the model's own attention averages its padding"
SETTINGS = ("n_heads", "key_value_proj_dim", "relative_attention_num_buckets", "relative_attention_max_distance")
SWITCHES = ("is_decoder", "is_causal", "has_relative_attention_bias")


QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]


class Packed(NamedTuple):
    """What attention knows of packed tokens, besides them."""

    segments: Segments
    buckets: Tensor  # int64 [2 * length - 1], the row of the bias's table of each distance, query - key
    length: int  # of the padded texts


class T5Encoder(FusedCall):
    """A stack of blocks with T5's relative bias, in the first block for all of them or in each its own."""

    family = "T5"
    calls_own_forward = True
    is_decoder: ClassVar[bool] = False
    layers: ClassVar[tuple[str, ...]] = ("SelfAttention",)  # a block's, before its feed-forward
    known: ClassVar[set[str]] = HARMLESS

    def __init__(self, root: nn.Module) -> None:
        stack: Any = root
        if (kind := getattr(getattr(root, "config", None), "model_type", None)) not in KINDS:
            raise Refusal(f"config.model_type: expected one of {', '.join(KINDS)}, got {kind!r}")
        if stack.is_decoder is not self.is_decoder:
            raise Refusal(f"is_decoder: expected {self.is_decoder}, got {stack.is_decoder}")
        _require_equal("config.is_decoder", self.is_decoder, getattr(stack.config, "is_decoder", None))
        found: dict[str, Any] = {}
        frame: list[Any] = [stack, stack.block]
        for i, block in enumerate(stack.block):
            own = _attentions(f"block.{i}", block, self.layers)
            for path, attention in own.items():
                first = next(iter(found.values()), attention)
                _check_attention(path, attention, first, self.is_decoder)
                found[path] = attention
            for j in range(len(self.layers)):
                _require_keywords(f"block.{i}.layer.{j}", block.layer[j])
            _require_keywords(f"block.{i}", block)
            frame += [block, block.layer, *block.layer[: len(self.layers)], *own.values()]
        _require_keywords("model", root)
        kept = {id(module) for module in frame}
        inner = [module for module in root.modules() if module is not root]
        super().__init__(root, inner, [module for module in inner if id(module) not in kept])
        for path, attention in found.items():
            self.structure.watch(path, attention, *SETTINGS, *SWITCHES)
            if attention.has_relative_attention_bias:
                _check_bias(path, attention)
        self.structure.watch("model", root, "is_decoder", "config.is_decoder")
        self.arguments: list[str] = [*_parameters(root)][1:]
        self.attentions: list[Any] = [*found.values()]
        self.shares_bias: bool = _shares_bias(self.attentions[0])
        self.dropouts: list[nn.Dropout] = [module for module in inner if isinstance(module, nn.Dropout)]
        self.of_a_row: int = 2 * sum(weight.numel() for weight in stack.block[0].parameters() if weight.dim() == 2)
        for attention in self.attentions:
            self.replace(attention, "forward", "attention")

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return is_stack(module) and module.__dict__["is_decoder"] is not True

    def declines(self, *args: Any, **kwargs: Any) -> str:
        given = self._given(*args, **kwargs)
        if given.get("output_attentions") or getattr(self.root.config, "output_attentions", False):
            return "output_attentions: attention's probabilities are not kept"
        for name, value in given.items():
            if name not in self.known and value is not None and value is not False:
                return f"{name}: it is not known to the packed stack"
        x, mask = _tokens(given), given.get("attention_mask")
        if x is None:
            return "the stack has no tokens, or both of input_ids and inputs_embeds"
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != x.shape[:2]):
            return "attention_mask: it is not one of the tokens, [batch, length]"
        if any(one.training and one.p for one in self.dropouts):
            return "dropout in training"
        if any(one.training and one.dropout for one in self.attentions):
            return "dropout in training"
        padded = x.shape[0] * x.shape[1]
        # Of another device nothing is read: there packing is chosen in any case.
        packed = padded if mask is None or x.device.type != "cpu" else int(mask.count_nonzero())
        if not padded or not packed:
            return "there is no token"
        if not self.is_decoder and has_empty_sample(mask):
            return NO_TOKEN  # a decoder's attention would see it
        return "" if packing_is_chosen(x, padded, packed, self.of_a_row) else TOO_LITTLE_PADDING

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given(*args, **kwargs)
        plan, packed = self._pack_tokens(given)
        outputs = self.replacements[0].original(**given, **{PACKED: packed})
        return Unpacking(plan).of(outputs)

    def _pack_tokens(self, given: dict[str, Any]) -> tuple[RoutePlan, Packed]:
        """Put packed tokens in the place of the arguments' padded ones."""
        x, mask = _tokens(given), given.get("attention_mask")
        assert x is not None  # or the call was declined
        batch, length = x.shape[:2]
        plan = plan_of(mask, batch, length, x.device)
        self.count_tokens(batch * length, plan.capacity)
        if given.get("input_ids") is None:
            given["inputs_embeds"] = plan.pack({"tokens": x})[None]
        else:
            given["input_ids"] = x.flatten()[plan.source][None]
        given["attention_mask"] = mask_of(plan)
        first = self.attentions[0]
        sizes = first.relative_attention_num_buckets, first.relative_attention_max_distance
        buckets = _index(*sizes, not self.is_decoder, x.device)
        reach = buckets.shape[0] // 2
        distance = torch.arange(1 - length, length, device=x.device).clamp(-reach, reach)
        return plan, Packed(plan.segments, buckets[distance + reach], length)

    def _given(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(zip(self.arguments, args, strict=False)) | kwargs

    def attention(self, replacement: Replacement, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block's attention: over packed tokens, or the module's own."""
        packed: Packed | None = kwargs.get(PACKED)
        if packed is None:
            return replacement.original(*args, **kwargs)
        module: Any = replacement.module
        x = args[0] if args else kwargs["hidden_states"]
        q, k, v = projected(module, x, x)
        out, vector = self.attend(packed, module, (q, k, v), kwargs.get("position_bias"))
        return (out, vector, None) if self.shares_bias else (out, None)

    def attend(self, packed: Packed, module: Any, qkv: QKV, vector: Tensor | None) -> tuple[Tensor, Tensor]:
        """Self-attention's output [1, rows, width], and the bias's vector that further blocks share."""
        if vector is None:
            bias = module.relative_attention_bias(packed.buckets)  # [entries, heads]
            vector = F.pad(bias.t(), (0, CLS_ENTRIES))
        segments = packed.segments
        out: Any = relative_bias_attention(
            qkv, cu_seqlens=segments.cu_seqlens, modality=segments.modality, code=segments.code,
            is_cls=segments.is_cls, order=segments.order, max_length=segments.max_length, bias=[vector],
            code_offsets=[packed.length - 1], scale=module.scaling,
        )  # fmt: skip
        return module.o(out.flatten(1)[None]), vector


class Unpacking:
    """A stack's outputs with padded tokens in the place of packed ones; what was one tensor stays one."""

    def __init__(self, plan: RoutePlan) -> None:
        self.plan = plan
        self.done: dict[int, Tensor] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if isinstance(value, Tensor):
            if id(value) not in self.done:
                self.done[id(value)] = self.plan.unpack(value[0])["tokens"]
            return self.done[id(value)]
        if isinstance(value, Mapping):  # a transformers' output, whose attributes are its items; no cache is
            items: Any = value
            for name in items:
                items[name] = self.of(items[name])
        return value


def is_stack(module: nn.Module) -> bool:
    """Whether a module has blocks with self-attention first, and says whether it is a decoder."""
    blocks = module._modules.get("block")
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or "is_decoder" not in module.__dict__:
        return False
    layers = blocks[0]._modules.get("layer")
    return isinstance(layers, nn.ModuleList) and len(layers) > 0 and "SelfAttention" in layers[0]._modules


def has_empty_sample(mask: Tensor | None) -> bool:
    """Whether a sample is nothing but padding; of another device than a CPU's nothing is read."""
    return mask is not None and mask.device.type == "cpu" and not bool(mask.bool().any(1).all())


def plan_of(mask: Tensor | None, batch: int, length: int, device: torch.device) -> RoutePlan:
    """The route plan of padded texts by their mask, [batch, length]; without one all tokens are real."""
    if mask is None:
        return RoutePlan.from_lengths({"tokens": [length] * batch}, device=device)
    return RoutePlan.from_masks({"tokens": mask.to(device, torch.bool)})


def mask_of(plan: RoutePlan) -> Tensor:
    """A mask for packed tokens.

    A stack hands a mask of four axes on as it is. This one fits no scores: only attention that knows the packed tokens,
    and ignores it, gets along with it.
    """
    return torch.empty(1, 1, 1, plan.capacity + 1, device=plan.source.device)


def projected(module: Any, x: Tensor, keys: Tensor) -> QKV:
    """q, k, v of packed tokens [1, rows, width], each [rows, heads, size]."""
    size = (module.n_heads, module.key_value_proj_dim)
    q, k, v = (part(y)[0].unflatten(-1, size) for part, y in ((module.q, x), (module.k, keys), (module.v, keys)))
    return q, k, v


def _tokens(given: dict[str, Any]) -> Tensor | None:
    """[batch, length] or [batch, length, width]; None unless exactly one of both was given."""
    ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None:
        return ids if embedded is None and ids.dim() == 2 else None
    return embedded if embedded is not None and embedded.dim() == 3 else None


@remembered
def _index(buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    return t5_index(buckets, max_distance, bidirectional).to(device)


def _parameters(module: nn.Module) -> Any:
    return inspect.signature(type(module).forward).parameters


def _shares_bias(attention: nn.Module) -> bool:
    """Whether attention takes the bias that another block made, as T5's does and UMT5's does not."""
    return "position_bias" in _parameters(attention)


def _require_keywords(name: str, module: nn.Module) -> None:
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in _parameters(module).values()):
        raise Refusal(f"{name}: expected a forward that takes further keywords, as of transformers 5.23, got none")


def _attentions(name: str, block: Any, wanted: tuple[str, ...]) -> dict[str, Any]:
    """A block's attentions by their paths."""
    layers = block._modules.get("layer")
    fits = isinstance(layers, nn.ModuleList) and len(layers) == len(wanted) + 1
    if not fits or any(part not in layer._modules for part, layer in zip(wanted, layers, strict=False)):
        raise Refusal(f"{name}.layer: expected {', '.join(wanted)} and a feed-forward, got {_kinds(layers)}")
    return {f"{name}.layer.{i}.{part}": layers[i].get_submodule(part) for i, part in enumerate(wanted)}


def _kinds(layers: Any) -> str:
    return ", ".join(type(layer).__name__ for layer in layers or ()) or "nothing"


def _check_attention(name: str, attention: Any, first: Any, is_decoder: bool) -> None:
    if type(attention) is not type(first):
        raise Refusal(f"{name}: expected a {type(first).__name__}, as in block.0, got {type(attention).__name__}")
    if missing := [part for part in ("q", "k", "v", "o") if part not in attention._modules]:
        raise Refusal(f"{name}: expected q, k, v and o, got no {', '.join(missing)}")
    has_bias, crosses = "relative_attention_bias" in attention._modules, name.endswith(CROSS)
    for setting in SETTINGS:
        if not isinstance(value := getattr(attention, setting, None), int):
            raise Refusal(f"{name}.{setting}: expected a whole number, got {value!r}")
        _require_equal(f"{name}.{setting}", getattr(first, setting), value)
    for setting in ("scaling", "dropout"):
        if not isinstance(value := getattr(attention, setting, None), int | float):
            raise Refusal(f"{name}.{setting}: expected a number, got {value!r}")
    if crosses and has_bias:
        raise Refusal(f"{name}: expected no relative_attention_bias, got one")
    if not (has_bias or crosses) and (attention is first or not _shares_bias(attention)):
        raise Refusal(f"{name}: expected a relative_attention_bias, got none")
    for switch, wanted in zip(SWITCHES, (is_decoder, is_decoder and not crosses, has_bias), strict=True):
        _require_equal(f"{name}.{switch}", wanted, getattr(attention, switch, None))
    _require_keywords(name, attention)


def _check_bias(name: str, attention: Any) -> None:
    """Refuse a bias of another row of the table for some distance, as a subclass may have it."""
    if not callable(getattr(attention, "compute_bias", None)):
        raise Refusal(f"{name}.compute_bias: expected a method, as of transformers 5.23, got none")
    buckets, most = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    numbers = nn.Embedding.from_pretrained(torch.arange(float(buckets), device="cpu")[:, None])
    probe = copy.copy(attention)
    probe.__dict__["_modules"] = attention._modules | {"relative_attention_bias": numbers}
    place = torch.arange(most + 2, device="cpu")
    index = _index(buckets, most, not attention.is_decoder, place.device)
    reach = index.shape[0] // 2
    wanted = index[(place[:, None] - place).clamp(-reach, reach) + reach]
    with torch.no_grad():
        got = probe.compute_bias(len(place), len(place))
    if not torch.equal(got[0, 0], wanted.to(got.dtype)):
        raise Refusal(f"{name}.compute_bias: expected T5's row of the table for each distance, got others")


def _require_equal(name: str, expected: object, got: object) -> None:
    if got != expected:
        raise Refusal(f"{name}: expected {expected!r}, got {got!r}")
