"""Embeddings of clips that do not depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.models.base import EmbeddingModel
from onepeace_fast.models.inputs import read_batch


def embed_clips(model: EmbeddingModel, clips: Sequence[Tensor]) -> Tensor:
    """Embed each clip as it is alone: L2-normalised [clips, embed_dim], in the order given.

    The convolutions over a padded batch see its padding, so a row of ``model.embed(audio=..., audio_padding=...)``
    depends on the longest clip beside it, as in ONE-PEACE's public code. Here only clips of one length share a batch
    up to the transformer, which then takes all of them, as packed rows where the backend packs.

    Args:
        clips: floating point [samples] each, at 16 kHz, of any device and dtype; ``prepare_waveform`` gives them.

    Raises:
        ValueError: no clips, another shape, one that is too short or too long, or a model without audio.
    """
    encoder = model.encoder
    require("audio" in encoder.adapters, "clips: expected a model with audio, got one without this modality")
    require(len(clips) > 0, "clips: expected at least one, got none")
    places: dict[int, list[int]] = {}
    for place, clip in enumerate(clips):
        require(
            isinstance(clip, Tensor) and clip.is_floating_point() and clip.dim() == 1,
            lambda place=place, clip=clip: f"clips[{place}]: expected floating point [samples], got {describe(clip)}",
        )
        places.setdefault(len(clip), []).append(place)
    like, passes = encoder.adapter("audio").cls_embedding, []
    for group in places.values():
        batch, _ = read_batch(encoder.adapters, {"audio": torch.stack([clips[place].to(like) for place in group])})
        passes.append(encoder.embed(batch))
    rows = torch.cat([model.project(encoded) for encoded in model.encoder_wrapper(passes)])
    order = torch.tensor([place for group in places.values() for place in group], device=rows.device)
    return torch.zeros_like(rows).index_copy(0, order, rows)
