"""The routed FFN on a GPU, by each strategy and as users write it, in one interleaved run for each batch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.support.feed_forward import FeedForwardCase
from benchmarks.support.on_gpu import SIZES, skip_without_gpu
from benchmarks.support.report import Report, number
from benchmarks.support.routed_rows import RoutedRows, ragged_shape
from benchmarks.support.variants import MODES, Budget, Runner
from onepeace_fast.timing import clock_for

pytestmark = skip_without_gpu

ROUNDS, SETS, TOLERANCE = 25, 4, 0.05


@pytest.mark.parametrize("rows", (256, 1024, 4096, 9500, 16384, 65536))
@pytest.mark.parametrize("modalities", (1, 2, 3, 8))
def test_routed_ffn(modalities: int, rows: int, report: Report, case_seconds: float) -> None:
    """Every variant of one batch, in turn, beside the bare products of the vendor's library."""
    device, shape = torch.device("cuda"), ragged_shape(modalities, rows)
    torch.compiler.reset()
    case = FeedForwardCase(RoutedRows(shape, SIZES, device, torch.bfloat16, SETS))
    runner = Runner(clock_for(device), Budget(case_seconds), ROUNDS, TOLERANCE)
    records = runner.measure(case.factories(), base="sliced")
    for name, record in records.items():
        medians = [record.get(mode, {}).get("median_ms") for mode in MODES]
        bare = [records["products"].get(mode, {}).get("median_ms") for mode in MODES]
        shares = [mine / theirs if mine and theirs else None for mine, theirs in zip(medians, bare, strict=True)]
        shown = {"variant": name}
        for mode, median, share in zip(MODES, medians, shares, strict=True):
            shown |= {f"{mode} ms": number(median, 3), f"{mode} / products": number(share, 3)}
        report.add(f"routed FFN, {shape.name}", shown, {"variant": name, "shape": shape.name, **record})
    missing = [name for name in ("products", "fused") if MODES[1] not in records[name]]
    assert not missing, f"{missing} could not be measured: {[records[name] for name in missing]}"
