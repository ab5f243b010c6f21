"""A UnIVAL small enough for a CPU, with two convolutional stems that make its feature maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onepeace_fast.data.audio import SAMPLE_RATE
from onepeace_fast.models.unival import Trie, Unival, UnivalConfig
from onepeace_fast.remembered import remembered

WIDTH, CHANNELS, LAYERS = 64, 32, 2
BANDS, FOURIER, HOP = 32, 512, 320  # of the log-mel map; a column is 20 ms
COLUMNS = 48


class Batch(NamedTuple):
    """Texts, and what they are about: pictures [rows, 1, SIDE, SIDE], log-mel maps [rows, 1, BANDS, COLUMNS]."""

    source: Tensor
    target: Tensor
    inputs: Mapping[str, Tensor]
    samples: Mapping[str, Sequence[int]]  # of each row of the inputs


class DigitModel(nn.Module):
    """Stems and UnIVAL: maps of 4 x 4 positions of an image, of 2 x 6 of a sound."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stems = nn.ModuleDict({"image": _stem((2, 2), (2, 2), (2, 2)), "audio": _stem((4, 2), (2, 2), (2, 2))})
        self.unival = Unival(
            UnivalConfig(
                vocab_size=vocabulary,
                embed_dim=WIDTH,
                ffn_dim=2 * WIDTH,
                attention_heads=4,
                encoder_layers=LAYERS,
                decoder_layers=LAYERS,
                token_bucket_size=8,
                image_bucket_size=8,
                max_source_positions=16,
                max_target_positions=16,
                code_image_size=8,
                feature_channels=CHANNELS,
                video=False,
            )
        )
        with torch.no_grad():
            for module in self.unival.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.weight *= (768 / WIDTH) ** 0.5  # the initial weights suit the width of 768

    def maps(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The feature maps of what is seen and heard."""
        return {name: self.stems[name](x) for name, x in inputs.items()}

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the texts' tokens."""
        return self.unival.loss(batch.source, batch.target, samples=batch.samples, **self.maps(batch.inputs))

    @torch.no_grad()
    def write(self, batch: Batch, answers: Trie | None) -> list[list[int]]:
        """The most likely text of each sample, token by token."""
        found = self.unival.generate(
            batch.source, beams=1, max_length=8, answers=answers, samples=batch.samples, **self.maps(batch.inputs)
        )
        return [own[0].tokens for own in found]


def _stem(*strides: tuple[int, int]) -> nn.Sequential:
    widths = (1, CHANNELS // 2, CHANNELS, CHANNELS)
    convolutions = [
        nn.Conv2d(a, b, 5, stride, padding=2) for a, b, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    for one in convolutions:
        nn.init.kaiming_normal_(one.weight)
        nn.init.zeros_(one.bias)  # type: ignore[arg-type]  # it has one
    return nn.Sequential(*(part for one in convolutions for part in (one, nn.GELU())))


def log_mel(waveforms: Tensor) -> Tensor:
    """Waveforms [rows, samples] as maps [rows, 1, BANDS, COLUMNS], low tones first, with mean 0 and deviation 1."""
    window = torch.hann_window(FOURIER, device=waveforms.device)
    power = torch.stft(waveforms, FOURIER, HOP, window=window, return_complex=True).abs() ** 2
    level = (_bands().to(power) @ power[:, :, :COLUMNS]).clamp(min=1e-6).log()
    return nn.functional.layer_norm(level, level.shape[1:])[:, None]


@remembered
def _bands() -> Tensor:
    """Triangles that are evenly spaced in mel, [BANDS, FOURIER // 2 + 1]."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2, device="cpu") / 2595) - 1)
    tones = torch.linspace(0, SAMPLE_RATE / 2, FOURIER // 2 + 1, device="cpu")
    low, middle, high = (edges[start : start + BANDS, None] for start in range(3))
    return torch.minimum((tones - low) / (middle - low), (high - tones) / (high - middle)).clamp(min=0)
