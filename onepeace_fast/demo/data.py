"""The demo's images and captions: scikit-learn's 1,797 handwritten digits, and sentences written from templates.

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
DARKEST = 16
LEFT_OUT = 0.2  # of the words beside the digit
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PADDING, END, UNKNOWN, SPECIALS = 1, 2, 3, 4
BOTH_TEMPLATES = (
    "{name}",
    "{figure}",
    "the number {name}",
    "the digit {figure}",
    "this is the number {figure}",
    "this is the digit {name}",
)
IMAGE_TEMPLATES = (
    *BOTH_TEMPLATES,
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
SOUND_TEMPLATES = (
    *BOTH_TEMPLATES,
    "a spoken {name}",
    "a voice says {name}",
    "somebody says the number {figure}",
    "the digit {figure} said by a voice",
    "a recording of the number {name}",
    "here a person says the digit {name}",
    "this is a recording of somebody who says {figure}",
)
HELD_OUT_TEMPLATES = (
    "a handwritten {figure}",
    "the digit {name} on a paper form",
    "this scan is of the number {figure} that a person wrote by hand with a pen",
)


class Digits(NamedTuple):
    """Images, float32 [rows, 8, 8] from 0 (paper) to 16 (ink), and the digit that each one shows, int64 [rows]."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """The digits for training and those held out."""
    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.images).float(), torch.from_numpy(bunch.target).long()
    training, held_out = slice(FIRST_HELD_OUT), slice(FIRST_HELD_OUT, None)
    return Digits(images[training], labels[training]), Digits(images[held_out], labels[held_out])


def enlarge(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What the model sees of images [rows, 8, 8]: [rows, 3, SIDE, SIDE], from -1 (paper) to 1 (ink).

    With ``generator`` each is a little shifted, turned and stretched, as other handwriting would be.
    """
    placing = torch.eye(2, 3, dtype=torch.float32, device="cpu").repeat(len(images), 1, 1)
    if generator is not None:
        scale = placing.new_tensor([0.075, 0.075, 0.1])
        placing += scale * (2 * torch.rand(placing.shape, generator=generator, dtype=torch.float32, device="cpu") - 1)
    grid = F.affine_grid(placing, [len(images), 1, SIDE, SIDE], align_corners=False)
    large = F.grid_sample(images[:, None], grid, align_corners=False)
    return (large * (2 / DARKEST) - 1).repeat(1, 3, 1, 1)


def caption(template: str, digit: int) -> str:
    """Fill a template in for a digit."""
    return template.format(name=NAMES[digit], figure=digit)


class Vocabulary:
    """Words of the training captions; ids 0 to 3 are special: 0 unused, 1 padding, 2 end, 3 unknown word."""

    def __init__(self) -> None:
        captions = [caption(t, digit) for t in (*IMAGE_TEMPLATES, *SOUND_TEMPLATES) for digit in range(10)]
        words = dict.fromkeys(word for text in captions for word in text.split())
        self.ids = {word: SPECIALS + place for place, word in enumerate(words)}

    def __len__(self) -> int:
        return SPECIALS + len(self.ids)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [rows, words of the longest + 1]: words, end, padding."""
        ids = [[*(self.ids.get(word, UNKNOWN) for word in text.split()), END] for text in captions]
        rows = [torch.tensor(row, dtype=torch.int64, device="cpu") for row in ids]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


def draw_rows(labels: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """``groups`` times the digits 0 to 9, each by a random row of ``labels``: int64 [10 * groups].

    No group holds a digit twice: a second three would count as a wrong answer to the caption of the first.
    """
    chosen = []
    for digit in range(10):
        rows = (labels == digit).nonzero().squeeze(1)
        chosen.append(rows[torch.randperm(len(rows), generator=generator, device="cpu")[:groups]])
    return torch.stack(chosen, dim=1).flatten()


def draw_captions(templates: Sequence[str], digits: Tensor, generator: torch.Generator) -> list[str]:
    """For each digit a caption from a random template, of whose other words some are left out."""
    captions = []
    for digit in digits.tolist():
        words = templates[int(torch.randint(len(templates), (), generator=generator, device="cpu"))].split()
        left_out = (torch.rand(len(words), generator=generator, dtype=torch.float32, device="cpu") < LEFT_OUT).tolist()
        said = [word for word, out in zip(words, left_out, strict=True) if "{" in word or not out]
        captions.append(caption(" ".join(said), digit))
    return captions
