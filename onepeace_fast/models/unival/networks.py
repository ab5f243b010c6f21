"""The networks that make feature maps: ResNet of images, 3-D ResNeXt of videos, CNN14 of waveforms.

Parameters and running statistics have upstream's names, which are those of timm's ResNet (He et al., arXiv 1512.03385,
with the stride in the 3 x 3 convolution), of the 3-D ResNeXt (Hara et al., arXiv 1711.09577) and of PANNs (Kong et al.,
arXiv 1912.10211).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.spectrogram import MEL_BINS, log_mel

GROUPS = 32  # of the 3-D ResNeXt's convolutions
CLASSES = 1000  # of the classifier that upstream keeps in its ResNet, and never calls
CONVOLUTIONS: dict[int, tuple[type[Any], type[Any], type[Any]]] = {
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d), 3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d),
}  # fmt: skip
# In training each spectrogram loses so many stripes of less than so many frames, and of mel bins (arXiv 1904.08779).
STRIPES, STRIPE_FRAMES, STRIPE_BINS = 2, 64, 8
BLOCK_DROPOUT = 0.2


def network(name: str, config: UnivalConfig) -> nn.Module:
    """The network of a modality."""
    width = config.feature_channels // 32
    if name == "image":
        return ImageNetwork(config.image_blocks, width)
    return VideoNetwork(config.video_blocks, width) if name == "video" else AudioNetwork(width, config.audio_hop)


class Bottleneck(nn.Module):
    """x + three convolutions, of 1, 3 and 1 to a side, each with a BatchNorm."""

    def __init__(self, dims: int, given: int, inner: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        conv, norm, _ = CONVOLUTIONS[dims]
        self.conv1, self.bn1 = conv(given, inner, 1, bias=False), norm(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, 1, groups=groups, bias=False), norm(inner)
        self.conv3, self.bn3 = conv(inner, out, 1, bias=False), norm(out)
        self.downsample = None
        if stride != 1 or given != out:
            self.downsample = nn.Sequential(conv(given, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, given, ...] to [rows, out, ...]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResidualNetwork(nn.Module):
    """A stem and numbered stages of bottlenecks; each but the first halves the sides and doubles the width.

    Args:
        dims: 2 for images, 3 for videos, whose first convolution keeps all frames.
        blocks: bottlenecks of each stage.
        width: channels of the stem.
        inner: channels inside a bottleneck of the first stage; four times ``width`` come out of it.
        groups: of the convolutions of 3 to a side.
    """

    def __init__(self, dims: int, blocks: Sequence[int], width: int, inner: int, groups: int = 1) -> None:
        super().__init__()
        conv, norm, pool = CONVOLUTIONS[dims]
        self.conv1, self.bn1 = conv(3, width, 7, (1, 2, 2) if dims == 3 else 2, 3, bias=False), norm(width)
        self.maxpool = pool(3, 2, 1)
        self.stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        given = width
        for stage, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            out, stride = 4 * width << stage, 1 if stage == 0 else 2
            self.add_module(name, nn.Sequential(*(
                Bottleneck(dims, out if block else given, inner << stage, out, 1 if block else stride, groups)
                for block in range(count)
            )))  # fmt: skip
            given = out

    def forward(self, x: Tensor) -> Tensor:
        """[rows, 3, height, width], or [rows, 3, frames, height, width], to its feature map."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype)))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x


class ImageNetwork(ResidualNetwork):
    """ResNet; starts as timm's does, whose blocks give what they take."""

    def __init__(self, blocks: Sequence[int], width: int) -> None:
        super().__init__(2, blocks, width, width)
        self.fc = nn.Linear(4 * width << len(blocks) - 1, CLASSES).requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


class VideoNetwork(ResidualNetwork):
    """3-D ResNeXt; starts as upstream's does, which counts no depth of a kernel."""

    def __init__(self, blocks: Sequence[int], width: int) -> None:
        super().__init__(3, blocks, width, 2 * width, GROUPS)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                area = module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=math.sqrt(2 / (area * module.out_channels)))


class Convolutions(nn.Module):
    """Two convolutions of 3 x 3, each with a BatchNorm, and the mean over squares."""

    def __init__(self, given: int, out: int, pool: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.pool = pool
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, given, frames, bins] to [rows, out, frames // pool, bins // pool]."""
        x = F.relu(self.bn1(self.conv1(x)))
        return F.avg_pool2d(F.relu(self.bn2(self.conv2(x))), self.pool)


class AudioNetwork(nn.Module):
    """CNN14 without its classifier, over the log-mel spectrogram of a waveform."""

    def __init__(self, width: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        self.bn0 = nn.BatchNorm2d(MEL_BINS)
        widths = [1, *(width << block for block in range(6))]
        self.blocks = [f"conv_block{block}" for block in range(1, 7)]
        for place, name in enumerate(self.blocks):
            self.add_module(name, Convolutions(widths[place], widths[place + 1], 2 if place < 5 else 1))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, samples] to [rows, channels, frames // 32, 2]."""
        x = log_mel(x, self.hop, self.bn0.weight.dtype)
        x = self.bn0(x.transpose(1, 2)[..., None]).transpose(1, 3)
        if self.training:
            x = without_stripes(without_stripes(x, 2, STRIPE_FRAMES), 3, STRIPE_BINS)
        for name in self.blocks[:-1]:
            x = F.dropout(self.get_submodule(name)(x), BLOCK_DROPOUT, self.training)
        return self.get_submodule(self.blocks[-1])(x)


def without_stripes(x: Tensor, dim: int, width: int) -> Tensor:
    """x [rows, 1, frames, bins] with two stripes of zeros across ``dim``, each of less than ``width``, drawn by row."""
    size = x.shape[dim]
    drawn = torch.rand(2, x.shape[0], STRIPES, 1, device=x.device)
    lengths = (drawn[0] * min(width, size)).floor()
    starts = (drawn[1] * (size - lengths)).floor()
    place = torch.arange(size, device=x.device)
    hidden = ((place >= starts) & (place < starts + lengths)).any(1)  # [rows, size]
    return x.masked_fill(hidden[:, None, :, None] if dim == 2 else hidden[:, None, None], 0)
