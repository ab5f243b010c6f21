"""Adapters: what turns a modality's input into tokens of the model's width, CLS first, with its positions and bias.

In a decoder an adapter holds positions alone. Parameter names are upstream's. Source: ONE-PEACE (arXiv 2305.11172),
section 3.1; hMLP stem: Touvron et al., arXiv 2203.09795; convolutional positions: data2vec (arXiv 2202.03555).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.config import AudioAdapterConfig, ImageAdapterConfig, TextAdapterConfig
from onepeace_fast.relative_position import (
    MAX_POSITIONS,
    dense_index,
    grid_code_offset,
    grid_codes,
    grid_table_rows,
    series_index,
    series_table_rows,
    series_vector_index,
)

PADDING_TOKEN = 1
TEXT_POSITIONS = 514
DECODER_AUDIO_POSITIONS = 1026
PATCH = 16


def init_truncated_normal(tensor: Tensor) -> Tensor:
    """Normal of deviation 0.02, cut at one deviation."""
    return nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Truncated normal weights, zero bias."""
    init_truncated_normal(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def take(x: Tensor, ids: Tensor | None) -> Tensor:
    """Rows ``ids`` [batch, kept] of x [batch, length, width]; all of them without ids.

    An embedding, since its gradient is summed in a fixed order on every device, also where ids repeat.
    """
    if ids is None:
        return x
    starts = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return F.embedding(ids + starts, x.flatten(0, 1))


class Adapter(nn.Module, ABC):
    """What all adapters share: a CLS embedding and the bias tables; ``tables`` of them, ``rows`` x ``heads`` each."""

    def __init__(self, embed_dim: int, heads: int, tables: int, rows: int) -> None:
        super().__init__()
        self.cls_embedding = nn.Parameter(init_truncated_normal(torch.empty(1, 1, embed_dim)))
        self._dense_index: Tensor | None = None
        if tables:
            self.rel_pos_table_list = nn.ModuleList(nn.Embedding(rows, heads) for _ in range(tables))
            for table in self.rel_pos_table_list:
                nn.init.zeros_(table.weight)

    @abstractmethod
    def vector_index(self, width: int) -> Tensor:
        """Table row of each entry of the bias vector for ``width`` positions: int64 [entries]."""

    def codes(self, width: int) -> Tensor | None:
        """Code of each position, int32 [width], or None where it is the position itself."""
        return None

    def code_offset(self, width: int) -> int:
        """Entry of the bias vector that belongs to equal codes."""
        return width - 1

    @abstractmethod
    def position_table(self, width: int) -> Tensor:
        """Learned position embeddings [width, embed_dim]."""

    def bias_vectors(self, width: int) -> list[Tensor]:
        """Every table expanded for ``width`` positions: [heads, entries] each, three CLS entries last."""
        index = self.vector_index(width)
        return [F.embedding(index, table.weight).t().contiguous() for table in self.rel_pos_table_list]

    def dense_table_index(self, width: int) -> Tensor:
        """Table row of every pair of ``width`` positions, as upstream's rp_bucket: int64 [width, width].

        The last one is kept, as upstream keeps its largest.
        """
        index = self.vector_index(width)
        kept = self._dense_index
        if kept is not None and kept.shape[0] == width and kept.device == index.device:
            return kept
        position = torch.arange(width, device=index.device)
        codes = self.codes(width)
        code = position if codes is None else codes
        self._dense_index = index[dense_index(code, position == 0, self.code_offset(width), index.shape[0])]
        return self._dense_index

    @property
    def has_bias(self) -> bool:
        """Whether this modality has a relative position bias."""
        return hasattr(self, "rel_pos_table_list")

    def reset_tables(self) -> None:
        """Recompute what follows from the configuration alone and no checkpoint holds."""
        self._dense_index = None


class SeriesAdapter(Adapter):
    """An adapter of a 1-D series: distances are bucketed, exact up to half the bucket size, logarithmic beyond."""

    def __init__(self, embed_dim: int, heads: int, tables: int, bucket_size: int) -> None:
        super().__init__(embed_dim, heads, tables, series_table_rows(bucket_size))
        self.bucket_size = bucket_size
        self.register_buffer("series_index", series_index(bucket_size), persistent=False)

    def vector_index(self, width: int) -> Tensor:
        return series_vector_index(self.series_index, self.bucket_size, width)

    def reset_tables(self) -> None:
        super().reset_tables()
        self.series_index.copy_(series_index(self.bucket_size))


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
        return self.embed_positions.weight[:width]

    def forward(self, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embed int64 [batch, length] to [batch, 1 + length, embed_dim]; with ``ids`` only those positions."""
        rows, length = tokens.shape
        embedded = torch.cat([self.cls_embedding.expand(rows, -1, -1), self.embed_tokens(tokens)], dim=1)
        position = torch.arange(length + 1, device=tokens.device).expand(rows, -1) if ids is None else ids
        return take(embedded, ids) + self.embed_positions(position)


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
        self.position_grid, self.bias_grid = config.position_grid, config.bias_grid
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
        unit = torch.eye(own * own, device=patches.device).view(1, own * own, own, own)
        weights = F.interpolate(unit, size=(grid, grid), mode="bicubic").view(own * own, grid * grid)
        with torch._C._DisableAutocast():
            resampled = weights.t() @ patches.float()
        return torch.cat([cls, resampled.to(patches.dtype)])

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embed [batch, 3, side, side] to [batch, 1 + (side / 16)**2, embed_dim]; with ``ids`` only those positions."""
        patches = self.embed_images(images).flatten(2).transpose(1, 2)
        rows = images.shape[0]
        embedded = torch.cat([self.cls_embedding.to(patches.dtype).expand(rows, -1, -1), patches], dim=1)
        positions = self.position_table(embedded.shape[1]).expand(rows, -1, -1)
        return take(embedded, ids) + take(positions, ids)


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

    def __init__(self, config: AudioAdapterConfig, embed_dim: int, heads: int, tables: int, extractor: bool) -> None:
        super().__init__(embed_dim, heads, tables, config.bucket_size)
        self.feature_layers = config.feature_layers
        self.max_positions = MAX_POSITIONS
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
        return self.embed_positions.weight[:width]

    def forward(self, waveforms: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embed [batch, samples] to [batch, 1 + frames, embed_dim]; with ``ids`` only those positions, CLS first.

        The position convolutions see the padded batch, or the kept frames side by side, as upstream's do: a clip's
        embedding depends on its padding.
        """
        rows = waveforms.shape[0]
        frames = take(self.embed_audios(waveforms), None if ids is None else ids[:, 1:] - 1)
        positions = self.embed_positions(frames)
        cls = (self.cls_embedding + self.cls_pos_embed).to(frames.dtype).expand(rows, -1, -1)
        return torch.cat([cls, frames + positions], dim=1)
