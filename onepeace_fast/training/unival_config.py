"""The configuration of a UnIVAL run: its curriculum and its loss beside what every run has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onepeace_fast.checks import describe, require
from onepeace_fast.config import is_number
from onepeace_fast.data.task_batches import Part, require_equal_shares
from onepeace_fast.data.tasks import BINS, TASKS
from onepeace_fast.training.config import COUNT, NUMBER, POSITIVE, Kind, RunConfig, key, one_of

_FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
_SHARE = Kind(lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
_BINS = Kind(lambda value: type(value) is int and value > 1, "an integer from 2 on")
_STAGES = Kind(
    lambda value: isinstance(value, list) and len(value) > 0, "a list of stages, each {tasks: [...], steps: N}"
)


@dataclass(frozen=True, kw_only=True)
class UnivalTrainingConfig(RunConfig):
    """A run of UnIVAL. Each stage has an optimizer of its own, whose learning rate rises and falls, as upstream's."""

    family: str = key(one_of(["unival"]), "unival", changes_result=False)
    stages: list[Mapping[str, Any]] = key(_STAGES)  # noqa: RUF009
    smoothing: float = key(_SHARE, 0.0)
    encouraging: bool = key(_FLAG, False)
    bins: int = key(_BINS, BINS)
    image_size: int = key(COUNT, 384)
    audio_seconds: float = key(POSITIVE, 10.0)
    weight_decay: float = key(NUMBER, 0.01)
    clip: float = key(POSITIVE, 5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for place, stage in enumerate(self.stages):
            self._check_stage(f"stages[{place}]", stage)

    def _check_stage(self, name: str, stage: Any) -> None:
        fits = isinstance(stage, Mapping) and set(stage) == {"tasks", "steps"}
        require(fits, f"{name}: expected {{tasks: [...], steps: N}}, got {describe(stage)}")
        tasks, steps = stage["tasks"], stage["steps"]
        require(COUNT.fits(steps), f"{name}.steps: expected {COUNT.expected}, got {describe(steps)}")
        known = isinstance(tasks, list) and all(isinstance(task, str) and task in TASKS for task in tasks)
        require(
            known and 0 < len(tasks) == len(set(tasks)),
            f"{name}.tasks: expected some of {', '.join(TASKS)}, each once, got {describe(tasks)}",
        )
        try:
            require_equal_shares(self.batch_size, tasks)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        require(self.warm_up < steps, f"warm_up: expected fewer than the steps of {name} ({steps}), got {self.warm_up}")

    @property
    def parts(self) -> list[Part]:
        """The curriculum, in batches of each process."""
        return [Part(tuple(stage["tasks"]), stage["steps"] * self.accumulation) for stage in self.stages]

    @property
    def tasks(self) -> list[str]:
        """Those of all stages."""
        return list(dict.fromkeys(task for stage in self.stages for task in stage["tasks"]))

    @property
    def total(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage["steps"] for stage in self.stages)

    def stage_of(self, step: int) -> tuple[int, int]:
        """The stage of a step, and how many of its steps come before; the end belongs to the last."""
        for place, stage in enumerate(self.stages):
            if step < stage["steps"]:
                return place, step
            step -= stage["steps"]
        return len(self.stages) - 1, self.stages[-1]["steps"] + step

    def schedule(self, step: int) -> tuple[int, int]:
        """A rise and fall in each stage."""
        stage, within = self.stage_of(step)
        return within, self.stages[stage]["steps"]
