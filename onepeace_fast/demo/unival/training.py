"""Training on balanced batches of tasks, and accuracy on what was held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from onepeace_fast.demo.data import NAMES, draw_rows
from onepeace_fast.demo.training import PEAK, fit
from onepeace_fast.demo.unival.model import Batch, DigitModel, log_mel
from onepeace_fast.demo.unival.tasks import Data, Task, Vocabulary, digit_named, pictures, texts
from onepeace_fast.demo.waveform import waveforms
from onepeace_fast.models.unival import Trie


def prepare(modality: str, items: Any, generator: torch.Generator | None, turned: bool = False) -> torch.Tensor:
    """Images or sounds as the model takes them; with ``generator`` varied, as other hands and microphones would."""
    if modality == "audio":
        return log_mel(waveforms(items, generator))
    return pictures(items, generator, turned)


def draw(
    tasks: Sequence[Task], training: Mapping[str, Data], vocabulary: Vocabulary, generator: torch.Generator
) -> Batch:
    """A batch with ten digits of each task, each task its own."""
    sources: list[str] = []
    targets: list[str] = []
    parts: dict[str, list[torch.Tensor]] = {}
    samples: dict[str, list[int]] = {}
    for task in tasks:
        of = training[task.modality]
        rows = draw_rows(of.labels, 1, generator)
        items = [of.items[row] for row in rows.tolist()] if isinstance(of.items, list) else of.items[rows]
        choices = torch.randint(6, (len(rows),), generator=generator, device="cpu").tolist()
        parts.setdefault(task.modality, []).append(prepare(task.modality, items, generator))
        samples.setdefault(task.modality, []).extend(range(len(sources), len(sources) + len(rows)))
        asked, said = texts(task, of.labels[rows].tolist(), choices)
        sources += asked
        targets += said
    inputs = {name: torch.cat(found) for name, found in parts.items()}
    return Batch(vocabulary.batch(sources), vocabulary.batch(targets), inputs, samples)


def train(
    model: DigitModel, tasks: Sequence[Task], training: Mapping[str, Data], vocabulary: Vocabulary, steps: int,
    seed: int, what: str, each: Callable[[int], None] | None = None, peak: float = PEAK,
) -> None:  # fmt: skip
    """Train in place; ``each`` is called before the first step and after each one with the number of steps done."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> torch.Tensor:
        if each is not None:
            each(step)
            model.train()
        return model.loss(draw(tasks, training, vocabulary, generator))

    fit(model, loss, steps, what, peak=peak, said=torch.Tensor.item)
    if each is not None:
        each(steps)


class Examined:
    """Held-out data of a task, prepared once, and how well a model does it."""

    def __init__(self, task: Task, of: Data, vocabulary: Vocabulary, turned: bool = False, most: int = 400) -> None:
        chosen = torch.randperm(len(of.labels), generator=torch.Generator().manual_seed(0), device="cpu")[:most]
        self.rows = sorted(chosen.tolist())
        items = [of.items[row] for row in self.rows] if isinstance(of.items, list) else of.items[self.rows]
        digits = of.labels[self.rows].tolist()
        self.task, self._vocabulary = task, vocabulary
        self.sources, self.targets = texts(
            task, digits, [place // 2 for place in range(len(digits))]
        )  # images turn in turns
        inputs = {task.modality: prepare(task.modality, items, None, turned)}
        target = vocabulary.batch(self.targets)
        self.batch = Batch(vocabulary.batch(self.sources), target, inputs, {task.modality: [*range(len(digits))]})
        self._answers = Trie([vocabulary.encode(name) for name in NAMES]) if task.asks else None

    def written(self, model: DigitModel) -> list[str]:
        """The model's text for each sample: any text for a caption, the name of a digit for a question."""
        model.eval()
        return [self._vocabulary.decode(tokens) for tokens in model.write(self.batch, self._answers)]

    def right(self, said: Sequence[str]) -> list[bool]:
        """Which texts name the right digit and no other."""
        return [digit_named(one) == digit_named(other) for one, other in zip(said, self.targets, strict=True)]

    def accuracy(self, model: DigitModel) -> float:
        """The share of right texts."""
        right = self.right(self.written(model))
        return sum(right) / len(right)
