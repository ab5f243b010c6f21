"""LayerNorm of packed rows by the parameters of modules: one for all rows, or one for each modality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.drop_path import Branch
from onepeace_fast.layers.plain import are_plain, by_modality, calls_modules, unfused
from onepeace_fast.layers.reference import each_span, plan_spans
from onepeace_fast.ops import layer_norm
from onepeace_fast.ops.layer_norm import layer_norm_and_stream
from onepeace_fast.route_plan import RoutePlan


def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm of packed rows by the parameters of a module."""
    if calls_modules(x) or not are_plain("LayerNorm", (norm,), nn.LayerNorm):
        return norm(x)
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps)


def normalized_and_stream(
    x: Tensor, norm: nn.LayerNorm, branch: Branch, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm of the rows that a branch computes, and x as the branch's residual connection takes it.

    ``dtype`` is that of the products behind the norm, to which it may round: a cast would be one more pass over them.
    """
    if branch.row_index is None and calls_modules(x):
        return norm(x), x
    if not are_plain("LayerNorm", (norm,), nn.LayerNorm):
        # An embedding, since its gradient is summed in a fixed order on every device.
        return norm(x if branch.row_index is None else F.embedding(branch.row_index, x)), x
    index: dict[str, Any] = {}
    if branch.row_index is not None:
        index = {"row_index": branch.row_index, "offsets": branch.plan.offsets}
    return layer_norm_and_stream(x, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, **index)


def normalized_by_modality(x: Tensor, plan: RoutePlan, norm_of: Callable[[str], nn.Module]) -> Tensor:
    """Packed rows [C, dim] through the LayerNorm of their modality."""
    if calls_modules(x) and (spans := plan_spans(plan)):
        return each_span(norm_of, x, spans)
    norms: list[Any] = [norm_of(modality) for modality in plan.modalities]
    if not are_plain("final LayerNorm", norms, nn.LayerNorm):
        return by_modality(norms, x, plan)
    if any(norm.eps != norms[0].eps or norm.bias is None for norm in norms):
        unfused("final LayerNorm", norms[0], nn.LayerNorm)
        return by_modality(norms, x, plan)
    return layer_norm(
        x,
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        offsets=plan.offsets,
        row_counts=plan.row_counts,
        eps=norms[0].eps,
    )
