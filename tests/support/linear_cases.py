"""Inputs of ``routed_linear``, the op and naive code on them: for its own tests and for those of its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import routed_linear
from support.contract import normal
from support.plans import ragged_offsets


def leaves_of(
    counts: Sequence[int], width: int, columns: int, bias: bool = True, inert: int = 0
) -> dict[str, Tensor]:  # fmt: skip
    """x, and the parameters of every modality."""
    leaves = {"x": normal(sum(counts) + inert, width, seed=1)}
    for m in range(len(counts)):
        leaves[f"weight{m}"] = normal(columns, width, seed=10 + m) * width**-0.5
        leaves |= {f"bias{m}": normal(columns, seed=20 + m)} if bias else {}
    return leaves


def lists_of(parameters: dict[str, Tensor], groups: int) -> dict[str, list[Tensor]]:
    """The op's lists, one parameter per modality."""
    names = [name for name in ("weight", "bias") if f"{name}0" in parameters]
    return {name: [parameters[f"{name}{m}"] for m in range(groups)] for name in names}


def op(counts: Sequence[int], host: bool = False) -> Callable[..., Tensor]:
    """The op as ``call(**leaves)``; with ``host`` it knows the row counts."""

    def call(x: Tensor, **parameters: Tensor) -> Tensor:
        lists = lists_of(parameters, len(counts))
        offsets = ragged_offsets(counts).to(x.device)
        return routed_linear(x, **lists, offsets=offsets, row_counts=list(counts) if host else ())

    return call


def plain(counts: Sequence[int]) -> Callable[..., Tensor]:
    """One ``F.linear`` per modality, zeros behind."""

    def call(x: Tensor, **parameters: Tensor) -> Tensor:
        lists, parts, start = lists_of(parameters, len(counts)), [], 0
        for m, count in enumerate(counts):
            bias = lists["bias"][m] if "bias" in lists else None
            parts.append(F.linear(x[start : start + count], lists["weight"][m], bias))
            start += count
        return torch.cat([*parts, parts[0].new_zeros(x.shape[0] - start, parts[0].shape[1])])

    return call
