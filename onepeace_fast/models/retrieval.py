"""ONE-PEACE for retrieval: an encoder, a projection for each modality and a temperature, no decoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from onepeace_fast.config import RetrievalConfig
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.models.base import INITIAL_LOGIT_SCALE, EmbeddingModel, OnePeaceEncoder


class OnePeaceRetrieval(EmbeddingModel):
    """What embeds texts, images and clips for retrieval; parameters carry upstream's names.

    Args:
        config: the encoder's sizes and variants.
        backend, adapters: as those of ``OnePeaceEncoder``.
    """

    tasks = ("encode", "embed")
    config: RetrievalConfig
    config_class = RetrievalConfig

    def __init__(
        self, config: RetrievalConfig, backend: str | None = None, adapters: Mapping[str, Adapter] | None = None
    ) -> None:
        super().__init__(config, backend, adapters)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        for name in config.encoder.modalities:
            self.add_projection(name)

    def _branch_kind(self) -> type[OnePeaceEncoder]:
        return OnePeaceRetrieval
