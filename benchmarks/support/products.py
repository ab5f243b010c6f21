"""Bare matrix products: the denominator of the non-GEMM tax.

Every product on its own, by the vendor's library, into a fresh output, on random matrices of the layer's shapes, with
its two backward products. Attention's products run at real lengths: samples of one length as one batched product.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import Variant


@dataclass(frozen=True)
class Linear:
    """y = x w^T over a range of rows."""

    rows: slice
    inner: int
    outer: int

    @property
    def operations(self) -> int:
        """Floating-point operations of the forward product."""
        return 2 * (self.rows.stop - self.rows.start) * self.inner * self.outer


@dataclass(frozen=True)
class Attention:
    """s = q k^T and o = p v of ``batch`` heads of one length."""

    batch: int
    length: int
    head_dim: int

    @property
    def operations(self) -> int:
        """Floating-point operations of both forward products."""
        return 4 * self.batch * self.length**2 * self.head_dim


def feed_forward(shape: Shape, sizes: Sizes, joined: bool = False) -> list[Linear]:
    """Products of the routed FFN; ``joined``: gate and value projection as one."""
    products, start = [], 0
    for lengths in shape.lengths.values():
        rows = slice(start, start + sum(lengths))
        start = rows.stop
        first = [2 * sizes.hidden] if joined else [sizes.hidden, sizes.hidden]
        products += [Linear(rows, sizes.width, outer) for outer in first]
        products.append(Linear(rows, sizes.hidden, sizes.width))
    return products


def projections(shape: Shape, sizes: Sizes, joined: bool = False) -> list[Linear]:
    """Products of attention's projections; ``joined``: queries, keys and values as one."""
    rows, width = slice(0, shape.real_tokens), sizes.width
    outers = [3 * width, width] if joined else [width] * 4
    return [Linear(rows, width, outer) for outer in outers]


def attention(shape: Shape, sizes: Sizes) -> list[Attention]:
    """Products of attention itself, one group for each length of a sample."""
    groups = Counter(shape.sample_lengths)
    return [Attention(n * sizes.heads, length, sizes.width // sizes.heads) for length, n in sorted(groups.items())]


class BareProducts:
    """Runs products over several input sets."""

    def __init__(
        self, linears: list[Linear], groups: list[Attention], device: torch.device, dtype: torch.dtype, sets: int
    ) -> None:
        self.linears, self.groups, self.sets = linears, groups, sets
        rows = max(linear.rows.stop for linear in linears)
        widths = {width for linear in linears for width in (linear.inner, linear.outer)}

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, device=device)).to(dtype)

        self.matrices = [{width: random(rows, width) for width in widths} for _ in range(sets)]
        self.weights = [random(linear.outer, linear.inner, scale=0.02) for linear in linears]
        self.heads = [
            [[random(group.batch, group.length, group.head_dim) for _ in range(4)] for group in groups]
            for _ in range(sets)
        ]
        # Probabilities and score gradients: one set of each, larger than any cache together with the rest.
        self.squares = [
            [random(group.batch, group.length, group.length, scale=1 / group.length) for _ in range(2)]
            for group in groups
        ]

    @property
    def operations(self) -> int:
        """Floating-point operations of all forward products; the backward ones are twice as many."""
        return sum(item.operations for item in (*self.linears, *self.groups))

    def forward(self, index: int) -> Tensor:
        """All forward products."""
        matrices, heads = self.matrices[index % self.sets], self.heads[index % self.sets]
        for linear, weight in zip(self.linears, self.weights, strict=True):
            y = torch.mm(matrices[linear.inner][linear.rows], weight.t())
        for (q, k, v, _), (p, _) in zip(heads, self.squares, strict=True):
            torch.bmm(q, k.transpose(1, 2))
            torch.bmm(p, v)
        return y

    def backward(self, index: int) -> Tensor:
        """Two products for each forward one."""
        matrices, heads = self.matrices[index % self.sets], self.heads[index % self.sets]
        for linear, weight in zip(self.linears, self.weights, strict=True):
            x, dy = (matrices[width][linear.rows] for width in (linear.inner, linear.outer))
            dx = torch.mm(dy, weight)
            torch.mm(dy.t(), x)
        for (q, k, v, dout), (p, ds) in zip(heads, self.squares, strict=True):
            torch.bmm(dout, v.transpose(1, 2))
            torch.bmm(p.transpose(1, 2), dout)
            torch.bmm(ds, k)
            torch.bmm(ds.transpose(1, 2), q)
        return dx

    def variant(self, note: str = "") -> Variant:
        """The products as a variant; it has no output to compare."""

        def forward_backward(index: int) -> Tensor:
            self.forward(index)
            return self.backward(index)

        return Variant(self.forward, forward_backward, note=note)
