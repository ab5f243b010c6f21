"""A batch of attention as the CUDA kernel takes it, and its results held against float64 by the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.ops.relative_bias_attention import relative_bias_attention_specification
from onepeace_fast.tolerance import assert_within_rule
from support.attention_cases import Batch

Attend = Callable[..., list[tuple[Tensor, Tensor]]]


def rounded(batch: Batch, dtype: torch.dtype, heads: int, dim: int, **options: bool) -> dict[str, Tensor]:
    """The batch's leaves in a dtype."""
    return {name: leaf.to(dtype) for name, leaf in batch.leaves(heads, dim, **options).items()}


def arguments(batch: Batch, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the op and the kernel take beside qkv."""
    bias = [leaves[f"table{m}"][table.entries].t() for m, table in enumerate(batch.tables) if "table0" in leaves]
    return {
        "bias": bias, "code_offsets": [table.offset for table in batch.tables] if bias else [],
        "head_scale": leaves.get("head_scale"), "scale": batch.scale, **batch.arguments,
    }  # fmt: skip


def check(attend: Attend, batch: Batch, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run the kernel; out by the rule in every modality and head, log-sum-exp in every head, inert rows zero."""
    given, heads = arguments(batch, leaves), leaves["qkv"].shape[2]
    ((out, log_sum_exp),) = attend(leaves["qkv"], **given)
    exact = batch.plain(**{name: leaf.double() for name, leaf in leaves.items()})
    assert_within_rule("out", out, batch.plain(**leaves), exact, batch.slices(heads)["out0"])
    plain, exact = (specification(leaves, given, dtype)[1] for dtype in (leaves["qkv"].dtype, torch.float64))
    assert_within_rule("log_sum_exp", log_sum_exp, plain, exact, [(slice(None), head) for head in range(heads)])
    inert = batch.layout.offsets[-1]
    assert not out[inert:].any() and not log_sum_exp[inert:].any()
    return out, log_sum_exp


def specification(leaves: Mapping[str, Tensor], given: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp of the specification, its inputs in a dtype."""
    qkv, head_scale = leaves["qkv"], given["head_scale"]
    return relative_bias_attention_specification(
        qkv.to(dtype), given["cu_seqlens"], given["modality"], given["code"], given["is_cls"],
        [vector.to(dtype) for vector in given["bias"]], given["code_offsets"],
        None if head_scale is None else head_scale.to(dtype),
        qkv.shape[3] ** -0.5 if given["scale"] is None else given["scale"], given["max_length"],
    )  # fmt: skip
