"""A batch of attention as the CUDA kernel takes it, and its results held against float64 by the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onepeace_fast.tolerance import assert_within_rule
from support import naive
from support.attention_cases import Batch, Table
from support.contract import normal, run
from support.host_shim import Results
from support.plans import naive_layout, whole_rows

HEAD_SIZES = (32, 64, 96, 128)
# One thread block walks all keys of a short sample, or several share them because the chip has more of them to fill and
# a sample may be long.
WALKS = {"whole": {"multiprocessors": 1}, "split": {"multiprocessors": 132, "max_length": 200}}
walks = pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)


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


def check(
    attend: Callable[..., list[Results]],
    batch: Batch,
    leaves: Mapping[str, Tensor],
    grad: Tensor | None = None,
    **options: Any,
) -> Results:
    """Run both kernels; every result by the rule in every modality and head, and inert rows zero."""
    qkv, heads, inert = leaves["qkv"], leaves["qkv"].shape[2], int(batch.layout.offsets[-1])
    grad = gradient_of(qkv) if grad is None else grad
    (results,) = attend(qkv, grad, **{**batch.given(leaves), **options})
    actual = {"out0": results.out, "qkv": results.qkv, "head_scale": results.head_scale}
    for m, (table, vector) in enumerate(zip(batch.tables, results.bias, strict=bool(results.bias))):
        of_table = vector.new_zeros(table.rows, heads, dtype=torch.float64)
        actual[f"table{m}"] = of_table.index_add(0, table.entries, vector.t().double()).to(vector.dtype)
    double = {name: leaf.double() for name, leaf in leaves.items()}
    plain, exact = (run(batch.plain, mine, [grad]) for mine in (leaves, double))
    slices = batch.slices(heads) | {"head_scale": list(range(heads))}
    for name in ("out0", *leaves):
        theirs = [of[0][0] if name == "out0" else of[1][name] for of in (plain, exact)]
        theirs = [torch.zeros_like(leaves[name]) if t is None else t for t in theirs]  # no row took part
        assert_within_rule(name, actual[name], *theirs, slices[name])
    totals = [
        batch.log_sum_exp(**{n: leaf.to(t) for n, leaf in leaves.items()}) for t in (torch.float32, torch.float64)
    ]
    assert_within_rule("log_sum_exp", results.log_sum_exp, *totals, [(slice(None), head) for head in range(heads)])
    assert not any(rows[inert:].any() for rows in (results.out, results.log_sum_exp, results.qkv))
    return results


def assert_same(actual: Results, expected: Results) -> None:
    """Bit by bit, what both have; NaN is NaN."""
    for mine, theirs in zip(*([*r[:3], *r.bias, r.head_scale] for r in (actual, expected)), strict=True):
        assert mine is None or theirs is None or torch.equal(mine.nan_to_num(777), theirs.nan_to_num(777))
