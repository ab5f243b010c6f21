"""Where the decoder looks while it writes the digit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepeace_fast.backend import use_backend
from onepeace_fast.demo.unival.model import Batch, DigitModel
from onepeace_fast.models.unival.inputs import BEGIN, PADDING
from onepeace_fast.models.unival.layers import Attention, PaddedRoute


@torch.no_grad()
def looks(model: DigitModel, batch: Batch, written: list[list[int]], places: list[int]) -> Tensor:
    """The last decoder layer's attention to the map, mean of its heads: [samples, positions of the map].

    The rest is on the words.

    Args:
        model: in evaluation mode.
        batch: samples of one modality.
        written: the tokens that were written for each sample.
        places: of each sample the place of the token that is being written.
    """
    found: list[tuple[Tensor, Tensor, PaddedRoute]] = []
    attention: Any = model.unival.decoder.layers[-1].encoder_attn
    hook = attention.register_forward_pre_hook(lambda module, arguments: found.append(arguments))
    rows = [torch.tensor([BEGIN, *tokens], dtype=torch.int64, device="cpu") for tokens in written]
    previous = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    maps: dict[str, Any] = model.maps(batch.inputs)
    try:
        with use_backend("reference"):
            model.unival.logits(batch.source, previous, samples=batch.samples, **maps)
    finally:
        hook.remove()
    ((x, keys, route),) = found
    weights = weights_of(attention, x, keys, route).mean(1)
    (of,) = maps.values()
    return weights[torch.arange(len(rows), device="cpu"), places, : of[0, 0].numel()]


def weights_of(attention: Attention, x: Tensor, keys: Tensor, route: PaddedRoute) -> Tensor:
    """What a padded attention weighs its values by: [samples, heads, queries, keys]."""
    heads = attention.c_attn.shape[0]
    q, k = attention.q_proj(x), attention.k_proj(keys)
    q, k = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (q, k))
    return ((2 * q.shape[-1]) ** -0.5 * q @ k.transpose(-1, -2) + route.bias).softmax(-1)
