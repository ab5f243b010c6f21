"""The reference: ONE-PEACE as upstream computes it, on padded batches, with plain PyTorch.

Sequences are padded and concatenated, the [batch, heads, length, length] bias is materialised once per forward pass,
every layer slices the sequence by modality for its FFNs and concatenates the results. Later comparisons rest on this
file: it does upstream's work, no more and no less. Extended beyond upstream to any set of modalities per sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.layers.plain import inside
from onepeace_fast.layers.reference import Spans
from onepeace_fast.layers.transformer import Transformer
from onepeace_fast.models.passes import PaddedTokens, Tokens
from onepeace_fast.routing import tensor_to_device


def encode_padded(
    transformer: Transformer,
    adapters: Mapping[str, Adapter],
    tokens: Tokens,
    samples: Mapping[str, Sequence[int]] | None,
    drop_path: Tensor | None,
) -> dict[str, Tensor]:
    """Every layer over the padded batch: {modality: [rows, length, dim]}; rows at padding mean nothing."""
    if samples is not None:
        tokens = {name: _spread(padded, samples[name], samples) for name, padded in tokens.items()}
    x = torch.cat([padded.x for padded in tokens.values()], dim=1)
    padding = ~torch.cat([padded.valid for padded in tokens.values()], dim=1)
    has_padding = bool(padding.any())
    if has_padding:
        x = x * (1 - padding.unsqueeze(-1).to(x.dtype))
    spans, start = [], 0
    for name, padded in tokens.items():
        spans.append((name, start, start + padded.x.shape[1]))
        start += padded.x.shape[1]
    biases = dense_biases(transformer, adapters, tokens, spans, padding if has_padding else None, x)

    drop_path = None if drop_path is None else tensor_to_device(drop_path, x.device)
    x = transformer(x.transpose(0, 1), spans, biases, drop_path)
    result = {name: x[start:stop].transpose(0, 1) for name, start, stop in spans}
    if samples is None:
        return result
    rows = {name: torch.tensor(list(samples[name]), dtype=torch.int64, device=x.device) for name in result}
    return {name: output[rows[name]] for name, output in result.items()}


def _spread(padded: PaddedTokens, rows: Sequence[int], samples: Mapping[str, Sequence[int]]) -> PaddedTokens:
    """Put a modality's rows at their samples; samples without it are padding."""
    count = len(set().union(*map(set, samples.values())))
    index = torch.tensor(list(rows), dtype=torch.int64, device=padded.x.device)

    def at(value: Tensor) -> Tensor:
        return value.new_zeros(count, *value.shape[1:]).index_copy(0, index, value)

    ids = None if padded.ids is None else at(padded.ids)
    return PaddedTokens(at(padded.x), at(padded.valid), padded.lengths, ids, padded.width)


def dense_biases(
    transformer: Transformer,
    adapters: Mapping[str, Adapter],
    tokens: Tokens,
    spans: Spans,
    padding: Tensor | None,
    x: Tensor,
) -> list[Tensor]:
    """The bias of every table, [batch, heads, length, length], minus infinity where the key is padding."""
    batch, length, _ = x.shape
    config = inside(transformer, Transformer).config
    heads, tables = config.attention_heads, config.bias_tables
    if not tables and padding is None:
        return []
    result = []
    for table in range(max(tables, 1)):
        bias = x.new_zeros(batch, heads, length, length)
        for name, start, stop in spans if tables else ():
            bias[:, :, start:stop, start:stop] += _modality_bias(adapters[name], table, tokens[name], batch)
        if padding is not None:
            bias.masked_fill_(padding.view(batch, 1, 1, length), float("-inf"))
        result.append(bias)
    return result


def _modality_bias(adapter: Adapter, table: int, padded: PaddedTokens, batch: int) -> Tensor:
    """One modality's bias [batch, heads, length, length], gathered twice where only some tokens are visible."""
    index = adapter.dense_table_index(padded.width)
    if adapter.position_count is not None and padded.ids is not None:
        pairs = index[padded.ids[:, :, None], padded.ids[:, None, :]]
        return adapter.rel_pos_table_list[table](pairs).permute(0, 3, 1, 2)
    bias = adapter.rel_pos_table_list[table](index).unsqueeze(0).expand(batch, -1, -1, -1).permute(0, 3, 1, 2)
    if padded.ids is not None:
        heads, visible = bias.shape[1], padded.ids.shape[1]
        bias = bias.gather(2, padded.ids[:, None, :, None].expand(-1, heads, -1, padded.width))
        bias = bias.gather(3, padded.ids[:, None, None, :].expand(-1, heads, visible, -1))
    return bias
