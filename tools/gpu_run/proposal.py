"""Propose the file that turns the fused backend on for a GPU: python3 -m tools.gpu_run.proposal RESULTS.json FOLDER

It holds the faster strategy of the routed FFN by rows, as the benchmark measured it. Only a run whose parity passed may
ask for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onepeace_fast import cuda_extension
from onepeace_fast.hardware.selftest import strategy_classes
from onepeace_fast.kernels.measured import MeasuredGPU, write_measured

OPERATION, PREFIX, MODE = "routed_ffn", "strategy_", "forward_backward"
NOTHING = 4  # exit code


def times_by_rows(sections: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Forward and backward in ms, by rows and strategy, where two strategies at least were timed side by side."""
    result = {}
    for section in sections.values():
        if section["kind"] != "ffn":
            continue
        times = {
            name.removeprefix(PREFIX): record[MODE]["median_ms"]
            for name, record in section["variants"].items()
            if name.startswith(PREFIX) and MODE in record
        }
        if len(times) > 1:
            result[section["rows"]] = times
    return dict(sorted(result.items()))


def main(arguments: list[str] | None = None) -> int:
    """Write the proposal, or say why there is none."""
    results, folder = map(Path, arguments or sys.argv[1:])
    found = json.loads(results.read_text(encoding="utf-8"))
    by_rows = strategy_classes(times_by_rows(found["sections"]))
    if not by_rows:
        print("no file is proposed: no two strategies of routed_ffn were timed side by side")
        return NOTHING
    if (reason := cuda_extension.unavailable_reason()) is not None:
        print(f"no file is proposed: attention's kernels were not measured: {reason}")
        return NOTHING
    machine = found["machine"]
    proposed = MeasuredGPU(
        name=machine["gpu"],
        architecture=f"sm_{machine['capability'].replace('.', '')}",
        versions=machine["versions"],
        date=found["date"],
        parity=True,
        strategies={OPERATION: by_rows},
        launch_parameters={},
    )
    write_measured(proposed, folder)
    print(f"proposed for {machine['gpu']}: {by_rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
