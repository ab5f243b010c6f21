"""Memory of a training step, forward and backward of the stack: what autograd saves, and the allocator's peak.

Saved: unique storages that the forward pass keeps for the backward pass, parameters excluded, embedded tokens included.
Peak: the largest sum of allocations above what stood before the step, gradients of parameters included.
"""

from __future__ import annotations

import pytest

from benchmarks.support.encoder import SAMPLES, SIZES, EncoderCase, inputs
from benchmarks.support.memory import peak_of
from benchmarks.support.report import Report
from onepeace_fast.memory import saved_bytes

INPUTS = ("text+image", "audio")
TITLE = f"Memory of a step: {SIZES.layers} layers, width {SIZES.width}, batch {SAMPLES}, float32, per real token"


@pytest.mark.parametrize("name", INPUTS)
def test_memory(name: str, report: Report) -> None:
    """Both backends' bytes for one input; exact, not timed."""
    add_rows(report, EncoderCase(inputs()[name]))


def add_rows(report: Report, case: EncoderCase) -> None:
    """Measure both backends and add one row for each measure."""
    shape = case.shape
    measures = {"saved": saved, "peak": peak}
    for measure, function in measures.items():
        found = {backend: function(case, backend) for backend in ("reference", "fused")}
        ratio = found["fused"] / found["reference"]
        shown = {
            "input": shape.name,
            "measure": measure,
            "padded/real": f"{shape.ratio:.2f}",
            "reference KiB": f"{found['reference'] / shape.real_tokens / 1024:.1f}",
            "fused KiB": f"{found['fused'] / shape.real_tokens / 1024:.1f}",
            "fused/reference": f"{ratio:.3f}",
            "": "smaller" if ratio < 1 else "larger",
        }
        measured = {
            "input": shape.name,
            "measure": measure,
            "real_tokens": shape.real_tokens,
            "padded_tokens": shape.padded_tokens,
            **{f"{backend}_bytes": value for backend, value in found.items()},
            **{f"{backend}_bytes_per_token": round(value / shape.real_tokens, 1) for backend, value in found.items()},
            "ratio": round(ratio, 4),
        }
        report.add(TITLE, shown, measured)


def saved(case: EncoderCase, backend: str) -> int:
    """What the forward pass saves, embedded tokens included."""
    return saved_bytes(lambda: case.forward(backend), case.stack.parameters())


def peak(case: EncoderCase, backend: str) -> int:
    """The profiler's highest sum of allocations of a step."""
    case.step(backend)
    for parameter in case.stack.parameters():
        parameter.grad = None
    for tokens in case.tokens.values():
        tokens.x.grad = None
    return peak_of(lambda: case.step(backend))
