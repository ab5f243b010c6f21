"""Runs of UnIVAL (arXiv 2307.16184): tasks in equal shares, stage after stage."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.data.task_batches import TaskDataset, TaskSampler, collate_tasks
from onepeace_fast.data.task_files import Files
from onepeace_fast.data.tasks import TASKS, Sample, Vocabulary, read_tasks, without_locations
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.models.parameter_names import upstream_names
from onepeace_fast.models.unival import Unival, UnivalConfig
from onepeace_fast.models.unival.config import VISUAL
from onepeace_fast.models.unival.inputs import PADDING, require_seen
from onepeace_fast.models.unival.state import TIED
from onepeace_fast.training import checkpoint
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.family import Family, Reading
from onepeace_fast.training.optimizer import adamw
from onepeace_fast.training.trainer import Trainer
from onepeace_fast.training.unival_config import UnivalTrainingConfig

BETAS = (0.9, 0.999)  # upstream's
UPSTREAM_ROWS = 59457  # tokens, 8192 codes of images and 1000 locations


class UnivalTrainer(Trainer):
    """Steps of a curriculum; every stage begins with an optimizer of its own, over what its tasks read."""

    def make_optimizer(self) -> torch.optim.AdamW:
        """That of the next step's stage. All parameters decay, as upstream's do; what no task reads does not train."""
        config, model = self.config, cast(Unival, self.model)
        stage, _ = config.stage_of(self.step_number)
        read = modalities_of(config.stages[stage]["tasks"])
        unread = tuple(start for name in VISUAL if name not in read for start in _own_names(name))
        uncoded = {*model.decoder.unread({"text": cast(Any, None)})}  # no task writes codes of images
        for name, parameter in upstream_names(model).items():
            parameter.requires_grad_(parameter not in uncoded and not name.startswith(unread))
        return adamw(self.model, config.learning_rate, config.weight_decay, betas=BETAS, spared=lambda *_: False)

    def step(self, batches: Iterator[Mapping[str, Any]]) -> dict[str, float]:
        """As ``Trainer.step``; the last one of a stage leaves the next one's optimizer."""
        numbers = super().step(batches)
        (before, _), (now, _) = (self.config.stage_of(step) for step in (self.step_number - 1, self.step_number))
        if now != before:
            self.optimizer = self.make_optimizer()
        return numbers

    def weights(self) -> dict[str, Tensor]:
        """As ``Trainer.weights``, with what else upstream's state dict holds, but for copies of the token table."""
        found = cast(Unival, self.model).to_upstream_state_dict()
        return self._gather({name: value for name, value in found.items() if name not in TIED and value is not None})

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The mean over the tokens of all processes, of which this one's share is weighted by how many it has."""
        config = self.config
        inputs = {name: batch[name] for name in ("source", "target", "samples", *VISUAL) if name in batch}
        inputs |= {"smoothing": config.smoothing, "encouraging": config.encouraging}
        tokens = (batch["target"] != PADDING).sum().double()
        share = tokens / self.processes.average(tokens.clone())
        return {"loss": self.pass_forward("loss", inputs) * share.item()}


def _own_names(modality: str) -> list[str]:
    """How the names of a modality's own parameters begin."""
    return [f"encoder.{modality}_proj.", f"encoder.embed_{modality}s.", f"encoder.embed_{modality}_positions."]


def modalities_of(tasks: Iterable[str]) -> list[str]:
    """What tasks see and hear, in the order of a sequence."""
    read = {TASKS[task].modality for task in tasks}
    return [name for name in VISUAL if name in read]


class Tasks(Family):
    """Questions about feature maps, and their answers."""

    config: UnivalTrainingConfig
    entries: Mapping[str, Sequence[Sample]]
    default_model = UnivalConfig(vocab_size=UPSTREAM_ROWS)

    @classmethod
    def read(cls, config: UnivalTrainingConfig) -> dict[str, list[Sample]]:
        """As ``read_tasks``, the tasks of all stages."""
        return read_tasks(config.path("manifest"), bins=config.bins, missing=config.missing, wanted=config.tasks)

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(map(len, self.entries.values()))

    def described(self) -> str:
        """The tasks and how many samples each has."""
        found = ", ".join(f"{task} ({len(self.entries[task]):,})" for task in self.config.tasks)
        return f"{found} in {len(self.config.stages)} {'stage' if len(self.config.stages) == 1 else 'stages'}"

    def texts(self) -> Iterable[str]:
        """Questions and answers without locations."""
        return (without_locations(text) for own in self.entries.values() for one in own for text in one[1:3])

    @property
    def reserved_rows(self) -> int:
        """Those of locations."""
        return self.config.bins

    def require_fit(self, model: UnivalConfig, tokenizer: Tokenizer) -> None:
        """Raise ``ValueError`` where the model lacks a modality of a task."""
        absent = [name for name in modalities_of(self.config.tasks) if name not in model.modalities]
        names = ", ".join(absent)
        require(not absent, f"model: expected {names} for the tasks, got a model without; give {names}: true")
        place, bins = self.config.path("init"), self.config.bins
        words, rows = tokenizer.vocab_size, model.vocab_size
        require(
            words + bins <= rows,
            f"vocab_size: expected at least {words + bins}, {words} tokens and {bins} locations, got {rows}",
        )
        if place is not None and (place / checkpoint.TRAINING_FILE).is_file():  # with others every location is shifted
            trained = checkpoint.load_state(place)["settings"].get("bins", bins)
            require(trained == bins, f"bins: expected {trained}, with which {place} was trained, got {bins}")
        super().require_fit(model, tokenizer)

    def build(self, model: UnivalConfig) -> Unival:
        """A fresh model."""
        return Unival(model, self.config.backend)

    def modalities(self, model: UnivalConfig) -> Sequence[str]:
        """Text too."""
        return ("text", *model.modalities)

    def added(self, weights: Mapping[str, Tensor], model: UnivalConfig) -> list[str]:
        """Those without a projection."""
        return [name for name in model.modalities if f"encoder.{name}_proj.weight" not in weights]

    def fresh(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also the networks of added modalities, with their running statistics."""
        model = cast(Unival, model)
        starts = tuple(start for name in self.added(weights, model.config) for start in _own_names(name))
        found = model.to_upstream_state_dict()
        return {name: value for name, value in found.items() if value is not None and name.startswith(starts)}

    def trainer(self, model: Unival, processes: Processes) -> UnivalTrainer:
        """At the first stage."""
        return UnivalTrainer(model, self.config, processes)

    def trained(self, step: int) -> set[str]:
        """What the stages that have begun read."""
        last, _ = self.config.stage_of(max(step - 1, 0))
        return {"text", *modalities_of(task for stage in self.config.stages[: last + 1] for task in stage["tasks"])}

    def reading(self, model: UnivalConfig, tokenizer: Tokenizer, processes: Processes, step: int) -> Reading:
        """Equal shares of the tasks."""
        config = self.config
        check = functools.partial(require_seen, model)
        files = Files(model.feature_channels, model.networks, config.image_size, config.audio_seconds, check)
        dataset = TaskDataset(
            self.entries, Vocabulary(tokenizer, model.vocab_size, config.bins), files=files,
            longest=(model.max_source_positions, model.max_target_positions), broken=config.broken,
        )  # fmt: skip
        counts = {task: len(own) for task, own in self.entries.items()}
        first = step * config.accumulation
        sampler = TaskSampler(
            counts, config.parts, config.batch_size, config.seed, processes.rank, processes.count, first
        )
        return dataset, sampler, collate_tasks
