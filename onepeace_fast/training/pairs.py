"""Runs of ONE-PEACE: pairs of a file and its caption, hidden in parts and contrasted."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from onepeace_fast.config import ImageAdapterConfig, OnePeaceConfig
from onepeace_fast.data.batches import BatchSampler, PairDataset, collate
from onepeace_fast.data.manifest import Entry, read_manifest
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.layers.adapters import PATCH, AudioAdapter
from onepeace_fast.models.modalities import parameters_of
from onepeace_fast.models.pretrain import OnePeacePretrain
from onepeace_fast.training.config import TrainingConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.family import Family, Reading
from onepeace_fast.training.masks import audio_language_masks, vision_language_masks
from onepeace_fast.training.trainer import Trainer

INPUTS = ("text", "image", "audio", "audio_padding")


class PairTrainer(Trainer):
    """Steps of ONE-PEACE's two stages."""

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The stage's loss and its parts, under masks drawn here."""
        inputs = {name: batch[name] for name in INPUTS if name in batch} | {"masks": self._draw_masks(batch)}
        return self.pass_forward(f"{self.config.stage}_loss", inputs)

    def _draw_masks(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        text, word_starts = batch["text"], batch["word_starts"]
        if self.config.modality == "image":
            patches = (batch["image"].shape[-1] // PATCH) ** 2
            return vision_language_masks(text, word_starts, patches, self.masks)
        width = batch["audio_padding"].shape[1] - 1
        return audio_language_masks(text, word_starts, batch["frames"], self.masks, width)


class Pairs(Family):
    """Images or clips with their captions."""

    config: TrainingConfig
    entries: Sequence[Entry]
    default_model = OnePeaceConfig()

    @classmethod
    def read(cls, config: TrainingConfig) -> list[Entry]:
        """As ``read_manifest``."""
        return read_manifest(config.path("manifest"), config.modality, missing=config.missing)

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return len(self.entries)

    def described(self) -> str:
        """The stage and the number of pairs."""
        return f"{self.config.stage} on {self.count:,} pairs"

    def texts(self) -> Iterable[str]:
        """The captions."""
        return (entry.caption for entry in self.entries)

    def require_fit(self, model: OnePeaceConfig, tokenizer: Tokenizer) -> None:
        """Raise ``ValueError`` where the model lacks what the stage trains."""
        for name in ("text", self.config.modality):
            if name not in model.encoder.modalities or name not in model.decoder.modalities:
                raise ValueError(
                    f"model: expected {name} in encoder and decoder for stage {self.config.stage}, got a model "
                    f"without; give encoder: {{{name}: {{}}}} and decoder: {{{name}: {{use_bias: false}}}}"
                )
        super().require_fit(model, tokenizer)

    def build(self, model: OnePeaceConfig) -> OnePeacePretrain:
        """A model whose linear layers have the configured scale."""
        built = OnePeacePretrain(model, self.config.backend)
        with torch.no_grad():
            for module in built.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight *= self.config.initial_scale
        return built

    def prepare(self, model: OnePeacePretrain) -> None:
        """Freeze what the stage does not train."""
        if self.config.stage == "audio_language":
            model.train_only("audio")
        unread = set(model.config.encoder.modalities) - {"text", self.config.modality}
        for parameter in parameters_of(model, unread):
            parameter.requires_grad_(False)  # so that weight decay leaves them alone

    def modalities(self, model: OnePeaceConfig) -> Sequence[str]:
        """The encoder's."""
        return model.encoder.modalities

    def added(self, weights: Mapping[str, Tensor], model: OnePeaceConfig) -> list[str]:
        """Those without a projection."""
        return [name for name in model.encoder.modalities if f"{name}_proj.weight" not in weights]

    def trainer(self, model: OnePeacePretrain, processes: Processes) -> PairTrainer:
        """With masks of this process's own."""
        return PairTrainer(model, self.config, processes)

    def trained(self, step: int) -> set[str]:
        """Both sides of a pair."""
        return {"text", self.config.modality}

    def reading(self, model: OnePeaceConfig, tokenizer: Tokenizer, processes: Processes, step: int) -> Reading:
        """The pairs in an order of each epoch."""
        config, encoder, image = self.config, model.encoder, self.config.modality == "image"
        side = cast(ImageAdapterConfig, encoder.image).position_grid * PATCH if image else None
        pairs = PairDataset(self.entries, tokenizer, config.modality, side=side, seed=config.seed, broken=config.broken)
        first = step * config.accumulation
        sampler = BatchSampler(len(pairs), config.batch_size, config.seed, processes.rank, processes.count, first)
        # The method over the configuration, without the adapter, because workers may get it pickled.
        frames = None if image else functools.partial(cast(Any, AudioAdapter.frames), encoder.audio)
        return pairs, sampler, functools.partial(collate, frames=frames)
