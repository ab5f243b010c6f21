"""Inputs of ``gated_sub_ln``, the op and the naive code on them: for its own tests and for those of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from onepeace_fast import gated_sub_ln
from support import naive
from support.contract import normal
from support.plans import ragged_offsets


def leaves_of(counts: Sequence[int], width: int, *, gate: bool = True, norm: bool = True, inert: int = 0) -> dict:
    """u, v and a norm for each modality; u spans where the activations bend."""
    rows = sum(counts) + inert
    leaves = {"u": 1.5 * normal(rows, width, seed=1) + 0.5 * normal(rows, 1, seed=2)}
    leaves |= {"v": 2 * normal(rows, width, seed=3) + normal(rows, 1, seed=4)} if gate else {}
    for m in range(len(counts) if norm else 0):
        leaves |= {f"weight{m}": 1 + 0.5 * normal(width, seed=10 + m), f"bias{m}": normal(width, seed=20 + m)}
    return leaves


def op(counts: Sequence[int], activation: str = "gelu", *, host: bool = True, eps: float = 1e-5) -> Callable:
    """The op as ``call(**leaves)``."""

    def call(u: Tensor, v: Tensor | None = None, **norms: Tensor) -> Tensor:
        weights, biases = ([norms[f"{kind}{m}"] for m in range(len(norms) // 2)] for kind in ("weight", "bias"))
        return gated_sub_ln(
            u, v, weights or None, biases or None, offsets=ragged_offsets(counts).to(u.device),
            row_counts=list(counts) if host else (), activation=activation, eps=eps,
        )  # fmt: skip

    return call


def plain(counts: Sequence[int], activation: str = "gelu", *, eps: float = 1e-5) -> Callable:
    """The naive code as ``call(**leaves)``."""

    def call(u: Tensor, v: Tensor | None = None, **norms: Tensor) -> Tensor:
        pairs = [(norms[f"weight{m}"], norms[f"bias{m}"]) for m in range(len(norms) // 2)]
        return naive.gated_sub_ln(u, v, counts, pairs, activation, eps)

    return call


def slices_of(counts: Sequence[int]) -> dict[str, list[slice]]:
    """The rows of every modality."""
    parts = [slice(a, b) for a, b in pairwise(ragged_offsets(counts).tolist())]
    return dict.fromkeys(("out0", "u", "v"), parts)
