"""From a configuration to a trainer and its batches, at the beginning or where the last run stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from onepeace_fast.checks import require
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.models.upstream import CONFIG_FILE, WEIGHTS_FILE
from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import TOKENIZER_FILE
from onepeace_fast.training.config import FAMILY, RunConfig, TrainingConfig, read_yaml
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.family import Family
from onepeace_fast.training.mico import MixedSamples
from onepeace_fast.training.mico_config import MicoTrainingConfig
from onepeace_fast.training.pairs import Pairs
from onepeace_fast.training.trainer import Trainer
from onepeace_fast.training.unival import Tasks
from onepeace_fast.training.unival_config import UnivalTrainingConfig

CONFIGS: dict[str, type[RunConfig]] = {
    FAMILY: TrainingConfig, "unival": UnivalTrainingConfig, "mico": MicoTrainingConfig,
}  # fmt: skip
FAMILIES: dict[str, type[Family]] = {FAMILY: Pairs, "unival": Tasks, "mico": MixedSamples}


def read_run(path: str | Path) -> RunConfig:
    """The configuration of a run of any family, which its key "family" names; ONE-PEACE's where there is none.

    Raises:
        ValueError: as ``RunConfig.load``, or an unknown family.
    """
    path = Path(os.path.expanduser(path))
    family = read_yaml(path).get("family", FAMILY)
    require(
        isinstance(family, str) and family in CONFIGS,
        f"{path}: family: expected one of {', '.join(CONFIGS)}, got {family!r}",
    )
    return CONFIGS[family].load(path)


class Started(NamedTuple):
    """A trainer, its batches, what every checkpoint holds besides its state, and lines that say where it stands.

    ``trained`` tells of a step the modalities that this run, or what it began with, has trained by then.
    """

    trainer: Trainer
    batches: Iterator[dict[str, Any]]
    tokenizer: bytes
    settings: dict[str, Any]
    trained: Callable[[int], list[str]]
    lines: list[str]


def read_entries(config: RunConfig, processes: Processes) -> Any:
    """What the configuration's manifest has, for every process.

    Raises:
        ValueError: what does not fit in it.
    """
    return processes.on_main(lambda: FAMILIES[config.family].read(config))


def start(config: RunConfig, processes: Processes, entries: Any) -> Started:
    """Build the run on what ``read_entries`` gave, or continue it from its newest usable checkpoint.

    Raises:
        ValueError: a file, a setting or a checkpoint that does not fit; no checkpoint has been touched.
    """
    family = FAMILIES[config.family](config, entries)
    found = processes.on_main(lambda: checkpoint.newest(config.path("output")))
    model_config, fields = _model_config(family, found.folder), config.model_fields()
    tokenizer_file = _tokenizer_file(config, found.folder)
    if tokenizer_file is None:
        tokenizer_file = config.path("output") / TOKENIZER_FILE
        rows, reserved = model_config.vocab_size, family.reserved_rows
        processes.on_main(lambda: _train_tokenizer(family.texts(), rows, reserved, tokenizer_file))
    tokenizer = family.tokenizer_class.load(tokenizer_file)
    if found.folder is None and config.init is None:
        model_config = family.sized(model_config, fields, tokenizer)
    family.require_fit(model_config, tokenizer)
    settings = config.settings() | {
        "model": dict(fields),
        "contents of manifest": checkpoint.digest(config.path("manifest"))[:16],
        "contents of tokenizer": checkpoint.digest(tokenizer_file)[:16],
        "pairs": family.count,
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
    trainer = family.trainer(_model(family, model_config, found.folder), processes)
    if state is not None:
        trainer.load_state(state)
    batches = family.batches(model_config, tokenizer, processes, trainer.step_number)
    lines.append(_summary(family, trainer, found.folder))
    before = family.trained_before(model_config, found.folder)  # now, since the checkpoint may go

    def trained(step: int) -> list[str]:
        return [name for name in family.modalities(model_config) if name in before | family.trained(step)]

    return Started(trainer, batches, tokenizer_file.read_bytes(), settings, trained, lines)


def _model_config(family: Family, folder: Path | None) -> Any:
    """The model's sizes: the checkpoint's, or those of the configuration on top of the initial model's."""
    if folder is not None:
        return type(family.default_model).load(folder / CONFIG_FILE)
    return family.sizes(family.config, family.config.path("init"))


def _tokenizer_file(config: RunConfig, folder: Path | None) -> Path | None:
    """The tokenizer that is there already: the configuration's, the checkpoint's or the initial model's."""
    if config.tokenizer is not None:
        return config.path("tokenizer")
    place = config.path("init") if folder is None else folder
    if place is None:
        return None
    path = place / TOKENIZER_FILE
    require(path.is_file(), f"tokenizer: expected a path, since {place} has no {TOKENIZER_FILE}, got none")
    return path


def _train_tokenizer(texts: Iterable[str], rows: int, reserved: int, path: Path) -> None:
    draft = path.with_name(f"{path.name}.new")
    try:
        tokenizer = Tokenizer.train(texts, rows - reserved)
    except ValueError as error:
        kept = f"; of the model's {rows} rows {reserved} are kept for locations" if reserved else ""
        raise ValueError(f"{error}{kept}") from None
    tokenizer.save(draft)
    os.replace(draft, path)


def _set_aside(found: checkpoint.Found) -> list[str]:
    assert found.folder is not None
    lines = []
    for folder, reason in found.damaged.items():
        name = checkpoint.set_aside(folder).name
        lines.append(f"{folder.name} is damaged ({reason}): it is now {name}, and {found.folder.name} is used instead")
    return lines


def _model(family: Family, model_config: Any, folder: Path | None) -> Any:
    model = family.build(model_config)
    initial = family.config.path("init")
    if folder is None and initial is not None:
        path = initial / WEIGHTS_FILE
        try:
            weights = load_file(path)
            model.load_upstream_state_dict(family.fresh(model, weights) | weights)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"init: {path}: cannot be read: {' '.join(str(error).split())}") from None
        except ValueError as error:
            raise ValueError(f"init: {error}") from None
    family.prepare(model)
    if folder is not None:
        model.load_upstream_state_dict(load_file(folder / WEIGHTS_FILE))
    return model


def _summary(family: Family, trainer: Trainer, folder: Path | None) -> str:
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    processes = trainer.processes
    where = processes.device.type if processes.count == 1 else f"{processes.count} x {processes.device.type}"
    begin = "from the beginning" if folder is None else f"from {folder.name}"
    steps = family.config.total
    return f"Training {family.described()}, {trained:,} parameters, {where}, {begin} to step {steps}"
