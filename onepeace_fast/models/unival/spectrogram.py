"""Log-mel spectrograms as PANNs' CNN14 takes them (Kong et al., arXiv 1912.10211)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.remembered import remembered

RATE, WINDOW, MEL_BINS = 48_000, 1024, 64  # samples a second, samples of a frame, rows of a spectrogram
LOWEST, HIGHEST = 50.0, 14_000.0  # Hz
LEAST_POWER = 1e-10
ON_CPU: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the process's defaults are
# Slaney's scale (Auditory Toolbox, 1998): mels of 200/3 Hz up to 1 kHz, from there 27 to a factor of 6.4.
_HERTZ, _BREAK, _LOG_STEP = 200 / 3, 1000.0, math.log(6.4) / 27


def to_mel(hertz: float) -> float:
    """Hz to mels."""
    return hertz / _HERTZ if hertz < _BREAK else _BREAK / _HERTZ + math.log(hertz / _BREAK) / _LOG_STEP


def to_hertz(mel: Tensor) -> Tensor:
    """Mels to Hz."""
    steps = (mel - _BREAK / _HERTZ).clamp(min=0)
    return torch.where(mel < _BREAK / _HERTZ, mel * _HERTZ, _BREAK * (steps * _LOG_STEP).exp())


def mel_filters() -> Tensor:
    """Triangles over frequencies, evenly placed on the scale, each of area 1: float64 [frequencies, bins]."""
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, **ON_CPU)[:, None]
    corners = to_hertz(torch.linspace(to_mel(LOWEST), to_mel(HIGHEST), MEL_BINS + 2, **ON_CPU))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (high - low))


def hann() -> Tensor:
    """The window, float64 [WINDOW]."""
    return torch.hann_window(WINDOW, **ON_CPU)


@remembered
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return hann().to(device, dtype), mel_filters().to(device, dtype)


def log_mel(waveform: Tensor, hop: int, dtype: torch.dtype) -> Tensor:
    """10 log10 of max(1e-10, mel power): [rows, samples] to [rows, samples // hop + 1, bins] in ``dtype``.

    Frame i is centred at sample i * hop; the ends are reflected. It is computed in float32 at least.
    """
    wide = torch.promote_types(torch.float32, dtype)
    with torch.autocast(waveform.device.type, enabled=False):
        window, filters = _constants(wide, waveform.device)
        spectrum = torch.stft(
            waveform.to(wide), WINDOW, hop, window=window, center=True, pad_mode="reflect", return_complex=True
        )
        power = torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)
        return (10 * (power @ filters).clamp(min=LEAST_POWER).log10()).to(dtype)


def fourier() -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the windowed discrete Fourier transform, float64 [frequencies, 1, WINDOW]."""
    place = torch.arange(WINDOW, **ON_CPU)
    turn = -2 * torch.pi / WINDOW * (place[: WINDOW // 2 + 1, None] * place % WINDOW)
    return (turn.cos() * hann())[:, None], (turn.sin() * hann())[:, None]
