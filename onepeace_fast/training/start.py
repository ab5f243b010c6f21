"""From a configuration to a trainer and its batches, at the beginning or where the last run stopped."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from onepeace_fast.checks import require
from onepeace_fast.config import ImageAdapterConfig, OnePeaceConfig
from onepeace_fast.data.batches import BatchSampler, PairDataset, collate
from onepeace_fast.data.manifest import Entry, read_manifest
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.layers.adapters import PATCH, AudioAdapter
from onepeace_fast.models.modalities import parameters_of
from onepeace_fast.models.parameter_names import upstream_names
from onepeace_fast.models.pretrain import OnePeacePretrain
from onepeace_fast.models.upstream import CONFIG_FILE, WEIGHTS_FILE
from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import TOKENIZER_FILE
from onepeace_fast.training.config import TrainingConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.trainer import Trainer


class Started(NamedTuple):
    """A trainer, its batches, what every checkpoint holds besides its state, and lines that say where it stands.

    ``trained`` are the modalities that this run, or what it began with, has trained.
    """

    trainer: Trainer
    batches: Iterator[dict[str, Any]]
    tokenizer: bytes
    settings: dict[str, Any]
    trained: list[str]
    lines: list[str]


def read_entries(config: TrainingConfig, processes: Processes) -> list[Entry]:
    """The pairs of the configuration's manifest, for every process.

    Raises:
        ValueError: what ``read_manifest`` refuses.
    """
    return processes.on_main(lambda: read_manifest(config.path("manifest"), config.modality, missing=config.missing))


def start(config: TrainingConfig, processes: Processes, entries: Sequence[Entry]) -> Started:
    """Build the run on the pairs of ``read_entries``, or continue it from its newest usable checkpoint.

    Raises:
        ValueError: a file, a setting or a checkpoint that does not fit; no checkpoint has been touched.
    """
    found = processes.on_main(lambda: checkpoint.newest(config.path("output")))
    model_config, fields = _model_config(config, found.folder), config.model_fields()
    tokenizer_file = _tokenizer_file(config, found.folder)
    if tokenizer_file is None:
        tokenizer_file = config.path("output") / TOKENIZER_FILE
        processes.on_main(lambda: _train_tokenizer(entries, model_config.vocab_size, tokenizer_file))
    tokenizer = Tokenizer.load(tokenizer_file)
    if found.folder is None and config.init is None and (not config.tokenizer or "vocab_size" not in fields):
        model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
    _require_fit(config, model_config, tokenizer)
    settings = config.settings() | {
        "model": dict(fields),
        "contents of manifest": checkpoint.digest(config.path("manifest"))[:16],
        "contents of tokenizer": checkpoint.digest(tokenizer_file)[:16],
        "pairs": len(entries),
        "processes": processes.count,
        "device": processes.device.type,
    }
    state, lines = None, []
    if found.folder is not None:
        state = checkpoint.load_state(found.folder)
        if changed := checkpoint.differences(state["settings"], settings):
            place = f"the settings that {found.folder} was written with, or another folder"
            raise ValueError(f"output: expected {place}, got {'; '.join(changed)}")
        lines = processes.on_main(lambda: _set_aside(found))
    torch.manual_seed(config.seed)
    trainer = Trainer(_model(config, model_config, found.folder), config, processes)
    if state is not None:
        trainer.load_state(state)
    batches = _batches(config, model_config, entries, tokenizer, processes, trainer.step_number)
    lines.append(_summary(config, trainer, len(entries), found.folder))
    trained = _trained(config, model_config, found.folder)
    return Started(trainer, batches, tokenizer_file.read_bytes(), settings, trained, lines)


def _trained(config: TrainingConfig, model: OnePeaceConfig, folder: Path | None) -> list[str]:
    """The modalities trained here or before; a model without a record of it counts as trained whole."""
    place, names = config.path("init") if folder is None else folder, {"text", config.modality}
    if place is not None:
        recorded = (place / checkpoint.TRAINING_FILE).is_file()
        before = checkpoint.load_state(place).get("trained") if recorded else None
        init = OnePeaceConfig.load(place / CONFIG_FILE).encoder.modalities
        names |= set(init if before is None else before)
    return [name for name in model.encoder.modalities if name in names]


def _model_config(config: TrainingConfig, folder: Path | None) -> OnePeaceConfig:
    """The model's sizes: the checkpoint's, or those of the configuration on top of the initial model's."""
    if folder is not None:
        return OnePeaceConfig.load(folder / CONFIG_FILE)
    initial = config.path("init")
    if initial is None:
        return config.model_config(OnePeaceConfig())
    path = initial / CONFIG_FILE
    require(path.is_file(), f"init: expected the folder of a model, got {initial} without {CONFIG_FILE}")
    try:
        base = OnePeaceConfig.load(path)
    except ValueError as error:
        raise ValueError(f"init: {path}: {error}") from None
    return config.model_config(base)


def _tokenizer_file(config: TrainingConfig, folder: Path | None) -> Path | None:
    """The tokenizer that is there already: the configuration's, the checkpoint's or the initial model's."""
    if config.tokenizer is not None:
        return config.path("tokenizer")
    place = config.path("init") if folder is None else folder
    if place is None:
        return None
    path = place / TOKENIZER_FILE
    require(path.is_file(), f"tokenizer: expected a path, since {place} has no {TOKENIZER_FILE}, got none")
    return path


def _train_tokenizer(entries: Sequence[Entry], size: int, path: Path) -> None:
    draft = path.with_name(f"{path.name}.new")
    Tokenizer.train((entry.caption for entry in entries), size).save(draft)
    os.replace(draft, path)


def _require_fit(config: TrainingConfig, model: OnePeaceConfig, tokenizer: Tokenizer) -> None:
    for name in ("text", config.modality):
        if name not in model.encoder.modalities or name not in model.decoder.modalities:
            raise ValueError(
                f"model: expected {name} in encoder and decoder for stage {config.stage}, got a model without; give "
                f"encoder: {{{name}: {{}}}} and decoder: {{{name}: {{use_bias: false}}}}"
            )
    require(
        tokenizer.vocab_size <= model.vocab_size,
        f"tokenizer: expected at most the model's vocab_size, {model.vocab_size}, got {tokenizer.vocab_size} tokens",
    )


def _set_aside(found: checkpoint.Found) -> list[str]:
    assert found.folder is not None
    lines = []
    for folder, reason in found.damaged.items():
        name = checkpoint.set_aside(folder).name
        lines.append(f"{folder.name} is damaged ({reason}): it is now {name}, and {found.folder.name} is used instead")
    return lines


def _model(config: TrainingConfig, model_config: OnePeaceConfig, folder: Path | None) -> OnePeacePretrain:
    model = OnePeacePretrain(model_config, config.backend)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= config.initial_scale
    initial = config.path("init")
    if folder is None and initial is not None:
        path = initial / WEIGHTS_FILE
        try:
            weights = load_file(path)
            model.load_upstream_state_dict(_added(model, weights) | weights)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"init: {path}: cannot be read: {' '.join(str(error).split())}") from None
        except ValueError as error:
            raise ValueError(f"init: {error}") from None
    if config.stage == "audio_language":
        model.train_only("audio")
    unread = set(model_config.encoder.modalities) - {"text", config.modality}
    for parameter in parameters_of(model, unread):
        parameter.requires_grad_(False)  # so that weight decay leaves them alone
    if folder is not None:
        model.load_upstream_state_dict(load_file(folder / WEIGHTS_FILE))
    return model


def _added(model: OnePeacePretrain, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fresh parameters of modalities that the initial model does not have at all."""
    names = [name for name in model.config.encoder.modalities if f"{name}_proj.weight" not in weights]
    parameters = upstream_names(model)
    return {key: value.detach() for key, value in parameters.items() if any(f"{name}_" in key for name in names)}


def _batches(
    config: TrainingConfig,
    model_config: OnePeaceConfig,
    entries: Sequence[Entry],
    tokenizer: Tokenizer,
    processes: Processes,
    step: int,
) -> Iterator[dict[str, Any]]:
    encoder, image = model_config.encoder, config.modality == "image"
    side = cast(ImageAdapterConfig, encoder.image).position_grid * PATCH if image else None
    pairs = PairDataset(entries, tokenizer, config.modality, side=side, seed=config.seed, broken=config.broken)
    first = step * config.accumulation
    sampler = BatchSampler(len(pairs), config.batch_size, config.seed, processes.rank, processes.count, first)
    # The method over the configuration, without the adapter, because workers may get it pickled.
    frames = None if image else functools.partial(cast(Any, AudioAdapter.frames), encoder.audio)
    return iter(
        DataLoader(
            pairs,
            batch_sampler=sampler,
            collate_fn=functools.partial(collate, frames=frames),
            num_workers=config.workers,
            pin_memory=processes.device.type == "cuda",
            generator=torch.Generator(),  # the default one draws DropPath
        )
    )


def _summary(config: TrainingConfig, trainer: Trainer, pairs: int, folder: Path | None) -> str:
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    processes = trainer.processes
    where = processes.device.type if processes.count == 1 else f"{processes.count} x {processes.device.type}"
    begin = "from the beginning" if folder is None else f"from {folder.name}"
    return (
        f"Training {config.stage} on {pairs:,} pairs, {trained:,} parameters, {where}, {begin} to step {config.steps}"
    )
