"""A result file of suites, and what is said of it: every table, and where a peer is ahead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.support import machine, suites
from benchmarks.support.report import number
from benchmarks.support.variants import HOW_FUSED_RUNS, MODES, OURS, PASSES
from onepeace_fast.tables import table

NO_PEERS = ("products", "products_joined", "automatic")  # what is no other way to do the work
HEADS = ("", "forward ms", "fwd+bwd ms", "forward / ours", "fwd+bwd / ours", "peak MB", "error / allowed")


def begun(device: torch.device, sections: Mapping[str, Any]) -> dict[str, Any]:
    """What a result file says of a run with these sections; see benchmarks/README.md."""
    where = suites.setting(device)
    found = machine.describe(device)
    found["load_average"] = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {
        "date": machine.now(),
        "machine": found,
        "device": str(device),
        "dtype": str(where.dtype),
        "quick": False,
        "sizes": vars(where.sizes),
        "fused": HOW_FUSED_RUNS,
        "input_sets": where.sets,
        "sections": dict(sections),
        "errors": [line for name, section in sections.items() for line in faults(name, section)],
        "skipped": [
            f"{name}, {variant}: {record['skipped']}"
            for name, section in sections.items()
            for variant, record in section["variants"].items()
            if "skipped" in record
        ],
        "unmeasured": [],
    }


def faults(name: str, section: Mapping[str, Any]) -> list[str]:
    """A line for each variant of a section that is wrong or failed, and for the section itself."""
    own = [f"{name}: {section['error']}"] if "error" in section else []
    return own + [
        f"{name}, {variant}: {'wrong: ' * (state == 'wrong')}{record[state]}"
        for variant, record in section["variants"].items()
        for state in ("wrong", "error")
        if state in record
    ]


def behind(name: str, section: Mapping[str, Any]) -> list[str]:
    """A line for each peer that is ahead of ours by more than the noise, in time or in peak memory."""
    lines, ours = [], section["variants"].get(OURS, {})
    for variant, record in section["variants"].items():
        if variant in NO_PEERS or variant.endswith("no_bias") or variant.startswith("fused"):
            continue
        for mode in PASSES:
            low, middle, high = record.get("over_ours", {}).get(mode, (1.0, 1.0, 1.0))
            if high < 1:
                lines.append(f"{name}, {mode}: {variant} takes {middle:.2f} of our time ({low:.2f}-{high:.2f})")
        for mode in MODES:
            theirs, mine = (one.get("peak_bytes", {}).get(mode) for one in (record, ours))
            if theirs and mine and theirs < mine:
                lines.append(f"{name}, {mode}: {variant} allocates {theirs / mine:.2f} of our peak")
    return lines


def rows(section: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A section's table: a row for each variant that was not left out."""
    return [row(name, record) for name, record in section["variants"].items() if "skipped" not in record]


def row(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """A variant's row, under ``HEADS``."""
    state = next((state for state in ("wrong", "error") if state in record), "-")
    times, ratios = [], []
    for mode in MODES:
        found = record.get(mode, {})
        times.append(number(found.get("cpu_median_ms", found.get("median_ms")), 2) if found else state)
        ratio = record.get("over_ours", {}).get(mode)
        ratios.append(f"{ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f})" if ratio else "-")
    peak = record.get("peak_bytes", {}).get(MODES[1])
    largest = max(record.get("checked", {}).values(), default=None)
    return (name, *times, *ratios, "-" if peak is None else f"{peak / 1e6:.1f}", number(largest, 2))


def text(sections: Mapping[str, Any]) -> str:
    """Every section's table, then what is wrong and where a peer is ahead."""
    blocks = [
        f"{name}, {section.get('rows', 0)} rows\n{table([HEADS, *rows(section)])}" for name, section in sections.items()
    ]
    lines = [line for name, section in sections.items() for line in faults(name, section)]
    slower = [line for name, section in sections.items() for line in behind(name, section)]
    return "\n\n".join(filter(None, (*blocks, "\n".join(lines), "\n".join(slower))))
