"""torchscale's encoder, that of BEiT-3 (arXiv 2208.10442): a copy A and B of every linear layer and norm.

Public code: torchscale/architecture/encoder.py of microsoft/torchscale. Tokens before the split position take A,
the others B; attention runs over both, and one bias table serves all layers. Without Multiway all take one copy.

    x = alpha x + drop_path(Wo LN(attention(LN x))),   x = alpha x + drop_path(W2 LN(activation(W1 LN x)))

each LN inside a branch by Sub-LN, the others in front of it, or with post-norm behind the sum. Trusted, as structure
does not show it: that the classes' ``forward`` is the public one, that compute_bias depends on key - query alone,
and that ``drop_path`` multiplies each sample by a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.fusion.families.torchscale_parts import (
    ACTIVATIONS,
    check_encoder,
    check_layer,
    copies,
    is_multiway,
    settings,
)
from onepeace_fast.fusion.family import TOO_LITTLE_PADDING, FusedCall, packing_is_chosen
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.fusion.structure import is_sharded
from onepeace_fast.layers.parameters import with_unread
from onepeace_fast.ops import gated_sub_ln, layer_norm, relative_bias_attention, residual, routed_linear
from onepeace_fast.route_plan import RoutePlan

ALL_A, ALL_B = -1, 0  # split positions


@dataclass(frozen=True)
class Packed:
    """What a layer takes with packed rows.

    Attributes:
        plan: of the modalities that the call has.
        code_offset: the entry of the bias vector that belongs to equal places.
    """

    plan: RoutePlan
    code_offset: int


class Torchscale(FusedCall):
    """torchscale's ``Encoder``, Multiway or not."""

    family = "torchscale"
    root: Any  # whose attributes are torchscale's

    def __init__(self, root: Any) -> None:
        check_encoder(root)
        layers = list(root.layers)
        for i, layer in enumerate(layers):
            check_layer(f"layers.{i}", layer)
        bias = [] if root.relative_position is None else [root.relative_position.relative_attention_bias]
        super().__init__(root, called=[*layers, *bias])
        for layer in layers:
            self.replace(layer, "forward", "layer")
        read = [module for layer in layers for module in layer.modules()]
        read += [] if root.layer_norm is None else root.layer_norm.modules()
        self.multiway = [module for module in read if is_multiway(module)]
        self.dropouts = [module for module in read if isinstance(module, nn.Dropout)]
        self.settings, self.layer_count = settings(root, read), len(layers)
        width, hidden = layers[0].self_attn.embed_dim, copies(layers[0].ffn, "A")[0].fc1.out_features
        self.of_a_row = 2 * width * (4 * width + 2 * hidden)

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        layers = module._modules.get("layers")
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return False
        attention = getattr(layers[0], "self_attn", None)
        parts = hasattr(module, "forward_embedding") and hasattr(module, "relative_position")
        return parts and hasattr(attention, "inner_attn_ln")

    def declines(
        self,
        src_tokens: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
        multiway_split_position: int | None = None,
        features_only: bool = False,
        incremental_state: Any = None,
        positions: Tensor | None = None,
        **others: Any,
    ) -> str:
        if len(self.root.layers) != self.layer_count:
            return "there are not as many layers as when it was fused"
        if attn_mask is not None:
            return "attn_mask was given"
        if incremental_state is not None:
            return "incremental_state was given"
        if any(value is not None for value in others.values()):
            return "keyword arguments were given that this family does not know"
        tokens = src_tokens if token_embeddings is None else token_embeddings
        if tokens is None or tokens.dim() < 2 or not tokens.numel():
            return "there are no tokens"
        if any(module.training and module.p for module in self.dropouts):
            return "dropout in training"
        shape, mask = tokens.shape[:2], encoder_padding_mask
        if mask is not None and mask.shape != shape:
            return "encoder_padding_mask is not [samples, length]"
        if self._split_position(multiway_split_position, shape[1]) is None:
            return "there is no split position in the tokens that all layers share"
        if any(getattr(owner, name, None) != value for owner, name, value in self.settings):
            return "a setting of the encoder is not what it was when it was fused"
        real = padded = shape.numel()
        if mask is not None:  # read on the host where that waits for nothing
            real = padded - int(mask.count_nonzero()) if mask.device.type == "cpu" else 0
        return "" if packing_is_chosen(tokens, padded, real, self.of_a_row) else TOO_LITTLE_PADDING

    def forward(
        self,
        src_tokens: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
        multiway_split_position: int | None = None,
        features_only: bool = False,
        incremental_state: Any = None,
        positions: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        root, mask = self.root, encoder_padding_mask
        tokens = token_embeddings if src_tokens is None else src_tokens
        assert tokens is not None  # others are declined
        split = self._split_position(multiway_split_position, tokens.shape[1])
        assert split is not None
        if multiway_split_position is not None:
            self._set_split_position(multiway_split_position)
        if mask is None:
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        x, embedding = root.forward_embedding(src_tokens, token_embeddings, positions)
        x = x * (1 - mask.unsqueeze(-1).type_as(x))
        plan = _plan(mask, split)
        length, width = x.shape[1:]
        self.count_tokens(plan.padded_rows, plan.capacity)
        packed = Packed(plan, length - 1)
        bias = [] if root.relative_position is None else [bias_vector(root.relative_position, length)]
        rows = plan.pack(x.flatten(0, 1))
        states, losses = [x] if return_all_hiddens else [], []
        for layer in root.layers:
            rows, loss = layer(rows, packed, *bias)
            losses.append(loss)
            if return_all_hiddens:
                states.append(plan.unpack_interleaved(rows).view(-1, length, width))
        if root.layer_norm is not None:
            rows = _norm(root.layer_norm, rows, plan)
            if any(map(is_sharded, (root, *root.layers))):
                rows = with_unread(rows, *_other_copies(root.layer_norm, plan))
        x = plan.unpack_interleaved(rows).view(-1, length, width)
        if not features_only and root.output_projection is not None:
            x = root.output_projection(x)
        return {
            "encoder_out": x, "encoder_embedding": embedding, "encoder_padding_mask": mask, "encoder_states": states,
            "l_aux": losses,
        }  # fmt: skip

    def layer(self, replacement: Replacement, *args: Any, **kwargs: Any) -> Any:
        """A layer's forward: of packed rows, or its own."""
        if len(args) > 1 and isinstance(args[1], Packed):
            layer, (x, packed, *bias) = replacement.module, args
            x = _layer(layer, x, packed, *bias)
            return (with_unread(x, *_other_copies(layer, packed.plan)) if is_sharded(layer) else x), None
        return replacement.original(*args, **kwargs)

    def _split_position(self, given: int | None, length: int) -> int | None:
        """How many tokens of a sample take A, as torchscale's code sees it; None where it would fail, or has several.

        A call without a position takes the last one, which is kept in every module.
        """
        if given is not None and not self.root.args.multiway:
            return None
        found = {module.split_position for module in self.multiway} if given is None else {given}
        if len(found) > 1:
            return None
        split = found.pop() if found else ALL_A
        return split if isinstance(split, int) and ALL_A <= split <= length else None

    def _set_split_position(self, position: int) -> None:
        for module in self.root.modules():
            if is_multiway(module):
                module.split_position = position


def _plan(mask: Tensor, split: int) -> RoutePlan:
    """Of the tokens that are no padding; a modality that takes no part has no copy, and so no gradients."""
    real = ~mask.bool()
    if split in (ALL_A, ALL_B):
        masks = {"A" if split == ALL_A else "B": real}
    else:
        before = torch.arange(mask.shape[1], device=mask.device) < split
        masks = {"A": real & before, "B": real & ~before}
    return RoutePlan.from_token_masks(masks, leave_out=True)


def _other_copies(module: nn.Module, plan: RoutePlan) -> Iterator[nn.Parameter]:
    """Parameters below a module of the copy that a plan does not have, which get gradients of zeros in FSDP2."""
    for name in {"A", "B"} - {*plan.modalities}:
        for part in filter(is_multiway, module.modules()):
            yield from part.get_submodule(name).parameters()


def bias_vector(relative_position: Any, length: int) -> Tensor:
    """The bias of each difference query - key, ascending, and no CLS: [heads, 2 length - 1 + 3]."""
    ahead = relative_position.compute_bias(1, length)[0, :, 0]  # of query 0
    behind = relative_position.compute_bias(1, length, length - 1)[0, :, 0]  # of the last query
    return F.pad(torch.cat([ahead.flip(1), behind.flip(1)[:, 1:]], dim=1), (0, 3))


def _layer(layer: Any, x: Tensor, packed: Packed, *bias: Tensor) -> Tensor:
    """One layer over packed rows [rows, width]."""
    plan, attention, first = packed.plan, layer.self_attn, layer.normalize_before
    z = _norm(layer.self_attn_layer_norm, x, plan) if first else x
    q, k, v = (
        _linear(copies(projection, *plan.modalities), z, plan).unflatten(1, (attention.num_heads, -1))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    y: Any = relative_bias_attention(
        (q, k, v), **plan.segments._asdict(), bias=bias, code_offsets=[packed.code_offset] * len(bias),
        scale=attention.scaling,
    )  # fmt: skip
    y = y.flatten(1)
    if attention.inner_attn_ln is not None:
        y = _norm(attention.inner_attn_ln, y, plan)
    x = _add(layer, x, _linear(copies(attention.out_proj, *plan.modalities), y, plan), plan)
    x = x if first else _norm(layer.self_attn_layer_norm, x, plan)
    z = _norm(layer.final_layer_norm, x, plan) if first else x
    x = _add(layer, x, _ffn(copies(layer.ffn, *plan.modalities), z, plan), plan)
    return x if first else _norm(layer.final_layer_norm, x, plan)


def _norm(norm: nn.Module, x: Tensor, plan: RoutePlan) -> Tensor:
    norms = copies(norm, *plan.modalities)
    weights, biases = [norm.weight for norm in norms], [norm.bias for norm in norms]
    return layer_norm(x, weights, biases, offsets=plan.offsets, row_counts=plan.row_counts, eps=norms[0].eps)


def _linear(linears: Sequence[Any], x: Tensor, plan: RoutePlan) -> Tensor:
    weights = [linear.weight for linear in linears]
    biases = None if linears[0].bias is None else [linear.bias for linear in linears]
    return routed_linear(x, weights, biases, offsets=plan.offsets, row_counts=plan.row_counts)


def _ffn(experts: Sequence[Any], x: Tensor, plan: RoutePlan) -> Tensor:
    how: dict[str, Any] = {"activation": ACTIVATIONS[experts[0].activation_fn]}
    if experts[0].ffn_layernorm is not None:
        norms = [expert.ffn_layernorm for expert in experts]
        how |= {"norm_weight": [norm.weight for norm in norms], "norm_bias": [norm.bias for norm in norms]}
        how["eps"] = norms[0].eps
    u = _linear([expert.fc1 for expert in experts], x, plan)
    h = gated_sub_ln(u, offsets=plan.offsets, row_counts=plan.row_counts, **how)
    return _linear([expert.fc2 for expert in experts], h, plan)


def _add(layer: Any, x: Tensor, y: Tensor, plan: RoutePlan) -> Tensor:
    """alpha x + drop_path(y); the factors of samples are what the model's own module makes of ones."""
    x = x if layer.alpha == 1.0 else x * layer.alpha
    drop_path = layer.drop_path
    if drop_path is None or not drop_path.training or not drop_path.drop_prob:
        return residual(x, y)
    factor = drop_path(y.new_ones(plan.sample_count, 1, 1)).flatten()
    return residual(x, y, drop_path=factor.to(torch.promote_types(factor.dtype, torch.float32)), sample=plan.sample)
