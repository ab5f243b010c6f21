"""The demo's data: scikit-learn's 1,797 handwritten digits, and captions written from templates.

The 8 x 8 images (Alpaydin and Kaynak, 1998; shipped inside scikit-learn, nothing is downloaded) stand in the file form
after form, as their recurring order shows: fourteen forms of about 130 digits, filled in by thirteen people. The last
three forms are held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

FIRST_HELD_OUT = 1415  # here the twelfth form begins
SIDE = 32
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PADDING, END, UNKNOWN, SPECIALS = 1, 2, 3, 4
TRAINING_TEMPLATES = (
    "{name}",
    "{figure}",
    "a handwritten {name}",
    "the number {figure} on paper",
    "the digit {figure} written by hand",
    "a scan of the number {name}",
    "somebody wrote the number {name} with a pen",
    "a scan of a paper form on which somebody wrote a {figure} by hand",
    "this is the digit {name} and it was written on a form with a pen",
    "on this form a person wrote the number {figure}",
    "with a pen somebody wrote {name} on paper",
    "a pen and a hand wrote this {figure} on paper",
    "this is a scan of a form with the number {figure} written on it",
    "here a person has written the digit {name}",
)
HELD_OUT_TEMPLATES = (
    "a handwritten {figure}",
    "the digit {name} on a paper form",
    "this scan is of the number {figure} that a person wrote by hand with a pen",
)


class Digits(NamedTuple):
    """Images, float32 [rows, 3, SIDE, SIDE], and the digit that each one shows, int64 [rows]."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """The digits for training and those held out, upscaled and normalised by the training images."""
    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None]
    training = small[:FIRST_HELD_OUT]
    small = (small - training.mean()) / training.std()
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.from_numpy(bunch.target).long()
    training, held_out = slice(FIRST_HELD_OUT), slice(FIRST_HELD_OUT, None)
    return Digits(images[training], labels[training]), Digits(images[held_out], labels[held_out])


def caption(template: str, digit: int) -> str:
    """Fill a template in for a digit."""
    return template.format(name=NAMES[digit], figure=digit)


class Vocabulary:
    """Words of the training captions; ids 0 to 3 are special: 0 unused, 1 padding, 2 end, 3 unknown word."""

    def __init__(self) -> None:
        captions = [caption(template, digit) for template in TRAINING_TEMPLATES for digit in range(10)]
        words = dict.fromkeys(word for text in captions for word in text.split())
        self.ids = {word: SPECIALS + place for place, word in enumerate(words)}

    def __len__(self) -> int:
        return SPECIALS + len(self.ids)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [rows, words of the longest + 1]: words, end, padding."""
        rows = [torch.tensor([*(self.ids.get(word, UNKNOWN) for word in text.split()), END]) for text in captions]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


def draw_batch(digits: Digits, groups: int, words: Vocabulary, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``groups`` times the digits 0 to 9, each with a random image and caption: texts and images, 10 * groups rows.

    No group holds a digit twice: a second three would count as a wrong answer to the caption of the first.
    """
    chosen = []
    for digit in range(10):
        rows = (digits.labels == digit).nonzero().squeeze(1)
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:groups]])
    rows = torch.stack(chosen, dim=1).flatten()
    which = torch.randint(len(TRAINING_TEMPLATES), (len(rows),), generator=generator).tolist()
    captions = [caption(TRAINING_TEMPLATES[t], d) for t, d in zip(which, digits.labels[rows].tolist(), strict=True)]
    return words.encode(captions), digits.images[rows]
