"""A layer as others route it: by a boolean mask for each modality, or by slices of tokens sorted by modality."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.support.boolean_masks import ALL, BooleanMasks
from benchmarks.support.variants import Variant, trained

if TYPE_CHECKING:
    from benchmarks.support.layer import LayerCase


def boolean_mask(case: LayerCase) -> Variant:
    """The padded batch, whose tokens choose their FFN by masks, as public mixture-of-transformers code does."""
    names = list(case.shape.lengths)
    layer, spans = _with_another_ffn(case, names), [(ALL, 0, sum(case.widths.values()))]
    bias = case.dense_bias().detach().requires_grad_()

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return layer(x.transpose(0, 1), spans, bias)

    return case.padded_variant(run, (bias,))


def sliced(case: LayerCase) -> Variant:
    """Packed rows sorted by modality: projections of all rows, an FFN for each slice, PyTorch's attention between.

    Attention pads each sample to the longest and adds a dense bias, as grouped BAGEL routing does with its mask.
    """
    layer, heads, counts = case.layer, case.sizes.heads, list(case.plan.row_counts)
    attention, experts = layer.self_attn, [layer.ffn(name) for name in case.shape.lengths]
    bias = case.dense_bias().detach().requires_grad_()

    def by_head(rows: Tensor) -> Tensor:
        return case.padded(rows).unflatten(-1, (heads, -1)).transpose(1, 2)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        z = layer.self_attn_layer_norm(x)
        q, k, v = (by_head(linear(z)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if attention.c_attn is not None:
            attended = attended * attention.c_attn[:, None, None]
        attended = case.to_rows(attended.transpose(1, 2).flatten(2).transpose(0, 1))
        attended = attention.out_proj(attended if attention.ln is None else attention.ln(attended))
        x = x + _scaled(attended if layer.attn_ln is None else layer.attn_ln(attended), layer.gamma_1)
        parts = layer.final_layer_norm(x).split(counts)
        y = torch.cat([expert(rows) for expert, rows in zip(experts, parts, strict=True)])
        return x + _scaled(y, layer.gamma_2)

    sets = [(packed.clone().requires_grad_(), bias) for packed in case.packed]
    variant = trained(run, sets, case.gradients, case.parameters)
    variant.rows = variant.gradient_rows = lambda rows: rows
    return variant


def _scaled(y: Tensor, gamma: Tensor | None) -> Tensor:
    return y if gamma is None else gamma * y


def _with_another_ffn(case: LayerCase, names: list[str]) -> nn.Module:
    """The case's layer over the same parameters, with one FFN for all tokens beside the others."""
    counts = torch.tensor([case.shape.samples * case.widths[name] for name in names])
    modality = torch.arange(len(names)).repeat_interleave(counts).to(case.device)
    layer = copy.copy(case.layer)
    layer._modules = dict(case.layer._modules)
    layer.add_module(f"{ALL}_ffn", BooleanMasks([case.layer.ffn(name) for name in names], modality))
    return layer
