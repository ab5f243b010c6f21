"""Audio: strided convolutions over the waveform, and convolutions as positions (data2vec, arXiv 2202.03555)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import require, require_tensor
from onepeace_fast.config import AudioAdapterConfig
from onepeace_fast.layers.adapters.adapter import SeriesAdapter, accepted_floats, take, valid_from_padding
from onepeace_fast.layers.parameters import init_linear, init_truncated_normal, with_unread
from onepeace_fast.relative_position import MAX_POSITIONS

DECODER_AUDIO_POSITIONS = 1026


def frames_of(samples: int, layers: tuple[tuple[int, int, int], ...]) -> int:
    """Frames that convolutions (channels, kernel, stride) make of a waveform; 0 or less where it is too short."""
    for _, kernel, stride in layers:
        samples = (samples - kernel) // stride + 1
    return samples


class FeatureExtractor(nn.Module):
    """Strided 1-D convolutions over a waveform, each followed by LayerNorm and GELU."""

    def __init__(self, layers: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        channels_in, blocks = 1, []
        for channels, kernel, stride in layers:
            convolution = nn.Conv1d(channels_in, channels, kernel, stride=stride, bias=False)
            nn.init.kaiming_normal_(convolution.weight)
            # Identities keep upstream's numbering: convolution 0, LayerNorm 2.1.
            norm = nn.Sequential(nn.Identity(), nn.LayerNorm(channels))
            blocks.append(nn.Sequential(convolution, nn.Identity(), norm, nn.GELU()))
            channels_in = channels
        self.conv_layers = nn.ModuleList(blocks)

    def forward(self, waveforms: Tensor) -> Tensor:
        """[batch, samples] to [batch, frames, channels]."""
        x = waveforms.unsqueeze(1)
        block: Any
        for block in self.conv_layers:
            convolution, _, norm, activation = block
            x = activation(norm(convolution(x).transpose(1, 2)).transpose(1, 2))
        return x.transpose(1, 2)


class PositionConvolutions(nn.Module):
    """Grouped convolutions over frames whose output serves as position embedding; LayerNorm without affine, GELU."""

    def __init__(self, embed_dim: int, layers: int, width: int, groups: int) -> None:
        super().__init__()
        self.kernel = max(3, width // layers)
        self.layers = layers
        for layer in range(1, layers + 1):
            convolution = nn.Conv1d(embed_dim, embed_dim, self.kernel, padding=self.kernel // 2, groups=groups)
            self.add_module(str(layer), nn.Sequential(convolution))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, frames, embed_dim] to the same shape; no frames at all stay none."""
        if not x.shape[1]:
            return x
        for layer in range(1, self.layers + 1):
            frames = x.shape[1]
            x = self.get_submodule(str(layer))(x.transpose(1, 2))[..., :frames].transpose(1, 2)
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
        return x


class AudioAdapter(SeriesAdapter):
    """Convolutional features plus convolutional positions; without ``extractor`` learned positions, for a decoder."""

    takes_padding = True

    def __init__(self, config: AudioAdapterConfig, embed_dim: int, heads: int, tables: int, extractor: bool) -> None:
        super().__init__(embed_dim, heads, tables, config.bucket_size)
        self.feature_layers = config.feature_layers
        self.max_positions, self.embeds = MAX_POSITIONS, extractor
        # Upstream's checkpoints hold this parameter although no forward pass reads it.
        self.mask_embedding = nn.Parameter(init_truncated_normal(torch.empty(1, embed_dim)))
        if extractor:
            channels = self.feature_layers[-1][0]
            self.embed_audios = nn.Sequential(
                FeatureExtractor(self.feature_layers),
                nn.Identity(),
                nn.LayerNorm(channels),
                init_linear(nn.Linear(channels, embed_dim)),
            )
            self.embed_positions: nn.Module = PositionConvolutions(
                embed_dim, config.position_layers, config.position_width, config.position_groups
            )
            self.cls_pos_embed = nn.Parameter(init_truncated_normal(torch.empty(1, 1, embed_dim)))
        else:
            positions = nn.Embedding(DECODER_AUDIO_POSITIONS, embed_dim)
            init_truncated_normal(positions.weight)
            self.embed_positions = positions

    def frames(self, samples: int) -> int:
        """Frames that a waveform of this many samples has, CLS not counted; 0 or less where it is too short."""
        return frames_of(samples, self.feature_layers)

    def position_table(self, width: int) -> Tensor:
        return self.embed_positions(torch.arange(width, device=self.cls_embedding.device))

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        require_tensor(name, value, accepted_floats(self.cls_embedding), "[rows, samples]", 2)
        frames = self.frames(value.shape[1])
        require(frames > 0, f"{name}: expected samples for one frame at least, got {value.shape[1]}")
        limit = min(self.max_positions, MAX_POSITIONS) - 1
        require(frames <= limit, f"{name}: expected at most {limit} frames, got {frames} of {value.shape[1]} samples")
        device = self.cls_embedding.device
        return valid_from_padding(name, padding, value.shape[0], frames + 1, device, tokens="frames")

    def tokens(self, value: Tensor) -> Tensor:
        """Embed waveforms [rows, samples] to [rows, 1 + frames, embed_dim]; CLS has its own position already."""
        frames = self.embed_audios(value)
        cls = with_unread(self.cls_embedding + self.cls_pos_embed, self.mask_embedding)
        return torch.cat([cls.to(frames.dtype).expand(value.shape[0], -1, -1), frames], dim=1)

    def place(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        """Add the position convolutions over the padded batch or, as upstream, over the visible frames side by side.

        A clip's embedding therefore depends on its padding.
        """
        if not self.embeds:
            return super().place(tokens, ids)
        visible = take(tokens, ids)
        cls, frames = visible[:, :1], visible[:, 1:]
        return torch.cat([cls, frames + self.embed_positions(frames)], dim=1)
