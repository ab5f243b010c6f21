"""Endless made-up batches for trainers without files, each following from its number alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from models._small import audio_batch, image_batch, small_config, small_model, text_batch

from onepeace_fast.training.config import TrainingConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.masks import audio_language_masks, vision_language_masks
from onepeace_fast.training.pairs import PairTrainer

LENGTHS, FRAMES = [7, 4, 5, 6], [9, 20, 30, 14]
STAGES = ("vision_language", "audio_language")


def batch_number(stage: str, number: int) -> dict[str, Any]:
    """Four pairs, as ``collate`` gives them; every token begins a word."""
    text = text_batch(LENGTHS, seed=number)
    ends = torch.arange(text.shape[1]) == torch.tensor(LENGTHS)[:, None] - 1
    text = text.masked_fill(ends, 2)
    batch: dict[str, Any] = {"text": text, "word_starts": text > 2}
    if stage == "vision_language":
        return batch | {"image": image_batch(4, 3, torch.float32, seed=number)}
    audio, padding = audio_batch(FRAMES, torch.float32, seed=number)
    return batch | {"audio": audio, "audio_padding": padding, "frames": FRAMES}


def batches(stage: str, first: int = 0, every: int = 1) -> Iterator[dict[str, Any]]:
    """Batches ``first``, ``first + every`` and so on."""
    number = first
    while True:
        yield batch_number(stage, number)
        number += every


def configuration(stage: str, **keys: Any) -> TrainingConfig:
    """A configuration of which no file is read."""
    values = {"manifest": "-", "output": "-", "init": "-", "batch_size": 4, "steps": 20, "learning_rate": 0.01}
    return TrainingConfig(stage=stage, **(values | {"warm_up": 3} | keys))


def trainer(
    stage: str, processes: Processes | None = None, model: dict[str, Any] | None = None, **keys: Any
) -> PairTrainer:
    """A trainer of a small randomised model with DropPath and dropout; ``model`` overrides fields of both stacks."""
    fields = {"drop_path_rate": 0.4, "dropout": 0.1} | (model or {})
    small = small_model("fused", small_config(decoder=fields, **fields), torch.float32)
    if stage == "audio_language":
        small.train_only("audio")
    processes = processes or Processes(0, 1, torch.device("cpu"))
    return PairTrainer(small, configuration(stage, **keys), processes)


def masks_of(stage: str, batch: dict[str, Any], seed: int | torch.Generator) -> dict[str, torch.Tensor]:
    """Masks for a batch of ``batch_number``."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    if stage == "vision_language":
        return vision_language_masks(batch["text"], batch["word_starts"], 9, generator)
    return audio_language_masks(batch["text"], batch["word_starts"], batch["frames"], generator, 30)
