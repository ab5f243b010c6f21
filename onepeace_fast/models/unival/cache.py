"""Writing token by token: keys and values of what was written, and of what the encoder saw, are kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.attention_structures import Segments, equal_segments
from onepeace_fast.models.unival.decoder import Decoder
from onepeace_fast.models.unival.encoder import Encoded
from onepeace_fast.models.unival.inputs import Tokens
from onepeace_fast.models.unival.layout import Packed, Padded
from onepeace_fast.ops import relative_bias_attention


class Written:
    """A layer's keys and values of the tokens so far, and attention of the next one to them.

    Each text in work is a sample with one query. ``start`` gives what all layers share.
    """

    def __init__(self, vector: Tensor, code_offset: int) -> None:
        self.vector, self.code_offset = vector, code_offset
        self.keys: Tensor | None = None  # [texts, tokens, heads, 2 head_dim]
        self.values: Tensor | None = None  # [texts, tokens, heads, head_dim]

    def start(self, query_place: Tensor, key_place: Tensor, segments: Segments, keys: Segments) -> None:
        """Take the next token's place, [heads, head_dim] of query and key, and its segments."""
        self._query_place, self._key_place, self._segments, self._key_segments = query_place, key_place, segments, keys

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, head_scale: Tensor) -> Tensor:
        """[texts, dim] of the new tokens, whose keys and values are kept."""
        assert k is not None and v is not None
        q, k, v = (x.unflatten(1, self._query_place.shape) for x in (q, k, v))
        q, k = (torch.cat([x, y.expand_as(x)], 2) for x, y in ((q, self._query_place), (k, self._key_place)))
        self.keys, self.values = (
            new[:, None] if kept is None else torch.cat([kept, new[:, None]], 1)
            for kept, new in ((self.keys, k), (self.values, v))
        )
        own = self._segments
        return relative_bias_attention(
            (q, self.keys.flatten(0, 1), self.values.flatten(0, 1)), cu_seqlens=own.cu_seqlens, modality=own.modality,
            code=own.code, is_cls=own.is_cls, keys=self._key_segments, bias=(self.vector,),
            code_offsets=(self.code_offset,), head_scale=head_scale, max_length=1,
        ).flatten(1)  # fmt: skip

    def take(self, rows: Tensor) -> None:
        """Go on with these texts, int64 [texts]."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class Seen:
    """A layer's keys and values of the encoder's tokens, which all texts of a sample share."""

    def __init__(self, keys: Tensor, values: Tensor, segments: Segments) -> None:
        self.keys, self.values, self.segments = keys, values, segments

    def start(self, query_place: Tensor, segments: Segments) -> None:
        """Take the next token's place, [heads, head_dim], and the segments of the texts of each sample."""
        self._query_place, self._segments = query_place, segments

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, head_scale: Tensor) -> Tensor:
        """[texts, dim] of the new tokens; their own keys and values are not asked for."""
        q = q.unflatten(1, self._query_place.shape)
        q = torch.cat([q, self._query_place.expand_as(q)], 2)
        own = self._segments
        return relative_bias_attention(
            (q, self.keys, self.values), cu_seqlens=own.cu_seqlens, modality=own.modality, code=own.code,
            is_cls=own.is_cls, keys=self.segments, head_scale=head_scale, max_length=own.max_length,
        ).flatten(1)  # fmt: skip


class Cached:
    """The decoder's pass over one more token of each text in work."""

    def __init__(self, decoder: Decoder, table: nn.Embedding, encoded: Encoded, length: int) -> None:
        layout, heads = encoded.layout, decoder.config.attention_heads
        assert isinstance(layout, Packed)
        self.decoder, self.table, self.length = decoder, table, length
        places = layout.norm(decoder.embed_positions(torch.arange(length, device=encoded.x.device)), decoder.pos_ln)
        self.query_places, self.key_places, self.cross_places = (
            linear(places).unflatten(1, (heads, -1))
            for linear in (decoder.self_pos_q_linear, decoder.self_pos_k_linear, decoder.cross_pos_q_linear)
        )
        tables: Any = decoder.token_rel_pos_table_list
        self.written = [Written(decoder.text_vector(layer, length), length - 1) for layer in tables]
        seen = layout.at_places(decoder.cross_pos_k_linear(encoded.places)).unflatten(1, (heads, -1))
        self.seen = []
        layers: Any = decoder.layers
        for attention in (layer.encoder_attn for layer in layers):
            k, v = (linear(encoded.x).unflatten(1, (heads, -1)) for linear in (attention.k_proj, attention.v_proj))
            self.seen.append(Seen(torch.cat([k, seen], 2), v, layout.segments))

    def __call__(self, texts: Tensor, texts_of: Sequence[int], parents: Tensor | None) -> Tensor:
        """The scores of what follows.

        Args:
            texts: int64 [texts, length], sample after sample; the last token of each is new.
            texts_of: how many texts each sample has.
            parents: int64 [texts], which text of the last call each of them continues; None in the first call.

        Returns:
            [texts, vocab_size].
        """
        (count, length), device = texts.shape, texts.device
        codes = torch.arange(length, dtype=torch.int32, device=device)
        queries, keys = equal_segments(count, codes[-1:]), equal_segments(count, codes)
        starts = torch.tensor([*accumulate(texts_of, initial=0)], dtype=torch.int32, device=device)
        of_samples = queries._replace(cu_seqlens=starts[None], max_length=max(texts_of))
        x = Packed.norm(self.table(texts[:, -1]), self.decoder.layernorm_embedding)
        for layer, written, seen in zip(self.decoder.layers, self.written, self.seen, strict=True):
            if parents is not None:
                written.take(parents)
            written.start(self.query_places[length - 1], self.key_places[length - 1], queries, keys)
            seen.start(self.cross_places[length - 1], of_samples)
            x = layer(x, None, written, seen)
        return F.linear(Packed.norm(x, self.decoder.layer_norm), self.table.weight)


class Uncached:
    """The same by the decoder's pass over all tokens of each text in work."""

    def __init__(self, decoder: Decoder, table: nn.Embedding, encoded: Encoded, length: int) -> None:
        self.decoder, self.table, self.encoded, self.length = decoder, table, encoded, length

    def __call__(self, texts: Tensor, texts_of: Sequence[int], parents: Tensor | None) -> Tensor:
        """As ``Cached``."""
        layout = self.encoded.layout
        assert isinstance(layout, Padded)
        samples = torch.tensor([s for s, count in enumerate(texts_of) for _ in range(count)], device=texts.device)
        encoded = Encoded(self.encoded.x[samples], layout.taken(samples), self.encoded.places)
        places = torch.arange(texts.shape[1], device=texts.device)
        valid = torch.ones_like(texts, dtype=torch.bool)
        tokens = {"text": Tokens(texts, valid, [*range(len(texts))], places, places, texts.shape[1] - 1)}
        x, _ = self.decoder(tokens, self.table, encoded, "texts")
        return F.linear(x[:, -1], self.table.weight)
