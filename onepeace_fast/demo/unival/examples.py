"""What the page shows of single images and sounds: what was written of each, and what was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from onepeace_fast.demo import report
from onepeace_fast.demo.data import NAMES
from onepeace_fast.demo.unival.attention import looks
from onepeace_fast.demo.unival.experiment import FAMILIAR, Bench
from onepeace_fast.demo.unival.model import DigitModel
from onepeace_fast.demo.unival.tasks import TASKS
from onepeace_fast.demo.unival.training import Examined

MISTAKES = 6
MAPS = {"image": (4, 4), "audio": (2, 6)}


class Look(NamedTuple):
    """One picture or log-mel map, the attention over it, and the digit that was written meanwhile."""

    shown: np.ndarray
    weights: np.ndarray
    digit: str
    wrote: str
    right: bool


class Card(NamedTuple):
    """An image or a sound, and the texts that were written of it: what was asked, what was written, whether right."""

    digit: str
    image: str | None
    sound: str | None
    spectrogram: str | None
    texts: list[tuple[str, str, bool]]

    @property
    def wrong(self) -> bool:
        """Whether any text is."""
        return not all(right for _, _, right in self.texts)


def cards(bench: Bench, model: DigitModel, modality: str) -> tuple[list[Card], list[Card], int, int]:
    """A held-out example of each digit, the first other mistakes, and how many examples have one, of how many."""
    examined = [bench.examined[task.name, FAMILIAR] for task in TASKS if task.modality == modality]
    said = [(one, one.written(model)) for one in examined]
    data, rows = bench.sets.familiar[modality], examined[0].rows
    whole = [_card(data.items[row], int(data.labels[row]), said, place) for place, row in enumerate(rows)]
    chosen = first_of_each([int(data.labels[row]) for row in rows])
    wrong = [place for place, card in enumerate(whole) if card.wrong]
    others = [place for place in wrong if place not in chosen]
    return [whole[place] for place in chosen], [whole[place] for place in others[:MISTAKES]], len(wrong), len(whole)


def first_of_each(labels: Sequence[int]) -> list[int]:
    """The place of the first example of each digit that there is: no result is looked at."""
    return [labels.index(digit) for digit in range(len(NAMES)) if digit in labels]


def _card(item: Any, label: int, said: Sequence[tuple[Examined, list[str]]], place: int) -> Card:
    texts = [(one.sources[place], of[place], one.right(of)[place]) for one, of in said]
    if isinstance(item, np.ndarray):
        return Card(NAMES[label], None, report.sound_uri(item), report.spectrogram_uri(item), texts)
    return Card(NAMES[label], report.image_uri(item.numpy()), None, None, texts)


def looked(bench: Bench, model: DigitModel, modality: str) -> list[Look]:
    """Where the decoder looks while it writes the digit of a caption, of the first example of each digit."""
    task = next(task for task in TASKS if task.modality == modality and not task.asks)
    examined = bench.examined[task.name, FAMILIAR]
    said = examined.written(model)
    written = [bench.vocabulary.encode(text) for text in said]
    digits = {bench.vocabulary.encode(name)[0] for name in NAMES}
    places = [next((i for i, one in enumerate(tokens) if one in digits), len(tokens)) for tokens in written]
    weights = looks(model, examined.batch, written, places).view(len(said), *MAPS[modality]).numpy()
    shown = examined.batch.inputs[modality][:, 0].numpy()
    right, found = examined.right(said), []
    labels = [int(bench.sets.familiar[modality].labels[row]) for row in examined.rows]
    for place in first_of_each(labels):
        wrote = next((word for word in said[place].split() if word in NAMES), "no digit")
        found.append(Look(shown[place], weights[place], NAMES[labels[place]], wrote, right[place]))
    return found
