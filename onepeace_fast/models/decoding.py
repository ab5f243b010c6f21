"""The denoising task's second half: visible tokens back among mask tokens, decoded, and back to the encoder's width.

(ONE-PEACE, arXiv 2305.11172, section 3.2.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onepeace_fast.models.inputs import Batch
from onepeace_fast.models.passes import Encoded, PaddedTokens, Part

if TYPE_CHECKING:
    from onepeace_fast.models.pretrain import OnePeacePretrain


def decode(
    model: OnePeacePretrain, batches: Sequence[Batch], visible: Sequence[Part], encoded: Sequence[Encoded]
) -> list[dict[str, Tensor]]:
    """Reconstruct every token of each denoising pass: {modality: [rows, length, embed_dim]}, CLS first.

    Args:
        model: whose decoder, mask tokens and linear layers are used.
        batches: the modalities of each pass.
        visible: the tokens that the encoder saw in each pass.
        encoded: what it made of them.
    """
    passes = [_among_mask_tokens(model, *one) for one in zip(batches, visible, encoded, strict=True)]
    decoded = model.decoder_wrapper(passes, batches[0].samples)
    heads = {name: model.get_submodule(f"{name}_mask_head") for name in model.config.decoder.modalities}
    return [one.through(heads).unpacked() for one in decoded]


def _among_mask_tokens(model: OnePeacePretrain, batch: Batch, visible: Part, encoded: Encoded) -> Part:
    """The decoder's input: what the encoder made of the visible tokens, mask tokens elsewhere, and positions.

    Upstream masks padding through the bias alone: a decoder without bias attends to its padding, zeroed at first.
    """
    decoder, part = model.decoder, {}
    encoded = encoded.through({name: model.get_submodule(f"decoder_{name}_embed") for name in visible})
    for name, seen in visible.items():
        embedded, place = encoded.visible(name, seen)
        valid, lengths = batch.valid.masks[name], batch.valid.lengths[name]
        mask_token = getattr(model, f"{name}_mask_token").to(embedded.dtype)
        x = mask_token.repeat(valid.numel(), 1).index_copy(0, place, embedded)
        x = decoder.embedding(name, x.view(*valid.shape, x.shape[1]))
        if sum(lengths) < valid.numel():
            x = x * valid[..., None].to(x.dtype)
        if not model.config.decoder.use_bias:
            valid, lengths = torch.ones_like(valid), [valid.shape[1]] * valid.shape[0]
        part[name] = PaddedTokens(x, valid, lengths, None, valid.shape[1])
    return part
