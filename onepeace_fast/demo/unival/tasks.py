"""The tasks: texts about handwritten and spoken digits, and the data that they are about.

Four tasks: captions of images and of sounds, and questions about images and about sounds. A question asks for the digit
before or after the one that is seen or heard, on a dial: after nine comes zero. Guessing is right one time in ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.demo import data, speech
from onepeace_fast.demo.data import DARKEST, NAMES, SIDE
from onepeace_fast.models.unival.inputs import END, PADDING

TURNED = 30.0  # degrees, of the shifted images
PROMPTS = {"image": "what does the image show", "audio": "what does the sound say"}
CAPTIONS = {"image": "a handwritten {}", "audio": "a spoken {}"}
QUESTIONS = {"which digit comes after it": 1, "which digit comes before it": -1}


@dataclass(frozen=True)
class Task:
    """A kind of text about one modality."""

    name: str
    modality: str  # "image" or "audio"
    asks: bool  # a question, or a caption


TASKS = (
    Task("image captions", "image", False),
    Task("image questions", "image", True),
    Task("sound captions", "audio", False),
    Task("sound questions", "audio", True),
)
IMAGES, SOUNDS = TASKS[:2], TASKS[2:]


class Data(NamedTuple):
    """What is shown or said: images [rows, 8, 8] or sounds int16 [samples] each, and the digit of each."""

    items: Tensor | list[np.ndarray]
    labels: Tensor  # int64 [rows]


class Sets(NamedTuple):
    """Data by modality, "image" and "audio"."""

    training: Mapping[str, Data]
    familiar: Mapping[str, Data]  # held out: other people's handwriting; new clips of voices that were trained with
    shifted: Mapping[str, Data]  # the same images turned; voices that were never trained with


def load() -> Sets:
    """All data.

    Raises:
        ValueError: eSpeak NG does not work here, in one line.
    """
    return arrange(*speech.load(speech.plan()))


def arrange(spoken: speech.Speech, unseen: speech.Speech) -> Sets:
    """The images, and clips of voices to train with and of others; of each of the former one accent is held out."""
    written, held_out = data.load()
    places = {voice: turn for turn, voice in enumerate(dict.fromkeys(clip.voice for clip in spoken.clips))}
    kept = [clip.accent == speech.ACCENTS[places[clip.voice] % len(speech.ACCENTS)] for clip in spoken.clips]
    images = Data(held_out.images, held_out.labels)
    return Sets(
        {"image": Data(written.images, written.labels), "audio": _chosen(spoken, [not one for one in kept])},
        {"image": images, "audio": _chosen(spoken, kept)},
        {"image": images, "audio": _chosen(unseen, [True] * len(unseen.clips))},
    )


def _chosen(spoken: speech.Speech, wanted: Sequence[bool]) -> Data:
    rows = [row for row, one in enumerate(wanted) if one]
    labels = torch.tensor([spoken.labels[row] for row in rows], dtype=torch.int64, device="cpu")
    return Data([spoken.sounds[row] for row in rows], labels)


class Vocabulary:
    """Words of all tasks; ids 0 to 2 begin, pad and end a text."""

    def __init__(self) -> None:
        texts = [*PROMPTS.values(), *QUESTIONS, *NAMES, *CAPTIONS.values()]
        self.words = [*dict.fromkeys(word for text in texts for word in text.split() if word != "{}")]
        self._ids = {word: 3 + place for place, word in enumerate(self.words)}

    def __len__(self) -> int:
        return 3 + len(self.words)

    def encode(self, text: str) -> list[int]:
        """A text's ids without its end."""
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without beginning and end."""
        return " ".join(self.words[one - 3] for one in ids if one > END)

    def batch(self, texts: Sequence[str]) -> Tensor:
        """Texts with their ends, int64 [texts, length], padded."""
        rows = [torch.tensor([*self.encode(text), END], dtype=torch.int64, device="cpu") for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


def texts(task: Task, digits: Sequence[int], choices: Sequence[int]) -> tuple[list[str], list[str]]:
    """Sources and targets of a task for digits; ``choices`` say which question each gets."""
    if not task.asks:
        said = [CAPTIONS[task.modality].format(NAMES[digit]) for digit in digits]
        return [PROMPTS[task.modality]] * len(said), said
    asked = [[*QUESTIONS][choice % len(QUESTIONS)] for choice in choices]
    return asked, [NAMES[(digit + QUESTIONS[text]) % 10] for digit, text in zip(digits, asked, strict=True)]


def digit_named(text: str) -> str | None:
    """The only digit that a text names."""
    named = [word for word in text.split() if word in NAMES]
    return named[0] if len(named) == 1 else None


def pictures(images: Tensor, generator: torch.Generator | None = None, turned: bool = False) -> Tensor:
    """Images [rows, 8, 8] as the model takes them: [rows, 1, SIDE, SIDE], from 0 (paper) to 2 (ink).

    ``turned``: left and right in turns.
    """
    if not turned:
        return 1 + data.enlarge(images, generator)[:, :1]
    angle = torch.deg2rad(TURNED * (1 - 2 * (torch.arange(len(images), device="cpu") % 2)).float())
    cosine, sine, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    placing = torch.stack([cosine, -sine, none, sine, cosine, none], 1).view(-1, 2, 3)
    grid = F.affine_grid(placing, [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False) * (2 / DARKEST)
