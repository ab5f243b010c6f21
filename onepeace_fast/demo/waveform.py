"""From sounds to what the model hears: one second at 16 kHz with the sound somewhere in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.data.audio import SAMPLE_RATE, prepare_waveform

WINDOW = SAMPLE_RATE
QUIET = 0.02  # of the peak: what is below at the ends is cut off
MARGIN = SAMPLE_RATE // 100  # samples kept around the rest
STRETCH = 0.1  # at most, of length and pitch together
TONE = 0.9  # at most: how much of the neighbouring sample is added or taken away, which colours the sound
NOISE = 0.3  # at most, of the sound's deviation


def trim(samples: np.ndarray) -> np.ndarray:
    """Cut off the quiet at both ends of a sound; the peak stays, so the rest is never empty or silent."""
    loud = np.flatnonzero(np.abs(samples) > QUIET * np.abs(samples).max())
    return samples[max(loud[0] - MARGIN, 0) : loud[-1] + 1 + MARGIN]


def loudest_second(samples: np.ndarray) -> int:
    """Where the second with the most energy begins: a sample number, 0 for a shorter sound."""
    energy = np.cumsum(np.concatenate([[0.0], samples.astype(np.float64) ** 2]))
    return int((energy[WINDOW:] - energy[:-WINDOW]).argmax()) if len(samples) > WINDOW else 0


def waveforms(sounds: Sequence[np.ndarray], generator: torch.Generator | None = None) -> Tensor:
    """Sounds of at most a second, [samples] each, as the model takes them: float32 [rows, WINDOW].

    Each stands in the middle of a second of silence. With ``generator`` it stands anywhere, a little faster or slower,
    brighter or duller, and in noise, as another microphone would have it.
    """
    rows = [torch.from_numpy(sound.astype(np.float32)) for sound in sounds]
    if generator is not None:
        rows = [_vary(row, generator) for row in rows]
    return torch.stack([prepare_waveform(_place(F.layer_norm(row, row.shape), generator)) for row in rows])


def _vary(row: Tensor, generator: torch.Generator) -> Tensor:
    stretch, tone = (2 * torch.rand(2, generator=generator, dtype=torch.float32, device="cpu") - 1).tolist()
    size = min(round(len(row) * (1 + STRETCH * stretch)), WINDOW)
    row = F.interpolate(row[None, None], size=size, mode="linear")[0, 0]
    return row + TONE * tone * F.pad(row, (1, 0))[:-1]


def _place(row: Tensor, generator: torch.Generator | None) -> Tensor:
    room = WINDOW - len(row)
    if generator is None:
        return F.pad(row, (room // 2, room - room // 2))
    start = int(torch.randint(room + 1, (), generator=generator, device="cpu"))
    loudness = NOISE * torch.rand((), generator=generator, dtype=torch.float32, device="cpu") ** 2
    return F.pad(row, (start, room - start)) + loudness * torch.randn(
        WINDOW, generator=generator, dtype=torch.float32, device="cpu"
    )
