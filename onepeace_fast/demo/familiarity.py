"""Whether a sound is like any spoken digit: how near it lies to training sounds, against a measured threshold.

The score of a sound is its cosine to the fifth nearest of some training sounds (Sun et al., arXiv 2204.06507). The
threshold is the one that 95% of the held-out digits reach; noises, hums and tones say how much else reaches it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from onepeace_fast.data.audio import SAMPLE_RATE
from onepeace_fast.demo import experiment
from onepeace_fast.demo.speech import Speech
from onepeace_fast.models.pretrain import OnePeacePretrain

FILE = "familiarity.safetensors"
KNOWN = 500  # training sounds at most
NEIGHBOUR = 5
FAMILIAR = 0.95  # of the held-out digits
OF_EACH = 20  # noises of each kind


class Familiarity(NamedTuple):
    """Embeddings of training sounds, and what was measured of the score.

    Attributes:
        known: [rows, dim].
        threshold: below it a sound is unlike any digit.
        digits_below, noises_below: the share of held-out digits, and of noises, below it.
    """

    known: Tensor
    threshold: float
    digits_below: float
    noises_below: float

    def save(self, folder: Path) -> None:
        """Write it beside the model."""
        figures = {name: repr(float(getattr(self, name))) for name in self._fields[1:]}
        save_file({"known": self.known.contiguous()}, folder / FILE, figures)

    @classmethod
    def load(cls, folder: Path) -> Familiarity:
        """Read it from beside the model."""
        with safe_open(folder / FILE, "pt") as file:
            figures = file.metadata()
            return cls(file.get_tensor("known"), *(float(figures[name]) for name in cls._fields[1:]))

    def score(self, sounds: Tensor) -> Tensor:
        """The cosine of embeddings [rows, dim] to their fifth nearest training sound: [rows]."""
        return (sounds @ self.known.t()).topk(min(NEIGHBOUR, len(self.known)), dim=1).values[:, -1]


def calibrate(model: OnePeacePretrain, training: Speech, held_out: Tensor) -> Familiarity:
    """Measure the threshold with the embeddings of held-out digits, [rows, dim], and with noises."""
    # Drawn, because their order has a period: every sixth sound would be an even digit.
    drawn = np.random.default_rng(0).permutation(len(training.sounds))[:KNOWN]
    known = experiment.sound_embeddings(model, [training.sounds[row] for row in drawn])
    found = Familiarity(known, 0.0, 0.0, 0.0)
    digits, others = found.score(held_out), found.score(experiment.sound_embeddings(model, noises()))
    threshold = torch.quantile(digits, 1 - FAMILIAR).item()
    below = [(scores < threshold).float().mean().item() for scores in (digits, others)]
    return Familiarity(known, threshold, *below)


def noises() -> list[np.ndarray]:
    """Sounds that are no digit, int16, half a second to one: hiss, as of a silent room, rumble, hums and tones."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(OF_EACH):
        length = int(SAMPLE_RATE * generator.uniform(0.5, 1))
        times = np.arange(length) / SAMPLE_RATE
        hiss = generator.normal(size=length)
        rumble = np.fft.irfft(np.fft.rfft(hiss) / np.sqrt(1 + np.arange(length // 2 + 1)), length)
        hum = sum(np.sin(2 * np.pi * generator.uniform(50, 200) * k * times) / k for k in (1, 2, 3))
        tone = np.sin(2 * np.pi * generator.uniform(300, 4000) * times)
        made += [hiss, rumble / rumble.std(), hum + 0.01 * hiss, tone + 0.01 * hiss]
    return [np.round(sound / np.abs(sound).max() * 30_000).astype(np.int16) for sound in made]
