"""What packing gained on the demo's own batches, in words that follow the measured figures."""

from __future__ import annotations

from collections.abc import Sequence

from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.result import Cost, TokenCount

ALIKE = 0.05  # two medians of so few rounds are not told apart below


def padding(tokens: Sequence[TokenCount]) -> str:
    """How many tokens of each stage are padding."""
    said = []
    for stage in dict.fromkeys(count.stage for count in tokens):
        counts = [count for count in tokens if count.stage == stage]
        real, padded = sum(count.real for count in counts), sum(count.padded for count in counts)
        share = percent(1 - real / padded) if padded > real else "none"
        said.append(f"{share} of a padded {stage} batch")
    return f"Padding is {' and '.join(said)}."


def speed(costs: Sequence[Cost]) -> list[str]:
    """For each stage how fast the other backends are beside the reference."""
    sentences = []
    for stage, of_stage in by_stage(costs).items():
        base = of_stage["reference"].seconds
        others = {name: base / cost.seconds for name, cost in of_stage.items() if name != "reference"}
        sentences.append(f"{stage}: {'; '.join(f'{name} is {_pace(ratio)}' for name, ratio in others.items())}.")
    return sentences


def why_slower(costs: Sequence[Cost], width: int) -> list[str]:
    """In which stages packing took longer than padding, in a model of this width, and where it does not."""
    slower = [
        stage for stage, one in by_stage(costs).items() if one["reference"].seconds / one["fused"].seconds < 1 - ALIKE
    ]
    if not slower:
        return []
    return [
        f"{' and '.join(slower)}: fused packs the tokens, which costs more time than it saves at this width, {width}.",
        "Wider models with padding gain from it on a CPU: docs/measured.md.",
    ]


def memory(costs: Sequence[Cost]) -> list[str]:
    """For each stage the peak memory of the other backends beside the reference's."""
    sentences = []
    for stage, of_stage in by_stage(costs).items():
        base = of_stage["reference"].peak_bytes
        others = {name: cost.peak_bytes / base for name, cost in of_stage.items() if name != "reference"}
        said = " and ".join(f"{name} {ratio:.2f}" for name, ratio in others.items())
        sentences.append(f"{stage}: {said} times the reference's peak memory.")
    return sentences


def by_stage(costs: Sequence[Cost]) -> dict[str, dict[str, Cost]]:
    """The costs of each stage by backend."""
    stages: dict[str, dict[str, Cost]] = {}
    for cost in costs:
        stages.setdefault(cost.stage, {})[cost.backend] = cost
    return stages


def _pace(ratio: float) -> str:
    if ratio < 1 - ALIKE:
        return f"slower, {ratio:.2f} times as fast"
    return f"about as fast, {ratio:.2f} times" if ratio < 1 + ALIKE else f"{ratio:.2f} times as fast"
