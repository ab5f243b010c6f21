"""Images: the hMLP stem over patches (Touvron et al., arXiv 2203.09795) and learned positions of a square grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import describe, require, require_tensor
from onepeace_fast.config import ImageAdapterConfig
from onepeace_fast.layers.adapters.adapter import Adapter, accepted_floats
from onepeace_fast.layers.parameters import init_truncated_normal
from onepeace_fast.relative_position import grid_code_offset, grid_codes, grid_table_rows

PATCH = 16


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of an image [batch, channels, height, width]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ImageAdapter(Adapter):
    """hMLP stem plus learned positions of a square grid. ``stem`` False: positions alone, for a decoder."""

    channels = stem_channels = 3  # of the input, and of what the stem makes of it

    def __init__(self, config: ImageAdapterConfig, embed_dim: int, heads: int, tables: int, stem: bool) -> None:
        super().__init__(embed_dim, heads, tables, grid_table_rows(config.bias_grid))
        self.position_grid, self.bias_grid, self.embeds = config.position_grid, config.bias_grid, stem
        self.pos_embed = nn.Parameter(init_truncated_normal(torch.empty(self.position_grid**2 + 1, embed_dim)))
        self.type_embedding_2: nn.Parameter | None = None
        if config.type_embedding:
            self.type_embedding, self.type_embedding_2 = (nn.Parameter(torch.zeros(1, 1, embed_dim)) for _ in range(2))
        if stem:
            quarter = embed_dim // 4
            self.embed_images = nn.Sequential(
                nn.Conv2d(self.stem_channels, quarter, kernel_size=4, stride=4),
                ChannelLayerNorm(quarter),
                nn.GELU(),
                nn.Conv2d(quarter, quarter, kernel_size=2, stride=2),
                ChannelLayerNorm(quarter),
                nn.GELU(),
                nn.Conv2d(quarter, embed_dim, kernel_size=2, stride=2),
            )
            for module in self.embed_images:
                if isinstance(module, nn.Conv2d) and module.bias is not None:
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
        layout = f"[rows, {self.channels}, side, side]"
        require_tensor(name, value, accepted_floats(self.cls_embedding), layout, 4)
        side, largest = value.shape[2], self.bias_grid * PATCH
        require(
            value.shape[1] == self.channels and side == value.shape[3] and side > 0 and side % PATCH == 0,
            f"{name}: expected a square {layout} with side a multiple of {PATCH}, got {describe(value)}",
        )
        require(
            not self.has_bias or side <= largest,
            f"{name}: expected a side of at most {largest}, got {side}: the bias table covers {self.bias_grid} patches",
        )
        return torch.ones(value.shape[0], 1 + (side // PATCH) ** 2, dtype=torch.bool, device=value.device)

    def tokens(self, value: Tensor) -> Tensor:
        """Embed [rows, channels, side, side] to [rows, 1 + patches, embed_dim]."""
        patches = self.embed_images(value).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_embedding.to(patches.dtype).expand(value.shape[0], -1, -1), patches], dim=1)
