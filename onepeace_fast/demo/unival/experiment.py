"""What the paper claims of UnIVAL (arXiv 2307.16184), claim by claim, with whatever comes out.

Transfer: a model pretrained on images learns sounds, beside one from scratch.
Merging: two fine-tunings of one model, on images and on sounds, are averaged; every point of the line is measured.
Tasks: four at once in balanced batches, beside each alone with as many examples of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from onepeace_fast.demo.training import PEAK, timed
from onepeace_fast.demo.unival.model import DigitModel
from onepeace_fast.demo.unival.tasks import IMAGES, SOUNDS, TASKS, Sets, Task, Vocabulary
from onepeace_fast.demo.unival.training import Examined, train
from onepeace_fast.merging import interpolate

POINTS = tuple(weight / 8 for weight in range(9))
EXAMINED = 200  # of each set, for each task
FAMILIAR, SHIFTED = "familiar", "shifted"


@dataclasses.dataclass(frozen=True)
class Steps:
    """Training steps: on images, on sounds after them, of all tasks, and of both fine-tunings."""

    pretraining: int = 300
    transfer: int = 250
    tasks: int = 300
    tuning: int = 120


@dataclasses.dataclass
class Result:
    """One run; shares of right texts throughout.

    Attributes:
        seed: of weights and batches.
        steps: of each training.
        seconds: of each part.
        transfer: {"steps": [...], "pretrained": ..., "scratch": ...}, each of the latter {data: [share after steps]}.
        line: {"points": weights of the model of sounds, then {curve: [share at each point]}}.
        tasks: {task: {"together": share, "alone": share}}, on familiar data.
    """

    seed: int
    steps: dict[str, int]
    seconds: dict[str, float]
    transfer: dict[str, Any]
    line: dict[str, Any]
    tasks: dict[str, dict[str, float]]

    def figures(self) -> dict[str, float]:
        """The figures that a reader compares."""
        found: dict[str, float] = {}
        early = max(1, len(self.transfer["steps"]) // 2)
        for start in ("pretrained", "scratch"):
            for data, values in self.transfer[start].items():
                found |= {f"{start} {data} early": values[early], f"{start} {data} end": values[-1]}
        middle = len(self.line["points"]) // 2
        for name, values in self.line["curves"].items():
            found |= {f"line {name} first": values[0], f"line {name} middle": values[middle]}
            found |= {f"line {name} last": values[-1], f"line {name} best": max(values)}
        for task, shares in self.tasks.items():
            found |= {f"{start} {task}": share for start, share in shares.items()}
        for start in ("together", "alone"):
            found[f"{start} mean"] = statistics.mean(shares[start] for shares in self.tasks.values())
        return found


class Bench:
    """What all parts of a run share: data, held-out sets of each task, seed and steps."""

    def __init__(self, sets: Sets, seed: int, steps: Steps) -> None:
        self.sets, self.seed, self.steps = sets, seed, steps
        self.vocabulary = Vocabulary()
        self.seconds: dict[str, float] = {}
        kinds = ((FAMILIAR, sets.familiar), (SHIFTED, sets.shifted))
        self.examined = {
            (task.name, kind): Examined(
                task, of[task.modality], self.vocabulary, kind == SHIFTED and task.modality == "image", EXAMINED
            )
            for task in TASKS
            for kind, of in kinds
        }

    def train(self, model: DigitModel, tasks: Sequence[Task], steps: int, what: str, **options: Any) -> DigitModel:
        """Train in place, and return the model."""
        train(model, tasks, self.sets.training, self.vocabulary, steps, self.seed, what, **options)
        return model

    def fresh(self) -> DigitModel:
        """The model of this seed, untrained."""
        return DigitModel(len(self.vocabulary), self.seed)

    def share(self, model: DigitModel, tasks: Sequence[Task], kind: str) -> float:
        """The mean share of right texts of tasks."""
        return statistics.mean(self.examined[task.name, kind].accuracy(model) for task in tasks)


def run(bench: Bench) -> tuple[Result, DigitModel]:
    """All claims; the model of all tasks too."""
    with timed(bench.seconds, "transfer"):
        transfer = measure_transfer(bench)
    with timed(bench.seconds, "tasks"):
        tasks, model = measure_tasks(bench)
    with timed(bench.seconds, "merging"):
        line = measure_line(bench, model)
    steps = dataclasses.asdict(bench.steps)
    return Result(bench.seed, steps, bench.seconds, transfer, line, tasks), model


def measure_transfer(bench: Bench) -> dict[str, Any]:
    """A model of images and an untrained one learn the tasks of sounds, by the same batches."""
    steps = bench.steps.transfer
    moments = [steps * part // 5 for part in range(6)]
    found: dict[str, Any] = {"steps": moments}
    for start in ("pretrained", "scratch"):
        model = bench.fresh()
        if start == "pretrained":
            bench.train(model, IMAGES, bench.steps.pretraining, "images")
        shares: dict[str, list[float]] = {"familiar voices": [], "unseen voices": []}

        def note(step: int, model: DigitModel = model, shares: Mapping[str, list[float]] = shares) -> None:
            if step in moments:
                shares["familiar voices"].append(bench.share(model, SOUNDS, FAMILIAR))
                shares["unseen voices"].append(bench.share(model, SOUNDS, SHIFTED))

        bench.train(model, SOUNDS, steps, f"sounds, {start}", each=note)
        found[start] = shares
    return found


def measure_tasks(bench: Bench) -> tuple[dict[str, dict[str, float]], DigitModel]:
    """All tasks at once and each alone: the same steps, and ten examples of a task in each of them."""
    model = bench.train(bench.fresh(), TASKS, bench.steps.tasks, "all tasks")
    found = {}
    for task in TASKS:
        alone = bench.train(bench.fresh(), [task], bench.steps.tasks, f"{task.name} alone")
        found[task.name] = {
            "together": bench.share(model, [task], FAMILIAR), "alone": bench.share(alone, [task], FAMILIAR),
        }  # fmt: skip
    return found, model


def measure_line(bench: Bench, model: DigitModel) -> dict[str, Any]:
    """The line between two fine-tunings of a model, one on images and one on sounds."""
    ends = [
        bench.train(copy.deepcopy(model), tasks, bench.steps.tuning, f"fine-tuning on {name}", peak=PEAK / 2)
        for name, tasks in (("images", IMAGES), ("sounds", SOUNDS))
    ]
    merged = bench.fresh()
    curves = {
        "images": (IMAGES, FAMILIAR), "turned images": (IMAGES, SHIFTED),
        "familiar voices": (SOUNDS, FAMILIAR), "unseen voices": (SOUNDS, SHIFTED),
    }  # fmt: skip

    def shares(weights: dict[str, Tensor]) -> list[float]:
        merged.load_state_dict(weights)
        return [bench.share(merged, tasks, kind) for tasks, kind in curves.values()]

    measured = interpolate(ends[0], ends[1], POINTS, shares)
    before = {name: bench.share(model, tasks, kind) for name, (tasks, kind) in curves.items()}
    columns = zip(*measured, strict=True)
    return {"points": [*POINTS], "curves": {n: [*c] for n, c in zip(curves, columns, strict=True)}, "before": before}
