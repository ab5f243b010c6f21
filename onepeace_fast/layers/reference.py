"""What the reference's layer does on padded batches, with a materialised bias, as upstream does by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.route_plan import RoutePlan

Spans = Sequence[tuple[str, int, int]]
"""Modality, and first and last position, of each modality's tokens in a padded sequence."""


def plan_spans(plan: RoutePlan) -> Spans:
    """Modality, and first and last row, of each modality's packed rows; none where the host does not know all rows."""
    if sum(plan.row_counts) != plan.capacity:
        return ()
    starts = [*accumulate(plan.row_counts, initial=0)]
    return [*zip(plan.modalities, starts, starts[1:], strict=False)]


def each_span(module: Callable[[str], nn.Module], x: Tensor, spans: Spans) -> Tensor:
    """Every position of [length, batch, width] through the module of its modality."""
    if len(spans) == 1:
        return module(spans[0][0])(x)
    return torch.cat([module(name)(x[start:stop]) for name, start, stop in spans])


def add_branch(x: Tensor, y: Tensor, gamma: Tensor | None, drop_path: Tensor | None, dropout: float) -> Tensor:
    """x + drop_path * gamma * dropout(y)."""
    y = F.dropout(y, dropout) if dropout else y
    y = y if gamma is None else gamma * y
    return x + (y if drop_path is None else y * drop_path)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None, head_scale: Tensor | None) -> Tensor:
    """Attention by batched products over q, k, v [length, batch, dim], softmax in at least float32; the same shape."""
    length, batch, dim = q.shape
    q, k, v = (x.view(length, batch * heads, dim // heads).transpose(0, 1) for x in (q, k, v))
    # Not in place: a hook on q_proj may hold its output.
    weights = torch.bmm(q * (dim // heads) ** -0.5, k.transpose(1, 2))
    if bias is not None:
        weights += bias.view(-1, length, length)
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(torch.float32, weights.dtype)).type_as(weights)
    attended = torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, dim)
    if head_scale is None:
        return attended
    scaled = torch.einsum("nbhd,h->nbhd", attended.view(length, batch, heads, dim // heads), head_scale)
    return scaled.reshape(length, batch, dim)
