"""Inputs of ``routed_ffn``, the op and the naive network on them: for its own tests and for those of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from onepeace_fast import routed_ffn
from support import naive
from support.contract import normal
from support.plans import ragged_offsets

KEEP = torch.tensor([1.25, 0.0, 1.25])
OPTIONS = ("bias", "norm", "residual", "gamma", "keep")
ALL = frozenset(OPTIONS)
GROUPS = (("w0", "w1", "w2"), ("b2",), ("norm_weight", "norm_bias"))


def sample_of(counts: Sequence[int], inert: int = 0) -> Tensor:
    """Three samples in every modality, one after another."""
    parts = [torch.arange(count) * 3 // max(count, 1) for count in counts]
    return torch.cat([*parts, torch.zeros(inert)]).int()


def leaves_of(counts: Sequence[int], width: int, hidden: int, options: frozenset = ALL, inert: int = 0) -> dict:
    """z, the parameters of every modality, and what the options ask for."""
    rows = sum(counts) + inert
    leaves = {"z": normal(rows, width, seed=1)}
    for m in range(len(counts)):
        leaves |= {
            f"w0_{m}": normal(hidden, width, seed=10 + m) * width**-0.5 * 1.5,
            f"w1_{m}": normal(hidden, width, seed=20 + m) * width**-0.5 * 1.5,
            f"w2_{m}": normal(width, hidden, seed=30 + m) * hidden**-0.5,
        }
        leaves |= {f"b2_{m}": normal(width, seed=40 + m)} if "bias" in options else {}
        if "norm" in options:
            leaves |= {f"norm_weight_{m}": 1 + 0.5 * normal(hidden, seed=50 + m)}
            leaves |= {f"norm_bias_{m}": 0.5 * normal(hidden, seed=60 + m)}
    leaves |= {"residual": 2 * normal(rows, width, seed=2)} if "residual" in options else {}
    return leaves | ({"gamma": 0.5 + normal(width, seed=3)} if "gamma" in options else {})


def lists_of(parameters: dict, groups: int) -> dict[str, list[Tensor]]:
    """The op's lists, one parameter per modality."""
    names = [name for group in GROUPS for name in group if f"{name}_0" in parameters]
    return {name: [parameters.pop(f"{name}_{m}") for m in range(groups)] for name in names}


def op(
    counts: Sequence[int], options: frozenset = ALL, host: bool = True, inert: int = 0, eps: float = 1e-5
) -> Callable:
    """The op as ``call(**leaves)``."""

    def call(z, residual=None, gamma=None, **parameters):
        lists = lists_of(parameters, len(counts))
        keep = {"keep": KEEP, "sample": sample_of(counts, inert)} if "keep" in options else {}
        keep = {name: value.to(z.device) for name, value in keep.items()}
        rows = list(counts) if host else ()
        return routed_ffn(
            z, offsets=ragged_offsets(counts).to(z.device), row_counts=rows, residual=residual, gamma=gamma, eps=eps,
            **lists, **keep,
        )  # fmt: skip

    return call


def plain(counts: Sequence[int], options: frozenset = ALL, inert: int = 0, eps: float = 1e-5) -> Callable:
    """The naive network as ``call(**leaves)``."""

    def call(z, residual=None, gamma=None, **parameters):
        lists = lists_of(parameters, len(counts))
        parts, start = [], 0
        for m, count in enumerate(counts):
            norm = (lists["norm_weight"][m], lists["norm_bias"][m]) if "norm_weight" in lists else None
            w0, w1, w2 = (lists[name][m] for name in ("w0", "w1", "w2"))
            b2 = lists["b2"][m] if "b2" in lists else None
            parts.append(naive.feed_forward(z[start : start + count], w0, w1, w2, b2, norm, eps))
            start += count
        y = torch.cat([*parts, torch.zeros_like(z[start:])])
        if residual is None:
            return y
        keep = KEEP.to(z.device) if "keep" in options else None
        return naive.residual(residual, y, gamma, keep, sample_of(counts, inert))

    return call


def slices_of(counts: Sequence[int]) -> dict[str, list[slice]]:
    """The rows of every modality."""
    bounds = ragged_offsets(counts).tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    return dict.fromkeys(("out0", "z", "residual"), parts)
