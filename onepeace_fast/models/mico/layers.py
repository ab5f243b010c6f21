"""What MiCo's encoder and text encoder share: attention of rows, and what stands between two products.

Packed rows run the ops; padded ones, and rows on a CPU where no kernel runs, the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.attention_structures import Segments
from onepeace_fast.layers.plain import are_plain, calls_modules
from onepeace_fast.ops import gated_sub_ln, relative_bias_attention, residual, residual_layer_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


class DropPath(NamedTuple):
    """Of one branch, and what it is of."""

    factor: Tensor  # float32 [samples], 0 or 1 / (1 - p)
    sample: Tensor  # int64 [rows]


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments | None = None, scale: float | None = None
) -> Tensor:
    """Attention of packed rows [rows, heads, head_dim] to their samples' keys: [rows, width]."""
    return relative_bias_attention(
        (q, k, v), cu_seqlens=segments.cu_seqlens, modality=segments.modality, code=segments.code,
        is_cls=segments.is_cls, order=segments.order, keys=keys, scale=scale, max_length=segments.max_length,
    ).flatten(1)  # fmt: skip


def attend_padded(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """The same of [batch, length, heads, head_dim]; ``seen`` [batch, 1 or queries, keys] are the keys of each query."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    score = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if seen is not None:
        score = score.masked_fill(~seen[:, None], -torch.inf)
    weights = score.softmax(-1, dtype=torch.promote_types(torch.float32, score.dtype)).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def activated(u: Tensor, v: Tensor | None, norm: nn.LayerNorm | None, activation: str, packed: bool) -> Tensor:
    """norm(activation(u) * v), without the gate or the norm where there is none."""
    plain = norm is None or are_plain("LayerNorm", (norm,), nn.LayerNorm)
    if packed and plain and not calls_modules(u):
        rows = u.shape[0]
        offsets = torch.arange(2, dtype=torch.int32, device=u.device) * rows
        parameters: dict[str, Any] = (
            {} if norm is None else {"norm_weight": [norm.weight], "norm_bias": [norm.bias], "eps": norm.eps}
        )
        return gated_sub_ln(u, v, offsets=offsets, row_counts=(rows,), activation=activation, **parameters)
    h = ACTIVATIONS[activation](u)
    h = h if v is None else h * v
    return h if norm is None else norm(h)


def add(x: Tensor, y: Tensor, packed: bool, drop_path: DropPath | None = None) -> Tensor:
    """x + drop_path y."""
    if packed and not calls_modules(x):
        return residual(x, y, None, **_of_samples(drop_path))
    return x + _kept(y, drop_path)


def add_and_norm(
    x: Tensor, y: Tensor, norm: nn.LayerNorm, packed: bool, drop_path: DropPath | None = None
) -> tuple[Tensor, Tensor]:
    """``add``, and the norm of it."""
    if packed and not calls_modules(x) and are_plain("LayerNorm", (norm,), nn.LayerNorm):
        return residual_layer_norm(x, y, None, norm.weight, norm.bias, eps=norm.eps, **_of_samples(drop_path))
    x = x + _kept(y, drop_path)
    return x, norm(x)


def _of_samples(drop_path: DropPath | None) -> dict[str, Any]:
    return {} if drop_path is None else {"drop_path": drop_path.factor, "sample": drop_path.sample}


def _kept(y: Tensor, drop_path: DropPath | None) -> Tensor:
    if drop_path is None:
        return y
    factor = drop_path.factor[drop_path.sample].to(y.dtype)
    return y * factor.view(*y.shape[:-1], 1)
