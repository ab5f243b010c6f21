"""Forward and backward of the transformer stack from embedded tokens: the packed layout against the reference.

The adapters are left out: they are the same code in both backends, and their time would only dilute the ratio. The
fused backend's time includes its route plan, packing and the bias vectors, the reference's its dense bias.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks.support.encoder import SAMPLES, SIZES, EncoderCase, inputs
from benchmarks.support.report import Report
from benchmarks.support.timing import Timing, backends, paired

GOAL = 0.9
TITLE = (
    f"Encoder, forward + backward: {SIZES.layers} layers, width {SIZES.width}, hidden {SIZES.hidden}, {SIZES.heads}"
    f" heads, batch {SAMPLES}, float32, without adapters"
)
NOISY = 1.25


@pytest.mark.parametrize("name", inputs())
def test_encoder(name: str, benchmark: Any, report: Report, case_seconds: float, threads: int) -> None:
    """One input: a timed reference step before every timed step of the fused backend."""
    EncoderCase(inputs(samples=2)[name]).check()  # the time of a wrong result is worth nothing
    case = EncoderCase(inputs()[name])
    fused, reference = paired(benchmark, case.fused_step, case.reference_step, seconds=case_seconds, rounds=15)
    add_row(report, benchmark.extra_info, case, fused, reference, threads)


def add_row(
    report: Report, extra_info: dict[str, Any], case: EncoderCase, fused: Timing, reference: Timing, threads: int
) -> None:
    """Compare both timings with the goal; the row goes into the table and into ``extra_info``."""
    shape = case.shape
    measured, shown = backends(reference, fused, threads)
    goal = GOAL * shape.ratio
    spread = max(max(timing.seconds) / min(timing.seconds) for timing in (reference, fused))
    by_cpu_time = statistics.median(reference.cpu) / statistics.median(fused.cpu)
    verdict, cpu_verdict = verdict_of(reference.median / fused.median, goal), verdict_of(by_cpu_time, goal)
    measured = {
        "input": shape.name,
        "lengths": {name: list(lengths) for name, lengths in shape.lengths.items()},
        "padded_tokens": shape.padded_tokens,
        "real_tokens": shape.real_tokens,
        "ratio": round(shape.ratio, 4),
        **measured,
        "speed_up_by_cpu_time": round(by_cpu_time, 4),
        "goal": round(goal, 4),
        "verdict": verdict,
        "verdict_by_cpu_time": cpu_verdict,
        "spread": round(spread, 3),
    }
    extra_info.update(measured)
    shown = {
        "input": shape.name,
        "padded": str(shape.padded_tokens),
        "real": str(shape.real_tokens),
        "padded/real": f"{shape.ratio:.2f}",
        **shown,
        "by CPU time": f"{by_cpu_time:.2f}",
        "goal": f"{goal:.2f}",
        "": verdict if cpu_verdict == verdict else f"{verdict} (by CPU time {cpu_verdict})",
    }
    report.add(TITLE, shown, measured)
    worst = max(row["measured"]["spread"] for row in report.rows[TITLE])
    report.footers[TITLE] = _footer(worst, threads)


def verdict_of(speed_up: float, goal: float) -> str:
    """A speed-up in words."""
    return "met" if speed_up >= goal else ("missed" if speed_up >= 1 else "slower")


def _footer(spread: float, threads: int) -> str:
    text = f"Wall-clock medians (min-max), {threads} threads, both backends in turn. Goal: 0.9 x padded/real."
    if spread > NOISY:
        text += f"\nNoisy: the slowest run of a case took up to {spread:.1f} times its fastest; --threads 1 is calmer."
    return text
