"""What UnIVAL's encoder and decoder share: tables of positions and of relative biases, and their norms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.layers.derived import DerivedBuffers
from onepeace_fast.layers.plain import embedding_table
from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.layers import PaddedRoute, Route
from onepeace_fast.models.unival.layout import Packed, Padded
from onepeace_fast.models.unival.noise import Noise, draw
from onepeace_fast.relative_position import CLS_ENTRIES, grid_table_rows, series_index

Layout: TypeAlias = Packed | Padded


class Stack(DerivedBuffers):
    """Positions, and the bias of distances of each layer."""

    token_index: Tensor

    def __init__(self, config: UnivalConfig, layers: int, positions: int) -> None:
        super().__init__()
        dim, side, heads = config.embed_dim, config.image_bucket_size, config.attention_heads
        self.config = config
        self.layernorm_embedding = nn.LayerNorm(dim)
        self.embed_positions = nn.Embedding(positions + 2, dim)
        self.embed_image_positions = nn.Embedding(side**2 + 1, dim)
        self.pos_ln, self.image_pos_ln = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.layer_norm = nn.LayerNorm(dim)
        tokens = 2 * config.token_bucket_size - 1
        self.token_rel_pos_table_list = nn.ModuleList(nn.Embedding(tokens, heads) for _ in range(layers))
        self.image_rel_pos_table_list = nn.ModuleList(nn.Embedding(grid_table_rows(side), heads) for _ in range(layers))
        self.add_derived("token_index", partial(series_index, config.token_bucket_size))

    def noises(self, layout: Layout, branches: int, drop_path_rate: float, device: torch.device) -> list[Noise]:
        """What training adds to each layer; nothing in evaluation mode."""
        config, layers = self.config, len(self.token_rel_pos_table_list)
        if not self.training:
            return [Noise()] * layers
        return draw(
            config.dropout, config.activation_dropout, drop_path_rate, layers, branches, layout.samples, layout.sample,
            device,
        )  # fmt: skip

    def attending(self, routes: Sequence[Route]) -> list[Route]:
        """Routes with what training adds to attention; packed ones take none of it."""
        dropout = self.config.attention_dropout if self.training else 0.0
        return [route._replace(dropout=dropout) if isinstance(route, PaddedRoute) else route for route in routes]

    def dropped(self, x: Tensor) -> Tensor:
        """Embedded tokens, in training with dropout."""
        return F.dropout(x, self.config.dropout, self.training)

    def position_table(self, name: str) -> nn.Embedding:
        """The positions of a modality."""
        kind = {"text": "", "code": "image_"}.get(name, f"{name}_")
        return self.get_submodule(f"embed_{kind}positions")  # type: ignore[return-value]

    def places(self, layout: Layout) -> Tensor:
        """The normalised position of each place, [places, dim]; biases are made of them, tokens get nothing."""
        return torch.cat([
            layout.norm(
                self.position_table(name)(tokens.table_rows),
                self.pos_ln if name == "text" else self.image_pos_ln,
            )
            for name, tokens in layout.tokens.items()
        ])  # fmt: skip

    def vectors(self, layout: Layout) -> list[list[Tensor]]:
        """For each layer the relative bias of each modality, [heads, entries]."""
        pairs: Any = zip(self.token_rel_pos_table_list, self.image_rel_pos_table_list, strict=True)
        return [
            [
                self.text_vector(text, x.code_offset + 1) if name == "text" else self.image_vector(image)
                for name, x in layout.tokens.items()
            ]
            for text, image in pairs
        ]

    def image_vector(self, table: nn.Module) -> Tensor:
        """The bias of images by a layer's table, [heads, entries]."""
        return embedding_table(table, grid_table_rows(self.config.image_bucket_size)).t().contiguous()

    def text_vector(self, table: nn.Module, length: int) -> Tensor:
        """The bias of texts of a length by a layer's table, [heads, entries], of equal places in entry length - 1."""
        centre, reach = self.token_index.shape[0] // 2, length - 1
        rows = self.token_index[centre - reach : centre + reach + 1]
        # An embedding, since its gradient is summed in a fixed order on every device.
        return F.pad(table(rows), (0, 0, 0, CLS_ENTRIES)).t().contiguous()
