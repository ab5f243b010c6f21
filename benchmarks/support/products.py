"""Bare matrix products: the denominator of the non-GEMM tax.

Every product on its own, by the vendor's library, into a fresh output, on random matrices of the layer's shapes, with
its two backward products. Attention's products run at real lengths: samples of one length as one batched product.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import Variant

Products = list[tuple[Tensor, Tensor]]


class Linear(NamedTuple):
    """y = x w^T over a range of rows."""

    rows: slice
    inner: int
    outer: int


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


def attention(shape: Shape, sizes: Sizes) -> list[tuple[int, int, int]]:
    """Products of attention itself, s = q k^T and o = p v: heads of one length, that length and a head's width."""
    groups = Counter(shape.sample_lengths)
    return [(n * sizes.heads, length, sizes.width // sizes.heads) for length, n in sorted(groups.items())]


class BareProducts:
    """Runs products over several input sets: for each the pairs of factors of both passes."""

    def __init__(
        self, linears: list[Linear], groups: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype,
        sets: int,
    ) -> None:  # fmt: skip
        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, device=device)).to(dtype)

        rows = max(linear.rows.stop for linear in linears)
        widths = {width for linear in linears for width in (linear.inner, linear.outer)}
        weights = [random(linear.outer, linear.inner, scale=0.02) for linear in linears]
        # Probabilities and score gradients: one set of each, larger than any cache together with the rest.
        squares = [[random(n, length, length, scale=1 / length) for _ in range(2)] for n, length, _ in groups]
        self.sets: list[tuple[Products, Products]] = []
        for _ in range(sets):
            matrices = {width: random(rows, width) for width in widths}
            forward: Products = []
            backward: Products = []
            for linear, weight in zip(linears, weights, strict=True):
                x, dy = (matrices[width][linear.rows] for width in (linear.inner, linear.outer))
                forward.append((x, weight.t()))
                backward += [(dy, weight), (dy.t(), x)]
            for group, (p, ds) in zip(groups, squares, strict=True):
                q, k, v, dout = (random(*group) for _ in range(4))
                forward += [(q, k.transpose(1, 2)), (p, v)]
                backward += [(dout, v.transpose(1, 2)), (p.transpose(1, 2), dout), (ds, k), (ds.transpose(1, 2), q)]
            self.sets.append((forward, backward))

    @property
    def operations(self) -> int:
        """Floating-point operations of all forward products; the backward ones are twice as many."""
        return sum(2 * left.numel() * right.shape[-1] for left, right in self.sets[0][0])

    def forward(self, index: int) -> Tensor:
        """All forward products."""
        return _multiply(self.sets[index % len(self.sets)][0])

    def forward_backward(self, index: int) -> Tensor:
        """These, and two for each in the backward pass."""
        self.forward(index)
        return _multiply(self.sets[index % len(self.sets)][1])

    def variant(self, note: str = "") -> Variant:
        """The products as a variant; it has no output to compare."""
        return Variant(self.forward, self.forward_backward, note=note)


def _multiply(products: Products) -> Tensor:
    """Each product by the vendor's library, into a fresh output; the last one is returned."""
    for left, right in products:
        result = torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)
    return result
