"""The networks of UnIVAL's feature maps by their formulas, offset by offset, from a state dict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def patches(x: Tensor, size: int, stride: Sequence[int], padding: int, fill: float = 0.0) -> list[Tensor]:
    """x [rows, channels, ...] at each offset of a window, row by row of its offsets."""
    dims = x.dim() - 2
    x = F.pad(x, (padding, padding) * dims, value=fill)
    extents = [(extent - size) // step + 1 for extent, step in zip(x.shape[2:], stride, strict=True)]
    found = []
    for offset in itertools.product(range(size), repeat=dims):
        own = x
        for dim, (start, step, extent) in enumerate(zip(offset, stride, extents, strict=True)):
            own = own.narrow(2 + dim, start, step * (extent - 1) + 1)
            own = own[(slice(None),) * (2 + dim) + (slice(None, None, step),)]
        found.append(own)
    return found


def convolution(x: Tensor, weight: Tensor, stride: Sequence[int], padding: int, groups: int = 1) -> Tensor:
    """The sum over offsets and channels of a group."""
    kernel = weight.flatten(2).unflatten(0, (groups, -1))  # [groups, out, in, offsets]
    own = torch.stack(patches(x, weight.shape[2], stride, padding), -1).unflatten(1, (groups, -1))
    return torch.einsum("ngc...k,gock->ngo...", own, kernel).flatten(1, 2)


def norm(x: Tensor, state: State, name: str) -> Tensor:
    """BatchNorm by running statistics."""
    mean, variance, weight, bias = (
        state[f"{name}.{key}"].view(-1, *[1] * (x.dim() - 2))
        for key in ("running_mean", "running_var", "weight", "bias")
    )  # fmt: skip
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def bottleneck(x: Tensor, state: State, name: str, stride: int, groups: int) -> Tensor:
    dims = x.dim() - 2
    y = norm(convolution(x, state[f"{name}.conv1.weight"], [1] * dims, 0), state, f"{name}.bn1").relu()
    y = norm(convolution(y, state[f"{name}.conv2.weight"], [stride] * dims, 1, groups), state, f"{name}.bn2").relu()
    y = norm(convolution(y, state[f"{name}.conv3.weight"], [1] * dims, 0), state, f"{name}.bn3")
    if f"{name}.downsample.0.weight" in state:
        x = norm(
            convolution(x, state[f"{name}.downsample.0.weight"], [stride] * dims, 0), state, f"{name}.downsample.1"
        )
    return (x + y).relu()


def residual_network(x: Tensor, state: State, blocks: Sequence[int], groups: int) -> Tensor:
    """ResNet, or the 3-D ResNeXt where x has frames."""
    dims = x.dim() - 2
    x = norm(convolution(x, state["conv1.weight"], [2, 2] if dims == 2 else [1, 2, 2], 3), state, "bn1").relu()
    x = torch.stack(patches(x, 3, [2] * dims, 1, -math.inf)).amax(0)
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            x = bottleneck(x, state, f"layer{stage + 1}.{block}", stride, groups)
    return x


def log_mel(waveform: Tensor, hop: int) -> Tensor:
    """[rows, samples] to [rows, frames, bins], frame by frame and bin by bin."""
    place = torch.arange(1024, dtype=torch.float64)
    window = 0.5 - 0.5 * (2 * math.pi * place / 1024).cos()
    turns = 2 * math.pi * torch.arange(513, dtype=torch.float64)[:, None] * place / 1024
    x = torch.cat([waveform[:, 1:513].flip(1), waveform, waveform[:, -513:-1].flip(1)], 1)
    frames = torch.stack([x[:, hop * i : hop * i + 1024] for i in range(waveform.shape[1] // hop + 1)], 1) * window
    power = (frames @ turns.cos().t()) ** 2 + (frames @ turns.sin().t()) ** 2
    filters = [[triangle(k * 48000 / 1024, m) for m in range(64)] for k in range(513)]
    mel = power @ torch.tensor(filters, dtype=torch.float64)
    return 10 * mel.clamp(min=1e-10).log10()


def corner(place: int) -> float:
    """Hz of a filter's corner: evenly placed mels from 50 Hz to 14 kHz."""
    low, high = 50 * 3 / 200, 15 + 27 * math.log(14) / math.log(6.4)
    mel = low + (high - low) * place / 65
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def triangle(hertz: float, m: int) -> float:
    """The weight of a frequency in a bin."""
    low, middle, high = (corner(m + i) for i in range(3))
    if hertz <= middle:
        return 2 / (high - low) * max(0.0, (hertz - low) / (middle - low))
    return 2 / (high - low) * max(0.0, (high - hertz) / (high - middle))


def audio_network(waveform: Tensor, state: State, hop: int) -> Tensor:
    """CNN14 without its classifier."""
    x = norm(log_mel(waveform, hop).transpose(1, 2)[..., None], state, "bn0").transpose(1, 3)
    for block in range(1, 7):
        for i in (1, 2):
            name = f"conv_block{block}"
            x = norm(convolution(x, state[f"{name}.conv{i}.weight"], [1, 1], 1), state, f"{name}.bn{i}").relu()
        if block < 6:
            x = torch.stack(patches(x, 2, [2, 2], 0)).mean(0)
    return x
