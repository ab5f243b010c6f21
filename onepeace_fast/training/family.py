"""What a run of a family of models is made of; ``start`` puts the parts together."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from onepeace_fast.checks import require
from onepeace_fast.config import ModelConfig
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.models.parameter_names import upstream_names
from onepeace_fast.models.upstream import CONFIG_FILE
from onepeace_fast.training import checkpoint
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.trainer import Trainer


class Family(ABC):
    """A run of one kind of model, over entries that were read of its manifest."""

    default_model: ClassVar[ModelConfig]
    tokenizer_class: ClassVar[type[Tokenizer]] = Tokenizer

    def __init__(self, config: Any, entries: Any) -> None:
        self.config, self.entries = config, entries

    @classmethod
    @abstractmethod
    def read(cls, config: Any) -> Any:
        """The entries of the configuration's manifest; ``ValueError`` where one does not fit."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many entries there are."""

    @abstractmethod
    def described(self) -> str:
        """What is trained on what, for the line that a run begins with."""

    @abstractmethod
    def texts(self) -> Iterable[str]:
        """What a tokenizer is trained on."""

    @classmethod
    def sizes(cls, config: Any, folder: Path | None) -> Any:
        """Those of a model: a folder's with what the configuration gives instead, or the default ones'.

        Raises:
            ValueError: a folder without a configuration, or one that does not fit.
        """
        if folder is None:
            return config.model_config(cls.default_model)
        path = folder / CONFIG_FILE
        require(path.is_file(), f"init: expected the folder of a model, got {folder} without {CONFIG_FILE}")
        try:
            base = type(cls.default_model).load(path)
        except ValueError as error:
            name = "" if str(error).startswith(str(path)) else f"{path}: "
            raise ValueError(f"init: {name}{error}") from None
        return config.model_config(base)

    @property
    def reserved_rows(self) -> int:
        """Rows of the table of tokens that are not the tokenizer's."""
        return 0

    def sized(self, model: Any, fields: Mapping[str, Any], tokenizer: Tokenizer) -> Any:
        """The sizes with as many rows of tokens as there are, unless ``fields`` give another number."""
        if self.config.tokenizer and "vocab_size" in fields:
            return model
        return dataclasses.replace(model, vocab_size=tokenizer.vocab_size + self.reserved_rows)

    def require_fit(self, model: Any, tokenizer: Tokenizer) -> None:
        """Raise ``ValueError`` where the model cannot be trained so, or has fewer rows than there are tokens."""
        rows = model.vocab_size - self.reserved_rows
        require(
            tokenizer.vocab_size <= rows,
            f"tokenizer: expected at most the model's vocab_size, {rows}, got {tokenizer.vocab_size} tokens",
        )

    @abstractmethod
    def build(self, model: Any) -> Any:
        """A fresh model, of whose weights nothing is loaded yet."""

    def prepare(self, model: Any) -> None:
        """Choose what trains, after an initial model was loaded and before a checkpoint is; by default all."""
        return

    @abstractmethod
    def modalities(self, model: Any) -> Sequence[str]:
        """Those of a model."""

    @abstractmethod
    def added(self, weights: Mapping[str, Tensor], model: Any) -> list[str]:
        """The modalities of the model that have no weights in those of the initial one."""

    @abstractmethod
    def trainer(self, model: Any, processes: Processes) -> Trainer:
        """What takes the steps."""

    @abstractmethod
    def trained(self, step: int) -> set[str]:
        """The modalities that the first ``step`` steps of this run train."""

    @abstractmethod
    def reading(self, model: Any, tokenizer: Tokenizer, processes: Processes, step: int) -> Reading:
        """From where the batches of the steps from ``step`` on come."""

    def fresh(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fresh parameters of modalities that the initial model does not have at all."""
        names = self.added(weights, model.config)
        parameters = upstream_names(model)
        return {key: value.detach() for key, value in parameters.items() if any(f"{name}_" in key for name in names)}

    def trained_before(self, model: Any, folder: Path | None) -> set[str]:
        """The modalities that the checkpoint or the initial model was trained on: all, where nothing records it."""
        place = self.config.path("init") if folder is None else folder
        if place is None:
            return set()
        recorded = (place / checkpoint.TRAINING_FILE).is_file()
        before = checkpoint.load_state(place).get("trained") if recorded else None
        return set(self.modalities(type(model).load(place / CONFIG_FILE)) if before is None else before)

    def batches(self, model: Any, tokenizer: Tokenizer, processes: Processes, step: int) -> Iterator[dict[str, Any]]:
        """The batches of the steps from ``step`` on."""
        dataset, sampler, together = self.reading(model, tokenizer, processes, step)
        return iter(
            DataLoader(
                dataset,
                batch_sampler=sampler,
                collate_fn=together,
                num_workers=self.config.workers,
                pin_memory=processes.device.type == "cuda",
                generator=torch.Generator(),  # the default one draws DropPath
            )
        )


Reading = tuple[Dataset[Any], Sampler[Any], Any]
