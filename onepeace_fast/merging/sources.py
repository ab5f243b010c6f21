"""What is averaged: a model's weights by name, from a file or from memory, and the sizes that shapes do not show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from onepeace_fast.checks import describe, require
from onepeace_fast.models import upstream
from onepeace_fast.models.unival import config as unival
from onepeace_fast.models.upstream import CONFIG_FILE
from onepeace_fast.nested import flat
from onepeace_fast.pretrained import pickles
from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import TOKENIZER_FILE, TRAINING_FILE
from onepeace_fast.upstream_config import ARCHITECTURE

FOLDER, SAFETENSORS, PICKLE, MEMORY = "a folder", "a .safetensors file", "a file by torch.save", "an object"
# Fields that two trainings of one model may differ in.
_OF_TRAINING = {
    "drop_path_rate", "encoder_drop_path_rate", "decoder_drop_path_rate", "dropout", "attention_dropout",
    "activation_dropout", "pooler_dropout", "checkpoint_activations", "contrast_weight", "matching_weight",
    "caption_weight",
}  # fmt: skip
COUNTS = ".num_batches_tracked"  # of BatchNorms, which nothing reads: their momentum is fixed
Model = str | Path | nn.Module | Mapping[str, Tensor]


class Source(NamedTuple):
    """A model to average.

    Attributes:
        name: for messages.
        form: ``FOLDER``, ``SAFETENSORS``, ``PICKLE`` or ``MEMORY``.
        weights: by name; those of a file are mapped into memory.
        sizes: of the model, by the names of its settings.
        settings: a folder's configuration, or what stands beside "model" in a file by torch.save; None: nothing may.
        tokenizer: the folder's.
        training: the settings of the training that wrote the folder, and the modalities that it trained.
    """

    name: str
    form: str
    weights: Mapping[str, Tensor]
    sizes: Mapping[str, Any] = {}
    settings: Mapping[str, Any] | None = None
    tokenizer: bytes | None = None
    training: Mapping[str, Any] | None = None


def read(model: Model, place: int) -> Source:
    """A model by its path, or the object that it is; ``place`` names an object in messages.

    Raises:
        ValueError: what is not there, broken, or no model; one line that names it.
    """
    if isinstance(model, nn.Module):
        own = getattr(model, "to_upstream_state_dict", model.state_dict)
        return Source(f"model {place}", MEMORY, own())
    if isinstance(model, Mapping):
        return Source(f"model {place}", MEMORY, model)
    require(isinstance(model, str | Path), f"model {place}: expected a path, module or state dict, got {model!r}")
    path = Path(model).expanduser()
    require(path.exists(), f"{path}: expected a checkpoint, got nothing there")
    if path.is_dir():
        return _read_folder(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_folder(path: Path) -> Source:
    for name in (CONFIG_FILE, upstream.WEIGHTS_FILE):
        require((path / name).is_file(), f"{path}: expected a folder that save() wrote, got one without {name}")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: expected JSON, got none ({error})") from None
    fits = isinstance(config, dict)
    require(fits, f"{path / CONFIG_FILE}: expected a configuration that save() wrote, got {describe(config)}")
    sizes = {name: value for name, value in flat(config).items() if name.split(".")[-1] not in _OF_TRAINING}
    tokenizer = path / TOKENIZER_FILE
    words = tokenizer.read_bytes() if tokenizer.is_file() else None
    training: dict[str, Any] | None = None
    if (path / TRAINING_FILE).is_file():
        state = checkpoint.load_state(path)
        training = {name: state[name] for name in ("settings", "trained") if name in state}
        sizes |= {
            name: value for name, value in training["settings"].items() if name == "bins"
        }  # rows of UnIVAL's table
    return Source(str(path), FOLDER, upstream.read_weights(path), sizes, config, words, training)


def _read_safetensors(path: Path) -> Source:
    try:
        return Source(str(path), SAFETENSORS, load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, got a file that cannot be read ({error})") from None


def _read_pickle(path: Path) -> Source:
    values = pickles.read(path)
    require(isinstance(values, Mapping), f"{path}: expected a checkpoint or a state dict, got {type(values).__name__}")
    whole = isinstance(values.get("model"), Mapping)
    weights = pickles.tensors(values["model"] if whole else values)
    require(bool(weights), f"{path}: expected tensors, got none")
    settings = {name: pickles.plain(values[name]) for name in ("cfg", "args") if whole and values.get(name) is not None}
    known = (ARCHITECTURE | unival.ARCHITECTURE) - _OF_TRAINING
    said: Any = next(iter(settings.values()), None)
    said = said if isinstance(said, Mapping) else {}
    section = said["model"] if isinstance(said.get("model"), Mapping) else said
    sizes = {name: value for name, value in flat(section).items() if name.split(".")[-1] in known}
    return Source(str(path), PICKLE, weights, sizes, settings if whole else None)


def check(sources: list[Source]) -> dict[str, torch.dtype]:
    """The dtype of every average, by name, after all was compared.

    Raises:
        ValueError: models that differ in names, shapes, sizes, vocabularies or what is no floating point number.
    """
    first, *others = sources
    for other in others:
        _check_settings(first, other)
        _check_names(first, other)
    dtypes = {}
    for name, value in first.weights.items():
        found = [source.weights[name] for source in sources]
        for source, own in zip(sources, found, strict=True):
            fits = isinstance(own, Tensor) and not own.is_meta and own.layout == torch.strided
            require(fits, lambda: f"{name}: expected a dense tensor with data, got another in {source.name}")  # noqa: B023
            _check_pair(name, first, source, value, own)
        dtypes[name] = found[0].dtype
        for source, own in zip(sources[1:], found[1:], strict=True):
            try:
                dtypes[name] = torch.promote_types(dtypes[name], own.dtype)
            except RuntimeError:  # torch promotes no float8
                raise ValueError(
                    f"{name}: expected dtypes that torch promotes to one, got {dtypes[name]} and {own.dtype} in "
                    f"{source.name}; convert one of them"
                ) from None
    return dtypes


def _check_settings(first: Source, other: Source) -> None:
    for name, value in first.sizes.items():
        got = other.sizes.get(name, value)
        require(got == value, f"{name}: expected the same in all models, got {value} in {first.name} and {got} in "
                f"{other.name}")  # fmt: skip
    words = first.tokenizer, other.tokenizer
    same = None in words or words[0] == words[1]
    require(same, f"{TOKENIZER_FILE}: expected one vocabulary, got two, in {first.name} and {other.name}")


def _check_names(first: Source, other: Source) -> None:
    for one, two in ((first, other), (other, first)):
        if missing := sorted(set(one.weights) - set(two.weights)):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{two.name}: expected all that {one.name} has, got none of {', '.join(missing[:3])}{more}; "
                "merge models with the same parts"
            )


def _check_pair(name: str, first: Source, source: Source, value: Tensor, own: Tensor) -> None:
    require(own.shape == value.shape, lambda: f"{name}: expected one shape in all models, got {list(value.shape)} in "
            f"{first.name} and {list(own.shape)} in {source.name}{_hint(name)}")  # fmt: skip
    if own.is_floating_point() and value.is_floating_point():
        return
    same = own.dtype == value.dtype and (name.endswith(COUNTS) or torch.equal(own.cpu(), value.cpu()))
    require(same, lambda: f"{name}: expected the same {value.dtype} numbers in all models, since they cannot be "
            f"averaged, got others in {first.name} and {source.name}")  # fmt: skip


def _hint(name: str) -> str:
    return "; merge models of one vocabulary" if "embed_tokens" in name else ""
