"""Text: token embeddings and learned positions (ONE-PEACE, arXiv 2305.11172, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onepeace_fast.checks import require_tensor
from onepeace_fast.config import TextAdapterConfig
from onepeace_fast.layers.adapters.adapter import Fault, SeriesAdapter, take
from onepeace_fast.layers.parameters import init_truncated_normal

PADDING_TOKEN = 1
TEXT_POSITIONS = 514


class TextAdapter(SeriesAdapter):
    """Token embedding plus learned positions. ``vocab_size`` None: positions alone, for a decoder."""

    max_positions = TEXT_POSITIONS

    def __init__(
        self, config: TextAdapterConfig, embed_dim: int, heads: int, tables: int, vocab_size: int | None
    ) -> None:
        super().__init__(embed_dim, heads, tables, config.bucket_size)
        self.embed_positions = nn.Embedding(TEXT_POSITIONS, embed_dim)
        init_truncated_normal(self.embed_positions.weight)
        if config.type_embedding:
            self.type_embedding = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.vocab_size, self.embeds = vocab_size, vocab_size is not None
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
        if value.shape[1] > limit:
            raise ValueError(f"{name}: expected at most {limit} tokens a row beside CLS, got {value.shape[1]}")
        return torch.cat([value.new_ones(value.shape[0], 1, dtype=torch.bool), value != PADDING_TOKEN], dim=1)

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        limit = self.vocab_size
        assert limit is not None  # a decoder's reads no token ids
        outside = ((value < 0) | (value >= limit)).sum()
        return [(outside, lambda n: f"{name}: expected token ids from 0 to {limit - 1}, got {n} others")]

    def tokens(self, value: Tensor) -> Tensor:
        """Embed int64 [rows, length] to [rows, 1 + length, embed_dim]."""
        return torch.cat([self.cls_embedding.expand(value.shape[0], -1, -1), self.embed_tokens(value)], dim=1)

    def place(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        return super().place(tokens, None) if ids is None else self.typed(take(tokens, ids) + self.embed_positions(ids))
