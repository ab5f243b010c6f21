"""The adapters of text, image and audio: what turns a modality's input into tokens of the model's width, CLS first.

In a decoder an adapter holds positions alone. Parameter names are upstream's. Source: ONE-PEACE (arXiv 2305.11172),
section 3.1; hMLP stem: Touvron et al., arXiv 2203.09795; convolutional positions: data2vec (arXiv 2202.03555).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import describe, require, require_tensor
from onepeace_fast.config import AudioAdapterConfig, ImageAdapterConfig, TextAdapterConfig
from onepeace_fast.layers.adapter import (
    Adapter,
    Fault,
    SeriesAdapter,
    init_linear,
    init_truncated_normal,
    take,
    valid_from_padding,
    with_unread,
)
from onepeace_fast.relative_position import MAX_POSITIONS, grid_code_offset, grid_codes, grid_table_rows

PADDING_TOKEN = 1
TEXT_POSITIONS = 514
DECODER_AUDIO_POSITIONS = 1026
PATCH = 16


def accepted_floats(parameter: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes that a convolution takes: its weights', and under autocast the other ones too."""
    autocast = torch.is_autocast_enabled(parameter.device.type)
    others = (torch.float32, torch.float16, torch.bfloat16) if autocast else ()
    return tuple(dict.fromkeys((parameter.dtype, *others)))


class TextAdapter(SeriesAdapter):
    """Token embedding plus learned positions. ``vocab_size`` None: positions alone, for a decoder."""

    max_positions = TEXT_POSITIONS

    def __init__(
        self, config: TextAdapterConfig, embed_dim: int, heads: int, tables: int, vocab_size: int | None
    ) -> None:
        super().__init__(embed_dim, heads, tables, config.bucket_size)
        self.embed_positions = nn.Embedding(TEXT_POSITIONS, embed_dim)
        init_truncated_normal(self.embed_positions.weight)
        self.vocab_size = vocab_size
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, embed_dim, padding_idx=PADDING_TOKEN)
            init_truncated_normal(self.embed_tokens.weight)
            with torch.no_grad():
                self.embed_tokens.weight[PADDING_TOKEN].zero_()

    def position_table(self, width: int) -> Tensor:
        return self.embed_positions(torch.arange(width, device=self.cls_embedding.device))

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        require_tensor(name, value, (torch.int64, torch.int32), "[rows, length]", 2)
        limit = self.max_positions - 1
        require(value.shape[1] <= limit, f"{name}: got {value.shape[1]} tokens a row, takes at most {limit} beside CLS")
        return torch.cat([value.new_ones(value.shape[0], 1, dtype=torch.bool), value != PADDING_TOKEN], dim=1)

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        limit = self.vocab_size
        outside = ((value < 0) | (value >= limit)).sum()
        return [(outside, lambda n: f"{name}: got {n} token ids outside the vocabulary, takes 0 to {limit - 1}")]

    def tokens(self, value: Tensor) -> Tensor:
        """Embed int64 [rows, length] to [rows, 1 + length, embed_dim]."""
        if self.vocab_size is None:
            return with_unread(value, self.cls_embedding)
        return torch.cat([self.cls_embedding.expand(value.shape[0], -1, -1), self.embed_tokens(value)], dim=1)

    def place(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        return super().place(tokens, None) if ids is None else take(tokens, ids) + self.embed_positions(ids)


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of an image [batch, channels, height, width]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ImageAdapter(Adapter):
    """hMLP stem plus learned positions of a square grid. ``stem`` False: positions alone, for a decoder."""

    def __init__(self, config: ImageAdapterConfig, embed_dim: int, heads: int, tables: int, stem: bool) -> None:
        super().__init__(embed_dim, heads, tables, grid_table_rows(config.bias_grid))
        self.position_grid, self.bias_grid, self.stem = config.position_grid, config.bias_grid, stem
        self.pos_embed = nn.Parameter(init_truncated_normal(torch.empty(self.position_grid**2 + 1, embed_dim)))
        if stem:
            quarter = embed_dim // 4
            self.embed_images = nn.Sequential(
                nn.Conv2d(3, quarter, kernel_size=4, stride=4),
                ChannelLayerNorm(quarter),
                nn.GELU(),
                nn.Conv2d(quarter, quarter, kernel_size=2, stride=2),
                ChannelLayerNorm(quarter),
                nn.GELU(),
                nn.Conv2d(quarter, embed_dim, kernel_size=2, stride=2),
            )
            for module in self.embed_images:
                if isinstance(module, nn.Conv2d):
                    nn.init.zeros_(module.bias)

    def vector_index(self, width: int) -> Tensor:
        # Stride and offset of the codes are the table's own, so entries and table rows coincide.
        return torch.arange(grid_table_rows(self.bias_grid), device=self.pos_embed.device)

    def codes(self, width: int) -> Tensor:
        return grid_codes(round((width - 1) ** 0.5), self.bias_grid, self.pos_embed.device)

    def code_offset(self, width: int) -> int:
        return grid_code_offset(self.bias_grid)

    def position_table(self, width: int) -> Tensor:
        """Positions [width, embed_dim], resampled bicubically in float32 where the image has another grid."""
        grid, own = round((width - 1) ** 0.5), self.position_grid
        if grid == own:
            return self.pos_embed
        cls, patches = self.pos_embed[:1], self.pos_embed[1:]
        # As a matrix, since the gradient of interpolate is not summed in a fixed order on a GPU.
        unit = torch.eye(own * own, dtype=torch.float32, device=patches.device).view(1, own * own, own, own)
        weights = F.interpolate(unit, size=(grid, grid), mode="bicubic").view(own * own, grid * grid)
        with torch._C._DisableAutocast():
            resampled = weights.t() @ patches.float()
        return torch.cat([cls, resampled.to(patches.dtype)])

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        require_tensor(name, value, accepted_floats(self.cls_embedding), "[rows, 3, side, side]", 4)
        side, largest = value.shape[2], self.bias_grid * PATCH
        require(
            value.shape[1] == 3 and side == value.shape[3] and side > 0 and side % PATCH == 0,
            f"{name}: got {describe(value)}, takes a square [rows, 3, side, side] with side a multiple of {PATCH}",
        )
        require(
            not self.has_bias or side <= largest,
            f"{name}: got side {side}, takes at most {largest}: the bias table covers {self.bias_grid} patches",
        )
        return torch.ones(value.shape[0], 1 + (side // PATCH) ** 2, dtype=torch.bool, device=value.device)

    def tokens(self, value: Tensor) -> Tensor:
        """Embed [rows, 3, side, side] to [rows, 1 + patches, embed_dim]."""
        if not self.stem:
            return with_unread(value, self.cls_embedding)
        patches = self.embed_images(value).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_embedding.to(patches.dtype).expand(value.shape[0], -1, -1), patches], dim=1)


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
        for convolution, _, norm, activation in self.conv_layers:
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
        self.max_positions, self.extractor = MAX_POSITIONS, extractor
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
            self.embed_positions = PositionConvolutions(
                embed_dim, config.position_layers, config.position_width, config.position_groups
            )
            self.cls_pos_embed = nn.Parameter(init_truncated_normal(torch.empty(1, 1, embed_dim)))
        else:
            self.embed_positions = nn.Embedding(DECODER_AUDIO_POSITIONS, embed_dim)
            init_truncated_normal(self.embed_positions.weight)

    def frames(self, samples: int) -> int:
        """Frames that a waveform of this many samples has, CLS not counted; 0 or less where it is too short."""
        for _, kernel, stride in self.feature_layers:
            samples = (samples - kernel) // stride + 1
        return samples

    def position_table(self, width: int) -> Tensor:
        return self.embed_positions(torch.arange(width, device=self.cls_embedding.device))

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        require_tensor(name, value, accepted_floats(self.cls_embedding), "[rows, samples]", 2)
        frames = self.frames(value.shape[1])
        require(frames > 0, f"{name}: got {value.shape[1]} samples, takes enough for one frame of the extractor")
        limit = min(self.max_positions, MAX_POSITIONS) - 1
        require(frames <= limit, f"{name}: got {value.shape[1]} samples, {frames} frames, takes at most {limit} frames")
        device = self.cls_embedding.device
        return valid_from_padding(name, padding, value.shape[0], frames + 1, device, tokens="frames")

    def tokens(self, value: Tensor) -> Tensor:
        """Embed waveforms [rows, samples] to [rows, 1 + frames, embed_dim]; CLS has its own position already."""
        if not self.extractor:
            return with_unread(value, self.cls_embedding, self.mask_embedding)
        frames = self.embed_audios(value)
        cls = with_unread(self.cls_embedding + self.cls_pos_embed, self.mask_embedding)
        return torch.cat([cls.to(frames.dtype).expand(value.shape[0], -1, -1), frames], dim=1)

    def place(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        """Add the position convolutions over the padded batch, or over the kept frames side by side, as upstream does.

        A clip's embedding therefore depends on its padding.
        """
        if not self.extractor:
            return super().place(tokens, ids)
        kept = take(tokens, ids)
        cls, frames = kept[:, :1], kept[:, 1:]
        return torch.cat([cls, frames + self.embed_positions(frames)], dim=1)
