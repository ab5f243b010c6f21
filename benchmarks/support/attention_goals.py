"""What attention alone must reach, and how a run stands against it, for each pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.support.report import number, table
from benchmarks.support.shapes import Shape
from benchmarks.support.variants import PASSES

Variants = Mapping[str, Mapping[str, Any]]
GOALS_SHAPE = "64 x 257"  # what the goals are stated for
RATIOS = {
    "over_no_bias": ("fused", "fused_no_bias"),
    "over_frozen_tables": ("fused", "fused_frozen_tables"),
    "over_flash_attention_no_bias": ("fused", "flash_attention_no_bias"),
    "bias_built_over_fused": ("bias_built_sdpa_memory_efficient", "fused"),
    "upstream_over_fused": ("all_layers_sdpa_memory_efficient", "all_layers_fused"),
    "flex_attention_over_fused": ("flex_attention", "fused"),
}
AT_EVERY_SHAPE = ("flex_attention_over_fused",)
_WITH_GRADIENTS = {
    "over_floor": 1.5,
    "over_frozen_tables": 1.2,
    "upstream_over_fused": 3.0,
    "flex_attention_over_fused": 1.0,
}
GOALS = {
    "forward": {
        "over_floor": 1.5,
        "over_no_bias": 1.1,
        "bias_built_over_fused": 3.0,
        "flex_attention_over_fused": 1.0,
    },
    "backward": _WITH_GRADIENTS,
    "forward_backward": _WITH_GRADIENTS,
}
PER_PAIR = ("fused", "fused_frozen_tables", "fused_no_bias")


def ratios(variants: Variants, bytes_: Mapping[str, int], rate: float | None) -> dict[str, dict[str, float]]:
    """For each pass, the fused time over its floor, the bytes that must move at a copy's rate, and ``RATIOS``."""
    result = {}
    for mode in PASSES:
        times = {name: record[mode]["median_ms"] for name, record in variants.items() if mode in record}
        found = {}
        if rate and "fused" in times:
            floor = 1e3 * bytes_[mode] / rate
            found["floor_ms"], found["over_floor"] = round(floor, 4), round(times["fused"] / floor, 3)
        for name, (above, below) in RATIOS.items():
            if above in times and below in times:
                found[name] = round(times[above] / times[below], 3)
        result[mode] = found
    return result


def verdicts(found: Mapping[str, Mapping[str, float]], shape: str) -> dict[str, dict[str, str]]:
    """The ratios of each pass against the goals that hold at a shape."""
    result = {}
    for mode, goals in GOALS.items():
        held = {name: goal for name, goal in goals.items() if shape == GOALS_SHAPE or name in AT_EVERY_SHAPE}
        result[mode] = {name: _verdict(name, goal, found[mode].get(name)) for name, goal in held.items()}
    return result


def _verdict(name: str, goal: float, ratio: float | None) -> str:
    is_least = name.endswith("_over_fused")  # of another's time
    stated = f"goal at {'least' if is_least else 'most'} {goal}"
    if ratio is None:
        return f"not measured, {stated}"
    met = ratio >= goal if is_least else ratio <= goal
    return f"{ratio:.2f}, {stated}: {'met' if met else 'missed'}"


def add_times_per_pair(measured: Sequence[dict[str, Any]], shapes: Sequence[Shape]) -> None:
    """Where a shape is part of another, add the time of a pair of tokens over that of a pair of the whole."""
    known = {shape.name: (record, shape.pairs) for record, shape in zip(measured, shapes, strict=True)}
    for record, shape in zip(measured, shapes, strict=True):
        if shape.part_of is None:
            continue
        whole, pairs = known[shape.part_of.name]
        found: dict[str, dict[str, float]] = {mode: {} for mode in PASSES}
        for mode in PASSES:
            for name in PER_PAIR:
                own, other = (one["variants"].get(name, {}).get(mode) for one in (record, whole))
                if own and other:
                    longer = own["median_ms"] / other["median_ms"]
                    found[mode][name] = round(longer * pairs / shape.pairs, 3)
        record["time_per_pair"] = {"over": shape.part_of.name, **found}


def summary(measured: Sequence[dict[str, Any]]) -> str:
    """The tables of attention alone: times, verdicts, and what a pair costs in parts of a batch."""
    heads = ("forward ms", "of copy", "backward ms", "of copy", "fwd+bwd ms", "of copy", "difference")
    times = [("attention: samples x tokens, variant", *heads)]
    goals = [("attention's goals: samples x tokens, ratio", "forward", "backward", "fwd+bwd")]
    pairs = [("attention's time per pair of tokens: samples x tokens, variant", "forward", "backward", "fwd+bwd")]
    for shape in measured:
        for name, record in shape["variants"].items():
            cells = []
            for mode in PASSES:
                timed = record.get(mode, {})
                cells += [number(timed.get("median_ms"), 4), number(timed.get("share_of_copy"), 2)]
            difference = record.get("output_relative_difference")
            times.append((f"{shape['name']}, {name}", *cells, "-" if difference is None else f"{difference:.1e}"))
        stated = shape.get("goals", {})
        for name in dict.fromkeys(name for mode in stated.values() for name in mode):
            goals.append((f"{shape['name']}, {name}", *(stated[mode].get(name, "-") for mode in PASSES)))
        if found := shape.get("time_per_pair"):
            for name in PER_PAIR:
                cells = [number(found[mode].get(name), 2) for mode in PASSES]
                pairs.append((f"{shape['name']}, {name}, over {found['over']}", *cells))
    return "\n\n".join(table(rows) for rows in (times, goals, pairs))
