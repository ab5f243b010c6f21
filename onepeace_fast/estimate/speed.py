"""How long a layer and a step take on a GPU, as ranges: a model, no measurement.

Matrix products run at the vendor's rate; launches of this library's kernels take what the model of the kernels says at
its shape, by FLOPs where they have products, by the bytes of their rows where they have none. Everything else moves its
bytes at a copy's rate. Which of these rates are assumed is said in ``constants.json``.
"""

from __future__ import annotations

from typing import NamedTuple

from onepeace_fast.estimate import constants
from onepeace_fast.estimate.constants import Span
from onepeace_fast.estimate.work import FLOAT32, Work

WAYS = ("eager", "compiled", "grouped", "per_modality", "hybrid")
STRATEGIES = {"grouped": "fused", "per_modality": "per modality", "hybrid": "hybrid"}  # by their names in the model
# What plain PyTorch reads and writes beside products in a forward pass, in columns of each kind of row: norms, the
# scaling of q, LayerScale, residual and the joining of modalities; GELU, gate and Sub-LayerNorm; bias, softmax and its
# rounding. Backward takes twice as much. Compiled, a chain of them is one pass: between what is left then and all.
EAGER_WIDTH, EAGER_HIDDEN, EAGER_SCORES = 22, 7, 5
COMPILED_SHARE = 0.4
MICROSECOND = 1e-6


class Layer(NamedTuple):
    """Seconds of a layer, forward and backward, and over those of its bare products."""

    seconds: Span
    tax: Span


def layer(work: Work, gpu_name: str, way: str) -> Layer:
    """One layer whose DropPath leaves as much as the layers' mean, by a way of ``WAYS``."""
    gpu = constants.gpus()[gpu_name]
    layers = work.config.layers
    of_all, share = work.forward(), work.kept_share
    products, attention = 3 * of_all.products / layers, of_all.attention / layers
    vendor = gpu.vendor_TFLOPs * 1e12
    copy = gpu.copy_TBs * 1e12
    width, hidden = work.config.embed_dim, work.config.ffn_embed_dim
    bare = Work(work.config, work.batch, True, work.autocast)
    bare_products = 3 * bare.forward().products / layers / vendor
    scores = work.config.attention_heads * bare.pairs * bare.kept_share
    moved = 6 * 2 * (scores + 2 * bare.rows * bare.kept_share * width)
    bare_seconds = bare_products + max(moved / copy, 3 * bare.forward().attention / layers / vendor)
    if way in STRATEGIES:
        seconds = _by_ops(work, gpu_name, way, products, attention)
    else:
        rows = work.rows * share
        pairs = work.config.attention_heads * work.pairs
        element = work.element
        columns = EAGER_WIDTH * width * element + EAGER_HIDDEN * hidden * element
        eager = 3 * (rows * columns + pairs * (EAGER_SCORES * element + 2 * FLOAT32)) / copy
        of_products = products / vendor + 3 * max(attention / vendor, 2 * element * pairs / copy)
        least = COMPILED_SHARE if way == "compiled" else 0.8
        seconds = Span(of_products + least * eager, of_products + (1.0 if way == "compiled" else 1.25) * eager)
    return Layer(seconds, seconds.times(1 / bare_seconds))


def _by_ops(work: Work, gpu_name: str, way: str, products: float, attention: float) -> Span:
    """Our layer: the vendor's products at its rate, launches by the model, attention near its goal."""
    gpu, table = constants.gpus()[gpu_name], constants.kernels()
    known, shape = table["gpus"][gpu_name], table["shape"]
    strategy = known["strategies"][STRATEGIES[way]]
    width, hidden = work.config.embed_dim, work.config.ffn_embed_dim
    rows = work.rows * work.kept_share
    vendor, copy = gpu.vendor_TFLOPs * 1e12, gpu.copy_TBs * 1e12
    table_rows = sum(shape["counts"])
    of_flop = rows * width * hidden / (table_rows * shape["width"] * shape["hidden"])
    of_width, of_hidden = rows * width / (table_rows * shape["width"]), rows * hidden / (table_rows * shape["hidden"])
    found = Span(*strategy["products"]).times(MICROSECOND * of_flop)
    found += Span(*strategy["rows"]).times(MICROSECOND * of_hidden)
    found += Span(*known["around"]).times(MICROSECOND * of_width)
    projections = products * 4 * width / (4 * width + 3 * hidden)
    row = 2 * rows * width / copy
    found += strategy["vendor_FLOP"] * of_flop / vendor + projections / vendor
    found += 2 * row  # gradients of the biases of q and v
    # Attention: q, k, v, output and their gradients once at the goal of 1.5 times a copy; longer where products bind,
    # which small heads reach at half the vendor's rate at best.
    floor, computed = 12 * row, 3.5 * attention / vendor
    goal = constants.value("attention")["share_of_floor"]
    return found + Span(max(goal * floor, computed), max(goal * floor, 2 * computed))


def step(work: Work, gpu_name: str, way: str, parameters: int, processes: int = 1) -> Span:
    """Seconds of all layers, the rounding of weights by autocast and AdamW, without communication.

    ``parameters`` are the model's. AdamW reads four float32 of each and writes three; clipping reads one.
    """
    gpu = constants.gpus()[gpu_name]
    copy = gpu.copy_TBs * 1e12
    once = layer(work, gpu_name, way).seconds.times(work.config.layers)
    if work.config.checkpoint_activations:  # the forward pass again, a third of both
        once = once.times(4 / 3)
    beside = 8 * FLOAT32 * parameters / processes / copy
    if work.autocast:
        beside += (FLOAT32 + 2) * parameters / copy
    return once + beside
