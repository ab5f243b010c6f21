"""The suites of `onepeace-fast bench` and `pytest benchmarks`: real sizes on a GPU, small ones on a CPU."""

from __future__ import annotations

import torch

from benchmarks.support import decoder_attention, peers, sections, shapes
from benchmarks.support import relative_bias_attention as attention
from benchmarks.support.layer import MODEL_LAYERS
from benchmarks.support.pointwise import OPERATIONS
from benchmarks.support.routed_rows import ragged_shape
from benchmarks.support.sections import Section, Setting
from benchmarks.support.shapes import Shape, Sizes
from onepeace_fast.hardware.cases import OVER_ROWS

SMALL = Sizes(width=256, hidden=1024, heads=4, layers=2, grid=8)
SUITES = ("attention", "ffn", "layer", "pointwise", "step")
ROWS_ON_GPU = (256, 1024, 4096, 9500, 16384, 65536)
POINTWISE = ("layer_norm", "rms_norm", "residual", "gated_sub_ln")
assert set(POINTWISE) <= {*OVER_ROWS, *OPERATIONS}


def ragged_shapes() -> list[Shape]:
    """Small batches of one, two and three modalities, whose samples differ in length."""
    text, image = shapes.text(8), shapes.image(8, grid=8)
    return [
        Shape("16 texts", {"text": shapes.text(16)}),
        Shape("8 texts and images", {"text": text, "image": image}),
        Shape("8 sounds", {"audio": shapes.audio(8, 20, 150)}),
        Shape("6 texts, images and sounds", {
            "text": shapes.text(6), "image": shapes.image(6, grid=8), "audio": shapes.audio(6, 20, 150),
        }),
    ]  # fmt: skip


def setting(device: torch.device) -> Setting:
    """Where a suite runs, and how large."""
    if device.type == "cuda":
        return Setting(device, torch.bfloat16, sections.FULL, sets=4, layers=MODEL_LAYERS)
    return Setting(device, torch.float32, SMALL, sets=4, layers=SMALL.layers)


def suite(name: str, device: torch.device, full: bool = False) -> list[Section]:
    """The sections of a suite, each with ours and every peer that runs here."""
    on_gpu = device.type == "cuda"
    batches = sections.full_shapes() if on_gpu else ragged_shapes()
    names = peers.measured(name, device, full)
    if name == "attention":
        whole = attention.full_shapes() if on_gpu else batches
        decoders = decoder_attention.full_batches() if on_gpu else decoder_attention.small_batches()
        return [
            *(sections.attention_section(shape, names=names) for shape in whole),
            *(sections.decoder_attention_section(batch, names=names) for batch in decoders),
        ]
    if name == "ffn":
        rows = ROWS_ON_GPU if on_gpu and full else (9500,) if on_gpu else (800,)
        by_rows = [ragged_shape(m, count) for m in (1, 2, 3, 8) for count in rows if on_gpu or m > 1]
        return [
            *(sections.feed_forward_section(shape, names=names) for shape in batches),
            *(sections.feed_forward_section(shape, True, names=names) for shape in by_rows),
        ]
    if name == "layer":
        return [sections.layer_section(shape, names=names) for shape in batches]
    if name == "pointwise":
        return [sections.pointwise_section(operation, batches[1 - on_gpu], names=names) for operation in POINTWISE]
    return [sections.step_section(shape, names=names) for shape in batches]
