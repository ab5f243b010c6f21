"""The configuration of a pretraining run: a YAML file, read into a frozen dataclass; a mistake is one clear line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import yaml
from typing_extensions import Self

from onepeace_fast.backend import BACKENDS
from onepeace_fast.checks import describe, require
from onepeace_fast.config import ModelConfig, is_number
from onepeace_fast.data.batches import BROKEN
from onepeace_fast.data.manifest import MISSING

STAGES = {"vision_language": "image", "audio_language": "audio"}
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")
FAMILY = "one_peace"  # where a file names none

Model = TypeVar("Model", bound=ModelConfig)


class Kind(NamedTuple):
    """What a key may hold: a test of its value, and its description."""

    fits: Callable[[Any], bool]
    expected: str


def one_of(names: Any) -> Kind:
    """One of some names."""
    return Kind(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


COUNT = Kind(lambda value: type(value) is int and value > 0, "a positive integer")
SIZE = Kind(lambda value: type(value) is int and value >= 0, "an integer from 0 on")
POSITIVE = Kind(lambda value: is_number(value) and value > 0, "a positive number")
NUMBER = Kind(lambda value: is_number(value) and value >= 0, "a number from 0 on")
_SEED = Kind(lambda value: SIZE.fits(value) and value < 2**64, "an integer from 0 to below 2**64")
_PATH = Kind(lambda value: isinstance(value, str) and value.strip() != "", "a path")
_MODEL = Kind(
    lambda value: isinstance(value, Mapping) or _PATH.fits(value), "fields of a model configuration, or a config.json"
)


def key(kind: Kind, default: Any = dataclasses.MISSING, *, changes_result: bool = True) -> Any:
    """A key of the file; ``changes_result`` of one that must stay when a run goes on."""
    return field(default=default, metadata={"kind": kind, "changes_result": changes_result})


@dataclass(frozen=True, kw_only=True)
class RunConfig(ABC):
    """What every run has. Paths are relative to the configuration's folder; ``docs/training.md`` explains every key.

    ``batch_size`` is per process; an optimizer step takes ``accumulation`` batches of every process. ``warm_up`` counts
    optimizer steps.
    """

    family: str
    manifest: str = key(_PATH, changes_result=False)
    output: str = key(_PATH, changes_result=False)
    tokenizer: str | None = key(_PATH, None, changes_result=False)
    init: str | None = key(_PATH, None)
    model: Mapping[str, Any] | str | None = key(_MODEL, None, changes_result=False)
    batch_size: int = key(COUNT)
    accumulation: int = key(COUNT, 1)
    learning_rate: float = key(POSITIVE)
    minimum_learning_rate: float = key(NUMBER, 0.0)
    warm_up: int = key(SIZE, 0)
    weight_decay: float = key(NUMBER, 0.05)
    clip: float = key(POSITIVE, 3.0)
    precision: str = key(one_of(PRECISIONS), "float32")
    seed: int = key(_SEED, 0)
    missing: str = key(one_of(MISSING), "fatal", changes_result=False)
    broken: str = key(one_of(BROKEN), "fatal")
    device: str | None = key(one_of(DEVICES), None, changes_result=False)
    backend: str | None = key(one_of(BACKENDS), None)
    workers: int = key(SIZE, 2, changes_result=False)
    checkpoint_every: int = key(COUNT, 1000, changes_result=False)
    keep: int = key(COUNT, 2, changes_result=False)
    log_every: int = key(COUNT, 10, changes_result=False)

    folder: Path = field(default=Path(), repr=False)

    def __post_init__(self) -> None:
        for item in self._keys():
            value, kind = getattr(self, item.name), item.metadata["kind"]
            optional = item.default is None and value is None
            require(optional or kind.fits(value), f"{item.name}: expected {kind.expected}, got {describe(value)}")
        require(
            self.minimum_learning_rate <= self.learning_rate,
            f"minimum_learning_rate: expected at most learning_rate ({self.learning_rate}), got "
            f"{self.minimum_learning_rate}",
        )
        for name in ("output", "init"):
            path = str(self.path(name))
            whole = path.encode(errors="replace").decode() == path
            require(whole, f"{name}: expected a path in UTF-8, got {path!r}; safetensors takes no other")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file.

        Raises:
            ValueError: a file that cannot be read, or a key that is unknown, missing, doubled or does not fit.
        """
        path = Path(os.path.expanduser(path))
        values = read_yaml(path)
        own = cls.__dataclass_fields__["family"].default
        family = values.get("family", own if own == FAMILY else None)
        require(family == own, f"{path}: family: expected {own}, got {family!r}")
        known = [item.name for item in cls._keys()]
        for name in values:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            require(name in known, f"{path}: expected some of {', '.join(known)}, got {name!r}{hint}")
        missing = [item.name for item in cls._keys() if item.default is dataclasses.MISSING and item.name not in values]
        require(not missing, f"{path}: expected {', '.join(missing)}, got no value")
        try:
            return cls(**values, folder=path.parent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _keys(cls) -> list[dataclasses.Field[Any]]:
        """Those that must be there first."""
        found = [item for item in dataclasses.fields(cls) if item.metadata]
        return sorted(found, key=lambda item: item.default is not dataclasses.MISSING)

    @property
    @abstractmethod
    def total(self) -> int:
        """Optimizer steps of the whole run."""

    @abstractmethod
    def schedule(self, step: int) -> tuple[int, int]:
        """Where a step stands in the rise and fall of the learning rate that it belongs to, and how long that is."""

    @overload
    def path(self, name: Literal["manifest", "output"]) -> Path: ...  # the keys that every file has

    @overload
    def path(self, name: str) -> Path | None: ...

    def path(self, name: str) -> Path | None:
        """The path that a key holds, ``~`` expanded, from the configuration's folder; None where there is none."""
        value = getattr(self, name)
        return None if value is None else self.folder / os.path.expanduser(value)

    def model_config(self, base: Model) -> Model:
        """The configuration of the model: ``base`` with the fields that the key ``model`` gives instead.

        Raises:
            ValueError: a field that is unknown or does not fit.
        """
        try:
            fields = dataclasses.asdict(cast(Any, base), dict_factory=_Section)
            return base.from_dict(_merged(fields, self.model_fields(), ""))
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {error}") from None

    def model_fields(self) -> Any:
        """What the key ``model`` holds, or the file that it names; empty where there is neither."""
        path = self.path("model") if isinstance(self.model, str) else None
        return self.model or {} if path is None else _read_json(path)

    def settings(self) -> dict[str, Any]:
        """The keys that change the result, except those that name files, whose contents count instead."""
        return {item.name: getattr(self, item.name) for item in self._keys() if item.metadata["changes_result"]}


@dataclass(frozen=True, kw_only=True)
class SteppedConfig(RunConfig):
    """A run of so many optimizer steps, over which the learning rate rises and falls once."""

    steps: int = key(COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.warm_up < self.steps, f"warm_up: expected fewer than steps ({self.steps}), got {self.warm_up}")

    @property
    def total(self) -> int:
        """The key ``steps``."""
        return self.steps

    def schedule(self, step: int) -> tuple[int, int]:
        """One rise and fall over the whole run."""
        return step, self.steps


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(SteppedConfig):
    """A pretraining run of ONE-PEACE."""

    family: str = key(one_of([FAMILY]), FAMILY, changes_result=False)
    stage: str = key(one_of(STAGES))
    initial_scale: float = key(POSITIVE, 1.0, changes_result=False)  # nor does it where there is a checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.stage == "vision_language" or self.init is not None,
            "init: expected the model folder of a finished vision_language run where stage is audio_language, got none",
        )
        require(
            self.init is None or self.initial_scale == 1,
            f"initial_scale: expected none beside init, whose weights stay as they are, got {self.initial_scale}",
        )

    @property
    def modality(self) -> str:
        """What the stage pairs with text: image or audio."""
        return STAGES[self.stage]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, as in YAML 1.2, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: set[object] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # also of a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        raise ValueError(f"{path}: cannot be read: {reason}") from None


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The keys of a YAML file.

    Raises:
        ValueError: a file that cannot be read, or holds something else.
    """
    text = _read_text(path)
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{path}{where}: not valid YAML: {reason}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid YAML: sections within sections without end") from None
    require(isinstance(values, Mapping), f"{path}: expected a mapping of keys to values, got {describe(values)}")
    return values


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None


class _Section(dict[str, Any]):
    """The fields of a configuration; a mapping that is none is a value, such as MiCo's frames."""


def _merged(base: Mapping[str, Any], changes: Any, where: str) -> dict[str, Any]:
    """``base`` with the entries of ``changes``, section by section; a section that was None starts empty."""
    require(isinstance(changes, Mapping), f"{where or 'model'}: expected a section of fields, got {describe(changes)}")
    result = dict(base)
    for name, value in changes.items():
        old, place = base.get(name), f"{where}.{name}" if where else str(name)
        if isinstance(old, bool):
            require(isinstance(value, bool), f"{place}: expected true or false, got {describe(value)}")
        result[name] = _merged(old, value, place) if isinstance(old, _Section) and value is not None else value
    return result
