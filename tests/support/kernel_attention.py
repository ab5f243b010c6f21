"""A batch of attention as the CUDA kernel takes it, and its results held against float64 by the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onepeace_fast.tolerance import assert_within_rule
from support import naive
from support.attention_cases import Batch, Table, kept_grid, kept_text, mixed, text_only
from support.contract import normal, run
from support.host_shim import Gradients
from support.plans import naive_layout, whole_rows

Attend = Callable[..., list[tuple[Tensor, Tensor]]]
Differentiate = Callable[..., list[Gradients]]

HEAD_SIZES = (32, 64, 128)
BATCHES = {
    "text": text_only,
    "kept text": kept_text,
    "kept grid": kept_grid,
    "small grid in a larger table": lambda: kept_grid(3, 5),
    "three of four modalities": mixed,
}

# One thread block walks all keys of a short sample, or several share them because the chip has more of them to fill and
# a sample may be long.
WALKS = {"whole": {"multiprocessors": 1}, "split": {"multiprocessors": 132, "max_length": 200}}
walks = pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)


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
    plain, exact = (
        batch.log_sum_exp(**{name: leaf.to(dtype) for name, leaf in leaves.items()})
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_rule("log_sum_exp", log_sum_exp, plain, exact, [(slice(None), head) for head in range(heads)])
    inert = batch.layout.offsets[-1]
    assert not out[inert:].any() and not log_sum_exp[inert:].any()
    return out, log_sum_exp


def wide(batch: Batch, heads: int, dim: int) -> dict[str, Tensor]:
    """The batch's leaves in bfloat16, but its vectors and head scale in float32."""
    leaves = batch.leaves(heads, dim)
    return {name: leaf.bfloat16() if name == "qkv" else leaf.float() for name, leaf in leaves.items()}


def coded(codes: Sequence[int]) -> Batch:
    """One text with these codes and CLS, and a vector with an entry for every difference."""
    span = max(codes) - min(codes)
    table = Table(2 * span + 4, naive.vector_row(span, 2 * span + 4), torch.arange(2 * span + 4), span)
    kept = whole_rows({"text": [len(codes) + 1]})
    return Batch(naive_layout(kept, codes={"text": [0, *codes]}), (table,))


def gradient_of(qkv: Tensor) -> Tensor:
    """A gradient of out."""
    return normal(qkv.shape[0], *qkv.shape[2:], seed=1000, dtype=qkv.dtype)


def tables_gradient(batch: Batch, bias: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradients of tables, from those of their vectors."""
    return {
        f"table{m}": vector.new_zeros(table.rows, vector.shape[0], dtype=torch.float64)
        .index_add(0, table.entries, vector.t().double())
        .to(vector.dtype)
        for m, (table, vector) in enumerate(zip(batch.tables, bias, strict=bool(bias)))
    }


def check_gradients(
    differentiate: Differentiate, batch: Batch, leaves: Mapping[str, Tensor], grad: Tensor | None = None, **options: Any
) -> Gradients:
    """Run the kernels; every gradient by the rule in every slice, and zero in inert rows."""
    qkv, heads, inert = leaves["qkv"], leaves["qkv"].shape[2], int(batch.layout.offsets[-1])
    grad = gradient_of(qkv) if grad is None else grad
    (gradients,) = differentiate(qkv, grad, **{**arguments(batch, leaves), **options})
    actual = {"qkv": gradients.qkv, **tables_gradient(batch, gradients.bias), "head_scale": gradients.head_scale}
    plain, exact = (
        run(batch.plain, mine, [grad])[1] for mine in (leaves, {name: leaf.double() for name, leaf in leaves.items()})
    )
    slices = batch.slices(heads) | {"head_scale": list(range(heads))}
    for name, leaf in leaves.items():
        theirs = [torch.zeros_like(leaf) if g[name] is None else g[name] for g in (plain, exact)]  # no row took part
        assert_within_rule(name, actual[name], *theirs, slices[name])
    assert not gradients.qkv[inert:].any()
    return gradients


def assert_same_gradients(actual: Gradients, expected: Gradients) -> None:
    """Bit by bit, those that both have; NaN is NaN."""
    pairs = [(actual.qkv, expected.qkv), *zip(actual.bias, expected.bias, strict=True)]
    for mine, theirs in (*pairs, (actual.head_scale, expected.head_scale)):
        assert mine is None or theirs is None or torch.equal(mine.nan_to_num(777), theirs.nan_to_num(777))
