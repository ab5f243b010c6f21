"""Inputs of ``layer_norm``, the op and the naive code on them: for its own tests and for those of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onepeace_fast import layer_norm
from support import naive
from support.contract import normal
from support.plans import ragged_offsets

GARBAGE = 2**31 - 1  # an entry of a row index that must not be read


def shared_leaves(rows: int, width: int, weight: bool = True, bias: bool = True) -> dict[str, Tensor]:
    """x and one norm for all rows."""
    leaves = {"x": 3 * normal(rows, width, seed=1) + 2 * normal(rows, 1, seed=2)}
    leaves |= {"weight": 1 + 0.5 * normal(width, seed=3)} if weight else {}
    return leaves | ({"bias": normal(width, seed=4)} if bias else {})


def routed_leaves(
    counts: Sequence[int], width: int, rows: int | None = None, heads: int | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """x, by default without inert rows, and a norm for each modality."""
    rows = sum(counts) if rows is None else rows
    leaves = {"x": 2 * normal(rows, width, seed=5) + normal(rows, 1, seed=6)}
    for m in range(len(counts)):
        leaves |= {f"weight{m}": 1 + 0.5 * normal(width, seed=10 + m), f"bias{m}": normal(width, seed=20 + m)}
    return leaves | ({"head_scale": 1 + 0.5 * normal(heads, seed=7)} if heads else {})


def op(
    counts: Sequence[int] | None = None, index: Sequence[int] | None = None, *, eps: float = 1e-5, host: bool = False
) -> Callable:
    """The op for per-modality parameters, or for shared ones where the leaves have a single weight or bias."""

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, head_scale: Tensor | None = None,
        **parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        extra = {"offsets": ragged_offsets(counts).to(x.device)} if counts else {}
        extra |= {"row_counts": list(counts)} if host else {}
        extra |= {} if index is None else {"row_index": torch.tensor(index, dtype=torch.int32, device=x.device)}
        if parameters:
            weight, bias = ([parameters[f"{kind}{m}"] for m in range(len(counts))] for kind in ("weight", "bias"))
        return layer_norm(x, weight, bias, head_scale=head_scale, eps=eps, **extra)

    return call


def plain(
    counts: Sequence[int] | None = None, index: Sequence[int] | None = None, *, eps: float = 1e-5
) -> Callable:  # fmt: skip
    """The same, written the obvious way."""

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, head_scale: Tensor | None = None,
        **parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        modalities = counts or [x.shape[0] if index is None else len(index)]
        weights, biases = [weight] * len(modalities), [bias] * len(modalities)
        if parameters:
            weights, biases = (
                [parameters[f"{kind}{m}"] for m in range(len(modalities))] for kind in ("weight", "bias")
            )
        if head_scale is not None:
            x = (x.unflatten(1, (head_scale.shape[0], -1)) * head_scale[:, None]).flatten(1)
        if index is not None:
            read = x[torch.tensor(index[: sum(modalities)], dtype=torch.int64, device=x.device)]
            x = torch.cat([read, read.new_zeros(len(index) - len(read), x.shape[1])])
        return naive.layer_norm(x, modalities, weights, biases, eps)

    return call
