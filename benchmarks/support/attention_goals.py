"""What attention alone must reach, and how a run stands against it, for each pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.support.report import number
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


def verdicts(
    found: Mapping[str, Mapping[str, float]], shape: str, variants: Collection[str]
) -> dict[str, dict[str, str]]:
    """The ratios of each pass against the goals that hold at a shape and are of these variants."""
    result = {}
    for mode, goals in GOALS.items():
        held = {name: goal for name, goal in goals.items() if shape == GOALS_SHAPE or name in AT_EVERY_SHAPE}
        held = {name: goal for name, goal in held.items() if set(RATIOS.get(name, ())) <= set(variants)}
        result[mode] = {name: _verdict(name, goal, found[mode].get(name)) for name, goal in held.items()}
    return result


def _verdict(name: str, goal: float, ratio: float | None) -> str:
    is_least = name.endswith("_over_fused")  # of another's time
    stated = f"goal at {'least' if is_least else 'most'} {goal}"
    if ratio is None:
        return f"not measured, {stated}"
    met = ratio >= goal if is_least else ratio <= goal
    return f"{ratio:.2f}, {stated}: {'met' if met else 'missed'}"


def times_per_pair(subset: Variants, whole: Variants, shape: Shape) -> dict[str, Any]:
    """Of a shape that is a subset of another, the time of a pair of tokens over that of a pair of the whole."""
    found: dict[str, dict[str, float]] = {mode: {} for mode in PASSES}
    for mode in PASSES:
        for name in PER_PAIR:
            own, other = (variants.get(name, {}).get(mode) for variants in (subset, whole))
            if own and other:
                longer = own["median_ms"] / other["median_ms"]
                found[mode][name] = round(longer * shape.subset_of.pairs / shape.pairs, 3)
    return {"over": shape.subset_of.name, **found}


def goal_rows(shape: Mapping[str, Any]) -> list[Sequence[str]]:
    """The table of a shape's verdicts."""
    stated, rows = shape.get("goals", {}), [("goals: ratio", "forward", "backward", "fwd+bwd")]
    for name in dict.fromkeys(name for mode in stated.values() for name in mode):
        rows.append((name, *(stated[mode].get(name, "-") for mode in PASSES)))
    return rows


def pair_rows(shape: Mapping[str, Any]) -> list[Sequence[str]]:
    """The table of what a pair of tokens costs in a subset of a batch, over the whole."""
    found = shape.get("time_per_pair", {})
    rows = [(f"time per pair of tokens, over {found.get('over')}", "forward", "backward", "fwd+bwd")]
    for name in PER_PAIR if found else ():
        rows.append((name, *(number(found[mode].get(name), 2) for mode in PASSES)))
    return rows
