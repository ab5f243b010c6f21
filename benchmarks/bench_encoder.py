"""The transformer stack on a CPU from embedded tokens, by the automatic backend and by each that one may ask for.

The adapters are left out: they are the same code in both backends, and their time would only dilute the ratio. The
fused backend's time includes its route plan, packing and the bias vectors, the reference's its dense bias. Beside them
run the bare matrix products of the padded and of the packed rows: what packing could gain at best.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.support import products as vendor
from benchmarks.support import shapes
from benchmarks.support.boolean_masks import routed_by_masks
from benchmarks.support.encoder import SIZES, EncoderCase
from benchmarks.support.report import Report
from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.timing import paired
from onepeace_fast.models.choice import choose
from onepeace_fast.timing import HostClock, Timing, interleaved, interval

pytestmark = pytest.mark.full

PAIRS = 30
TITLE = f"Stack of {SIZES.layers} layers, float32, without adapters: CPU time over the reference's in the same round"
NARROW = Sizes(width=128, hidden=256, heads=4, layers=4, grid=4)
COMPILED = "The reference under torch.compile, both passes: CPU time, and ratios of the same round"
MASKED = "Tokens routed by boolean masks in every layer, both passes: CPU time, and ratios of the same round"
BFLOAT16 = "The stack in bfloat16, both passes: CPU time, and ratios of the same round"
FOOTER = """{} threads; medians of the rounds' ratios to the reference with their 95% intervals; below 1 is faster.
Goals: the interval of the automatic backend reaches 1; the fused one takes at most 1.1; where more than a tenth is
padding, the automatic one gains 0.95 of what bare matrix products gain, those of packed over those of padded rows."""
# Share of padded tokens from which the automatic backend must gain this much of what the bare products do.
PADDED, LEAST_GAIN = 0.1, 0.95
INPUTS: dict[str, tuple[dict[str, list[int]], Sizes]] = {
    "a text of 12": ({"text": [12]}, SIZES),
    "8 texts of 5-20": ({"text": shapes.spread(5, 20, 8, 0)}, SIZES),
    "32 texts of 5-70": ({"text": shapes.spread(5, 70, 32, 0)}, SIZES),
    "an image": ({"image": [257]}, SIZES),
    "8 images": ({"image": [257] * 8}, SIZES),
    "8 images + texts": ({"text": shapes.spread(5, 20, 8, 0), "image": [257] * 8}, SIZES),
    "16 images of 4": ({"image": [5] * 16}, SIZES),
    "sounds of 3-15 s": ({"audio": shapes.audio(4)}, SIZES),
    "demo: 40 images": ({"image": [17] * 40}, NARROW),
    "demo: 40 captions": ({"text": shapes.spread(3, 17, 40, 0)}, NARROW),
}
PEERS = ["32 texts of 5-70", "8 images + texts"]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("mode", ["forward", "both passes"])
def test_encoder(name: str, mode: str, benchmark: Any, report: Report, case_seconds: float, threads: int) -> None:
    """One input: all variants in turn, 30 times where that fits into about the case's seconds."""
    lengths, sizes = INPUTS[name]
    case = EncoderCase(Shape(name, lengths), sizes)
    case.check()  # the time of a wrong result is worth nothing
    run = case.step if mode == "both passes" else case.forward_alone
    calls = [partial(run, None), partial(run, "reference"), partial(run, "fused")]
    timings = paired(benchmark, *calls, seconds=0.7 * case_seconds, rounds=PAIRS, least=5)
    # Not in the same rounds: their matrices would push the weights of whoever comes next out of the caches.
    products = [bare_products(shape, sizes, mode) for shape in (padded_shape(case.shape), case.shape)]
    calls = {i: lambda _, call=call: call() for i, call in enumerate(products)}
    bare = interleaved(calls, HostClock(), rounds=len(timings[0].cpu) // 2 + 1, warmups=0)[0].values()
    add_row(report, benchmark.extra_info, case, mode, threads, *timings, *bare)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@pytest.mark.parametrize("name", ["32 texts of 5-70"])
def test_compiled(name: str, benchmark: Any, report: Report, case_seconds: float, threads: int) -> None:
    """The reference under torch.compile, which keeps the padding, against the fused backend without it."""
    lengths, sizes = INPUTS[name]
    case, compiled = (EncoderCase(Shape(name, lengths), sizes) for _ in range(2))
    for layer in compiled.stack.fusion_model.layers:
        layer.compile()
    compiled.step("reference")
    calls = {
        "fused": partial(case.step, "fused"),
        "compiled reference": partial(compiled.step, "reference"),
        "reference": partial(case.step, "reference"),
    }
    timings = paired(benchmark, *calls.values(), seconds=case_seconds, rounds=PAIRS, least=5)
    ratios = [("fused", "reference"), ("compiled reference", "reference")]
    add_peers(report, benchmark.extra_info, COMPILED, name, threads, dict(zip(calls, timings, strict=True)), ratios)


@pytest.mark.parametrize("name", PEERS)
def test_boolean_masks(name: str, benchmark: Any, report: Report, case_seconds: float, threads: int) -> None:
    """The padded batch routed by a boolean mask for each modality in every layer, against the fused backend."""
    lengths, sizes = INPUTS[name]
    case, masked = (EncoderCase(Shape(name, lengths), sizes) for _ in range(2))
    case.check(routed_by_masks(masked))
    calls = {
        "fused": partial(case.step, "fused"),
        "boolean masks": partial(masked.step, "reference"),
        "reference": partial(case.step, "reference"),
    }
    timings = paired(benchmark, *calls.values(), seconds=case_seconds, rounds=PAIRS, least=4)
    ratios = [("fused", "reference"), ("boolean masks", "reference"), ("fused", "boolean masks")]
    add_peers(report, benchmark.extra_info, MASKED, name, threads, dict(zip(calls, timings, strict=True)), ratios)


@pytest.mark.parametrize("name", PEERS)
def test_bfloat16(name: str, benchmark: Any, report: Report, case_seconds: float, threads: int) -> None:
    """The stack in bfloat16 by the automatic, the fused and the reference backend, and the fused one in float32."""
    lengths, sizes = INPUTS[name]
    case, wide, exact = (EncoderCase(Shape(name, lengths), sizes) for _ in range(3))
    case.to(torch.bfloat16).check_rounded(exact.to(torch.bfloat16).to(torch.float64))
    calls = {
        "automatic": partial(case.step, None),
        "fused": partial(case.step, "fused"),
        "reference": partial(case.step, "reference"),
        "float32 fused": partial(wide.step, "fused"),
    }
    timings = paired(benchmark, *calls.values(), seconds=case_seconds, rounds=PAIRS, least=4)
    ratios = [("automatic", "reference"), ("fused", "reference"), ("fused", "float32 fused")]
    add_peers(report, benchmark.extra_info, BFLOAT16, name, threads, dict(zip(calls, timings, strict=True)), ratios)


def add_peers(
    report: Report, extra_info: dict[str, Any], title: str, name: str, threads: int, timings: dict[str, Timing],
    ratios: Sequence[tuple[str, str]],
) -> None:  # fmt: skip
    """Times and ratios of variants that took turns; the row goes into the table and into ``extra_info``."""
    measured: dict[str, Any] = {"input": name, "mode": "both passes", "threads": threads}
    shown = {"input": name}
    for variant, timing in timings.items():
        measured[variant] = timing.record()
        shown[f"{variant} ms"] = f"{1e3 * statistics.median(timing.cpu):.1f}"
    for one, other in ratios:
        low, middle, high = measured[f"{one}_over_{other}"] = interval(timings[one].cpu, timings[other].cpu)
        shown[f"{one} / {other}"] = f"{middle:.2f} ({low:.2f}-{high:.2f})"
    extra_info.update(measured)
    report.add(title, shown | {"pairs": str(len(timing.cpu))}, measured)


def padded_shape(shape: Shape) -> Shape:
    """The batch that the reference computes."""
    return Shape(shape.name, {name: [max(row)] * len(row) for name, row in shape.lengths.items()})


def bare_products(shape: Shape, sizes: Sizes, mode: str) -> Any:
    """Runs the matrix products of all layers on random matrices."""
    linears = vendor.feed_forward(shape, sizes) + vendor.projections(shape, sizes)
    bare = vendor.BareProducts(
        linears, vendor.attention(shape, sizes), torch.device("cpu"), torch.float32, sets=sizes.layers
    )
    run = bare.forward_backward if mode == "both passes" else bare.forward
    return lambda: [run(layer) for layer in range(sizes.layers)]


def add_row(
    report: Report, extra_info: dict[str, Any], case: EncoderCase, mode: str, threads: int, automatic: Timing,
    reference: Timing, fused: Timing, padded: Timing, packed: Timing,
) -> None:  # fmt: skip
    """Judge the ratios; the row goes into the table and into ``extra_info``."""
    shape = case.shape
    with torch.set_grad_enabled(mode == "both passes"):
        choice = choose(case.sizes.config(list(shape.lengths)), [case.tokens], None)
    of_automatic, of_fused = interval(automatic.cpu, reference.cpu), interval(fused.cpu, reference.cpu)
    possible = statistics.median(padded.cpu) / statistics.median(packed.cpu)
    goals = {"automatic at most 1": of_automatic[0] <= 1, "fused at most 1.1": of_fused[1] <= 1.1}
    if 1 - 1 / shape.ratio > PADDED:
        goals[f"{LEAST_GAIN} of the products' gain"] = 1 / of_automatic[1] >= LEAST_GAIN * possible
    missed = [goal for goal, met in goals.items() if not met]
    measured = {
        "input": shape.name, "mode": mode, "threads": threads,
        "lengths": {name: list(lengths) for name, lengths in shape.lengths.items()},
        "width": case.sizes.width, "padded_tokens": choice.padded_tokens, "packed_tokens": choice.packed_tokens,
        "chosen": choice.backend, "automatic_over_reference": of_automatic, "fused_over_reference": of_fused,
        "products_padded_over_packed": round(possible, 4), "missed": missed,
        "automatic": automatic.record(), "reference": reference.record(), "fused": fused.record(),
    }  # fmt: skip
    extra_info.update(measured)
    shown = {
        "input": shape.name, "mode": mode, "padded": str(choice.padded_tokens), "packed": str(choice.packed_tokens),
        "reference ms": f"{1e3 * statistics.median(reference.cpu):.1f}", "chosen": choice.backend,
        "automatic": f"{of_automatic[1]:.2f} ({of_automatic[0]:.2f}-{of_automatic[2]:.2f})",
        "fused": f"{of_fused[1]:.2f} ({of_fused[0]:.2f}-{of_fused[2]:.2f})",
        "products": f"{1 / possible:.2f}", "pairs": str(len(reference.cpu)),
        "": "missed: " + ", ".join(missed) if missed else "met",
    }  # fmt: skip
    report.add(TITLE, shown, measured, FOOTER.format(threads))
