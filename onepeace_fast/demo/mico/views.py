"""Digits as four modalities, each a small square map, as MiCo's one encoder takes them.

vision: handwriting. audio: the log-mel map of a spoken digit. strokes: handwriting as the path of a pen, which starts
at the topmost dark pixel and always goes to the nearest one not yet visited. table: the sums of an image's rows and
columns. The views of a sample are of one digit and else drawn each for itself: none can be computed from another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.demo import data, speech
from onepeace_fast.demo.data import DARKEST
from onepeace_fast.demo.unival.model import log_mel
from onepeace_fast.demo.waveform import waveforms

SIDE = 16
MODALITIES = ("vision", "audio", "strokes", "table")  # in this order they join the pretraining
INK = 6  # of 16: a pixel at least this dark is a point of the path
BEGIN, WORDS, FIRST = 2, (3, 4), 5  # tokens: 0 pads, 1 hides, two words of every caption, then the digits


class Views(NamedTuple):
    """Maps of one modality, float32 [rows, SIDE, SIDE], and the digit of each row, int64 [rows]."""

    maps: Tensor
    labels: Tensor


class Sets(NamedTuple):
    """Views by modality; the held-out ones are by other people and by voices that were never trained with."""

    training: Mapping[str, Views]
    held_out: Mapping[str, Views]


class Drawn(NamedTuple):
    """A batch: captions, int64 [samples, 4], frames of each modality, and whose each row is."""

    text: Tensor
    frames: dict[str, Any]
    samples: dict[str, list[int]]


def load() -> Sets:
    """All data.

    Raises:
        ValueError: eSpeak NG does not work here, in one line.
    """
    return arrange(*speech.load(speech.plan()))


def arrange(spoken: speech.Speech, unseen: speech.Speech) -> Sets:
    """Views of the digits and of these clips."""
    halves = zip(data.load(), (spoken, unseen), strict=True)
    return Sets(*(_views(written, heard) for written, heard in halves))


def _views(written: data.Digits, heard: speech.Speech) -> dict[str, Views]:
    images, labels = written
    maps = {
        "vision": F.interpolate(images[:, None] * (2 / DARKEST) - 1, (SIDE, SIDE), mode="bilinear")[:, 0],
        "audio": F.adaptive_avg_pool2d(log_mel(waveforms(heard.sounds)), SIDE)[:, 0],
        "strokes": torch.stack([pen_map(image) for image in images]),
        "table": table_map(images),
    }
    spoken = torch.tensor(heard.labels, dtype=torch.int64, device="cpu")
    return {name: Views(x, spoken if name == "audio" else labels) for name, x in maps.items()}


def pen_path(image: Tensor) -> Tensor:
    """The path of a pen over the dark pixels of an image [8, 8]: its row, column, ink and whether it was lifted.

    Float32 [points, 4], each from -1 to 1.
    """
    places = (image >= INK).nonzero().tolist()
    last, points = places[0], []
    while places:
        place = min(places, key=lambda p: ((p[0] - last[0]) ** 2 + (p[1] - last[1]) ** 2, p))
        places.remove(place)
        lifted = max(abs(place[0] - last[0]), abs(place[1] - last[1])) > 1
        ink = float(image[place[0], place[1]]) / DARKEST
        points.append([place[0] / 3.5 - 1, place[1] / 3.5 - 1, 2 * ink - 1, 2 * lifted - 1])
        last = place
    return torch.tensor(points, dtype=torch.float32, device="cpu")


def pen_map(image: Tensor) -> Tensor:
    """The path of an image over time, to the right, at SIDE moments; each of its four series takes four rows."""
    series = F.interpolate(pen_path(image).t()[None], SIDE, mode="linear", align_corners=True)[0]
    return series.repeat_interleave(SIDE // len(series), 0)


def table_map(images: Tensor) -> Tensor:
    """The eight row sums and eight column sums of images [rows, 8, 8], a row of the map for each."""
    sums = torch.cat([images.sum(2), images.sum(1)], 1) / (4 * DARKEST) - 1
    return sums[:, :, None].expand(-1, -1, SIDE).contiguous()


def captions(digits: Sequence[int] | Tensor) -> Tensor:
    """The caption of each digit: a beginning, two words and the digit."""
    return torch.tensor([[BEGIN, *WORDS, FIRST + int(digit)] for digit in digits], dtype=torch.int64, device="cpu")


def draw(views: Mapping[str, Views], modalities: Sequence[str], groups: int, generator: torch.Generator) -> Drawn:
    """``groups`` times the ten digits, each with a random choice of the modalities, at least one."""
    digits = torch.arange(10, device="cpu").repeat(groups)
    has = torch.rand(len(digits), len(modalities), generator=generator, device="cpu") < 0.5
    first = torch.randint(len(modalities), (len(digits),), generator=generator, device="cpu")
    has[torch.arange(len(digits), device="cpu"), first] = True
    frames: dict[str, Any] = {}
    samples: dict[str, list[int]] = {}
    for place, name in enumerate(modalities):
        own = has[:, place].nonzero()[:, 0]
        if len(own):
            rows = data.draw_rows(views[name].labels, groups, generator)[own]
            frames[name], samples[name] = views[name].maps[rows][:, None], own.tolist()
    return Drawn(captions(digits), frames, samples)


def held_out(views: Mapping[str, Views], groups: int) -> tuple[dict[str, Tensor], Tensor]:
    """Samples to measure with, the same in every run: frames of all modalities, and the digits."""
    generator = torch.Generator().manual_seed(1)
    frames = {}
    for name, (maps, labels) in views.items():
        frames[name] = maps[data.draw_rows(labels, groups, generator)][:, None]
    return frames, torch.arange(10, device="cpu").repeat(groups)
