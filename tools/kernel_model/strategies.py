"""What the routed FFN and a layer come to by each strategy, from the estimates of their launches.

Vendor products take the time of their FLOPs at the vendor's rate, and what is moved beside kernels of this library that
of its bytes at a copy's. The layer's other parts are the same for all strategies: projections by the vendor, attention
at its goal, and the operations around the branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.kernel_model.constants import GPU, Span, constants
from tools.kernel_model.launches import Shape
from tools.products import ELEMENT, products

HEADS, HEAD_DIM = 24, 64
SAMPLES = 32  # of the batch, an image and its caption each
# Of each strategy the launches of this library, by the beginnings of their names, and the products of the vendor.
EVERY = ("u, v", "y", "dh", "dz, dW")
LAUNCHES = {
    "fused": (("routed_ffn:",), ()),
    "per modality": (("gated_sub_ln:", "residual:"), EVERY),
    "hybrid": (("hybrid:",), tuple(name for name in EVERY if name != "dh")),
}
# Row tensors that are moved outside products and kernels of this library: sums for gradients of the biases of q and v.
BIAS_GRADIENTS = 2
# The residual is joined with the output projection; alone it moves a row tensor or two more, and two weights less.
AROUND = ("layer_norm_and_stream:", "layer_norm:", "residual_layer_norm:")  # before attention, within and after it


class Strategy(NamedTuple):
    """The FFN's time, and the layer's, in us and over the bare products."""

    name: str
    feed_forward: Span
    ratio: Span
    layer: Span
    tax: Span


def vendor_times(gpu: GPU, shape: Shape) -> dict[str, float]:
    """The time of each of the FFN's products by the vendor."""
    return {product.name: product.flop / gpu.vendor for product in products(shape.counts, shape.width, shape.hidden)}


def strategies(times: Mapping[str, Span], gpu: GPU, shape: Shape) -> list[Strategy]:
    """Every strategy, from the times of the launches by their names."""
    vendor = vendor_times(gpu, shape)
    rows = shape.rows * shape.width * ELEMENT / gpu.copy  # to move a row tensor of the stream's width once
    projections = 3 * 4 * 2 * shape.rows * shape.width**2 / gpu.vendor
    attention, bare_attention = _attention(gpu, shape)
    bare = sum(vendor.values())
    outside = _total([_of(times, prefix) for prefix in AROUND])
    outside += projections + attention + BIAS_GRADIENTS * rows
    found = []
    for name, (prefixes, by_vendor) in LAUNCHES.items():
        beside = sum(vendor[product] for product in by_vendor)
        time = _total([_of(times, prefix) for prefix in prefixes]) + beside
        layer = time + outside
        layer_bare = bare + projections + bare_attention
        found.append(Strategy(name, time, _over(time, bare), layer, _over(layer, layer_bare)))
    return found


def _of(times: Mapping[str, Span], prefix: str) -> Span:
    mine = [time for name, time in times.items() if name.startswith(prefix)]
    if not mine:
        raise ValueError(f"{prefix}: expected a launch of this name, got none; correct LAUNCHES in strategies.py")
    return _total(mine)


def _total(times: Sequence[Span]) -> Span:
    return Span(sum(time.low for time in times), sum(time.high for time in times))


def _over(time: Span, base: float) -> Span:
    return Span(time.low / base, time.high / base)


def _attention(gpu: GPU, shape: Shape) -> tuple[float, float]:
    """Attention of both passes at its goal, and as the vendor's batched products, whose scores memory holds."""
    rows = shape.rows * shape.width * ELEMENT
    floor = (4 + 8) * rows / gpu.copy
    length = shape.rows / SAMPLES
    scores = SAMPLES * HEADS * length**2 * ELEMENT
    # q k^T, p v, and two products backward of each: of the three matrices of each one is of scores.
    moved = 6 * (scores + 2 * rows)
    flop = 6 * 2 * SAMPLES * HEADS * length**2 * HEAD_DIM
    known = constants()
    bare = max(moved / gpu.copy / known.attention_products, flop / gpu.vendor)
    return known.attention_share * floor, bare
