"""The baseline's layer, over padded batches with a materialised bias, as upstream computes it with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from onepeace_fast.layers.transformer import SelfAttention, TransformerLayer

Spans = Sequence[tuple[str, int, int]]
"""Modality, first and last position of each part of a padded sequence."""


def encode_layer(
    layer: TransformerLayer, x: Tensor, bias: Tensor | None, spans: Spans, keep: Tensor | None, dropout: float
) -> Tensor:
    """One layer over [length, batch, dim]."""
    keeps = (None, None) if keep is None else keep[:, :, None].to(x.dtype)
    attended = layer.self_attn(layer.self_attn_layer_norm(x), spans, bias)
    if layer.attn_ln is not None:
        attended = layer.attn_ln(attended)
    x = add_branch(x, attended, layer.gamma_1, keeps[0], dropout)
    y = each_span(layer.ffn, layer.final_layer_norm(x), spans)
    return add_branch(x, y, layer.gamma_2, keeps[1], dropout)


def each_span(module: Callable[[str], nn.Module], x: Tensor, spans: Spans) -> Tensor:
    """Every position of [length, batch, width] through the module of its modality."""
    if len(spans) == 1:
        return module(spans[0][0])(x)
    return torch.cat([module(name)(x[start:stop]) for name, start, stop in spans])


def add_branch(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, dropout: float) -> Tensor:
    """x + keep * gamma * dropout(y)."""
    y = F.dropout(y, dropout) if dropout else y
    y = y if gamma is None else gamma * y
    return x + (y if keep is None else y * keep)


def attend(attention: SelfAttention, x: Tensor, bias: Tensor | None) -> Tensor:
    """Attention by batched products over [length, batch, dim], softmax in float32."""
    length, batch, dim = x.shape
    heads, head_dim = attention.heads, dim // attention.heads

    def split(projection: nn.Linear) -> Tensor:
        return projection(x).view(length, batch * heads, head_dim).transpose(0, 1)

    q, k, v = split(attention.q_proj), split(attention.k_proj), split(attention.v_proj)
    # Not in place: a hook on q_proj may hold its output.
    weights = torch.bmm(q * head_dim**-0.5, k.transpose(1, 2))
    if bias is not None:
        weights += bias.view(-1, length, length)
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(torch.float32, weights.dtype)).type_as(weights)
    attended = torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, dim)
    if attention.c_attn is not None:
        attended = torch.einsum("nbhd,h->nbhd", attended.view(length, batch, heads, head_dim), attention.c_attn)
        attended = attended.reshape(length, batch, dim)
    if attention.ln is not None:
        attended = attention.ln(attended)
    return attention.out_proj(attended)
