"""The denoising task's second half: visible tokens back among mask tokens, decoded, and back to the encoder's width.

(ONE-PEACE, arXiv 2305.11172, section 3.2.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast._routing import copy_to_device
from onepeace_fast.layers import AudioAdapter
from onepeace_fast.layers.adapter import with_unread
from onepeace_fast.models.inputs import Batch
from onepeace_fast.models.passes import Encoded, PackedRows, PaddedTokens, Part, join
from onepeace_fast.models.stack import Stack
from onepeace_fast.route_plan import RoutePlan

if TYPE_CHECKING:
    from onepeace_fast.models.pretrain import OnePeacePretrain


def decode(
    model: OnePeacePretrain, batches: Sequence[Batch], kept: Sequence[Part], encoded: Sequence[Encoded]
) -> list[dict[str, Tensor]]:
    """Reconstruct every token of each denoising pass: {modality: [rows, length, embed_dim]}, CLS first.

    Args:
        model: whose decoder, mask tokens and linear layers are used.
        batches: the modalities of each pass.
        kept: the visible tokens that the encoder saw in each pass.
        encoded: what it made of them.
    """
    samples = batches[0].samples
    if encoded[0].padded is not None:
        return [
            _decode_padded(model, *one, samples) for one in zip(batches, kept, (e.padded for e in encoded), strict=True)
        ]
    decoder = model.decoder_wrapper
    full = [_positions(model, batch) for batch in batches]
    joined, sample_of = join(full, samples, decoder.config.modalities)
    plan = decoder.plan(joined, sample_of)
    names = plan.modalities
    visible = {name: [one.packed[name] for one in encoded if name in one.packed] for name in names}
    embedded = torch.cat(
        [_layer(model, "decoder_{}_embed", name)(torch.cat([rows.x for rows in visible[name]])) for name in names]
    )
    tokens = torch.cat([_mask_token(model, name) for name in names])
    x = F.embedding(plan.modality, tokens).to(embedded.dtype)
    x = x.index_copy(0, _rows_in(plan, visible), embedded) + F.embedding(*_position_index(plan, decoder))
    real = [batch.valid.masks[name].flatten() for name in names for batch in batches if name in batch.inputs]
    x = x * torch.cat(real)[plan.source][:, None].to(x.dtype)
    decoded = decoder.encode_packed(x, plan, full, samples)
    results = []
    for one in decoded:
        heads = {name: _layer(model, "{}_mask_head", name)(rows.x) for name, rows in one.packed.items()}
        results.append(Encoded(packed={n: rows._replace(x=heads[n]) for n, rows in one.packed.items()}).unpacked())
    return results


def _decode_padded(
    model: OnePeacePretrain, batch: Batch, kept: Part, encoded: Mapping[str, Tensor], samples: object
) -> dict[str, Tensor]:
    decoder, full = model.decoder_wrapper, _positions(model, batch)
    for name, part in kept.items():
        visible = _layer(model, "decoder_{}_embed", name)(encoded[name])
        rows, width, dim = visible.shape[0], part.width, visible.shape[2]
        x = _mask_token(model, name).to(visible.dtype).repeat(rows * width, 1)
        real = part.valid.flatten().nonzero().squeeze(1)
        places = (part.ids + torch.arange(rows, device=x.device)[:, None] * width).flatten()[real]
        x[places] = visible.flatten(0, 1)[real]
        x = x.view(rows, width, dim) + decoder.adapter(name).position_table(width)
        if sum(batch.valid.lengths[name]) < rows * width:
            x = x * batch.valid.masks[name][..., None].to(x.dtype)
        full[name] = full[name]._replace(x=x)
    (decoded,) = decoder([full], samples)
    return {name: _layer(model, "{}_mask_head", name)(x) for name, x in decoded.padded.items()}


def _positions(model: OnePeacePretrain, batch: Batch) -> dict[str, PaddedTokens]:
    """All positions of the decoder's input, and which of each row it attends to; no embeddings yet.

    Upstream masks padding through the bias alone: a decoder without bias attends to its padding, zeroed at first.
    """
    part = {}
    for name, valid in batch.valid.masks.items():
        lengths = batch.valid.lengths[name]
        if not model.config.decoder.use_bias:
            valid, lengths = torch.ones_like(valid), [valid.shape[1]] * valid.shape[0]
        part[name] = PaddedTokens(None, valid, lengths, None, valid.shape[1])
    return part


def _mask_token(model: OnePeacePretrain, name: str) -> Tensor:
    """The mask token [1, width] of a modality."""
    adapter = model.decoder_wrapper.adapter(name)
    unread = [adapter.cls_embedding, *([adapter.mask_embedding] if isinstance(adapter, AudioAdapter) else [])]
    return with_unread(getattr(model, f"{name}_mask_token"), *unread)


def _layer(model: OnePeacePretrain, pattern: str, name: str) -> nn.Linear:
    return model.get_submodule(pattern.format(name))


def _rows_in(full: RoutePlan, visible: Mapping[str, Sequence[PackedRows]]) -> Tensor:
    """Row of the decoder's plan that each visible row belongs to: int64 [visible rows]."""
    device = full.source.device
    row_of = torch.empty(full.padded_rows + 1, dtype=torch.int64, device=device)
    row_of[full.source] = torch.arange(full.capacity, device=device)
    places, start = [], 0
    for name, (_, width) in zip(full.modalities, full.padded_shapes, strict=True):
        for rows in visible[name]:
            places.append(rows.row * width + rows.position + start)
            start += rows.shape[0] * width
    return row_of[torch.cat(places)]


def _position_index(plan: RoutePlan, decoder: Stack) -> tuple[Tensor, Tensor]:
    """Index into, and the concatenation of, the decoder's position tables of the plan's modalities."""
    widths = [width for _, width in plan.padded_shapes]
    tables = [decoder.adapter(n).position_table(w) for n, w in zip(plan.modalities, widths, strict=True)]
    starts = copy_to_device([sum(widths[:i]) for i in range(len(widths))], torch.int32, plan.source.device)
    return starts[plan.modality.long()] + plan.position, torch.cat(tables)
