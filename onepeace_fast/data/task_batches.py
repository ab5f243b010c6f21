"""Batches of UnIVAL's tasks: equally many samples of each, whatever the sizes of their data sets.

The samples of a step depend on the seed and its number alone, not on workers, processes or where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from onepeace_fast.checks import require
from onepeace_fast.data.batches import BROKEN, BrokenFile, first_whole, generator_of, reports
from onepeace_fast.data.task_files import Files
from onepeace_fast.data.tasks import TASKS, Sample, Vocabulary
from onepeace_fast.data.text import TokenizedCaptions
from onepeace_fast.layers.adapters import PADDING_TOKEN


class Part(NamedTuple):
    """A stretch of a curriculum: so many batches, each of these tasks."""

    tasks: Sequence[str]
    batches: int


class TaskSampler(Sampler[list[tuple[str, int]]]):
    """The (task, index) pairs of one process's batches, one stage after another to the last.

    Every batch has equally many samples of each of its stage's tasks. A task's samples come in epochs of their own,
    each a new permutation; where one ends within a batch the next begins, so a small set repeats sooner. A later stage
    goes on where the task stopped. All processes together take the same samples at a step as one would with their batch
    sizes added up.

    Args:
        counts: samples of each task.
        stages: of the curriculum.
        batch_size: samples of one process in a batch.
        seed: of the permutations.
        rank, world_size: this process and how many there are.
        start: the first batch, counted from 0, to resume at.

    Raises:
        ValueError: a batch that does not hold equally many of each task.
    """

    def __init__(
        self, counts: Mapping[str, int], stages: Sequence[Part], batch_size: int, seed: int, rank: int = 0,
        world_size: int = 1, start: int = 0,
    ) -> None:  # fmt: skip
        for stage in stages:
            require_equal_shares(batch_size, stage.tasks)
        self.counts, self.stages, self.batch_size, self.seed = counts, stages, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[str, int]]]:
        orders = {task: _Order(task, count, self.seed) for task, count in self.counts.items()}
        taken = dict.fromkeys(self.counts, 0)
        number = 0
        for stage in self.stages:
            share = self.batch_size // len(stage.tasks)
            for _ in range(stage.batches):
                if number >= self.start:
                    first = share * self.rank
                    yield [
                        (task, orders[task][taken[task] + place])
                        for task in stage.tasks
                        for place in range(first, first + share)
                    ]
                for task in stage.tasks:
                    taken[task] += share * self.world_size
                number += 1


class _Order:
    """The indices of a task's samples, epoch after epoch; one epoch is kept."""

    def __init__(self, task: str, count: int, seed: int) -> None:
        self.task, self.count, self.seed = task, count, seed
        self._epoch, self._indices = -1, torch.empty(0, device="cpu")

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, self.count)
        if epoch != self._epoch:
            generator = generator_of(self.seed, f"order of {self.task}", epoch)
            self._epoch, self._indices = epoch, torch.randperm(self.count, generator=generator, device="cpu")
        return int(self._indices[within])


def require_equal_shares(batch_size: int, tasks: Sequence[str]) -> None:
    """Raise ``ValueError`` where a batch cannot hold equally many samples of each task."""
    require(
        batch_size % len(tasks) == 0,
        f"batch_size: expected a multiple of {len(tasks)}, so that each of {', '.join(tasks)} has as many samples, got "
        f"{batch_size}",
    )


class TaskDataset(Dataset[dict[str, Any]]):
    """Questions about files and their answers; ``dataset[task, index]`` is one, ready for ``collate_tasks``.

    Args:
        samples: of ``read_tasks``.
        vocabulary: for the texts, which are encoded once.
        files: how they are read.
        longest: the most tokens of a question, its beginning and end counted, and of an answer with its end; a longer
            one is cut, and how many were is logged.
        broken: as for ``PairDataset``; the next sample of the task takes a broken one's place.

    Raises:
        ValueError: a text without a token, or with a location that there is none of.
    """

    def __init__(
        self, samples: Mapping[str, Sequence[Sample]], vocabulary: Vocabulary, *, files: Files,
        longest: tuple[int, int], broken: str = "fatal",
    ) -> None:  # fmt: skip
        require(broken in BROKEN, lambda: f"broken: expected one of {', '.join(BROKEN)}, got {broken!r}")
        self._files, self._samples = files, samples
        self._texts: dict[str, tuple[TokenizedCaptions, TokenizedCaptions]] = {}
        self._reported = {}
        for task, own in samples.items():

            def name(place: int, own: Sequence[Sample] = own) -> str:
                return f"{own[place].path}, line {own[place].line} of the manifest"

            asked, written = ([getattr(sample, kind) for sample in own] for kind in ("question", "answer"))
            self._texts[task] = (
                TokenizedCaptions(asked, vocabulary, max_tokens=longest[0] - 2, name=name),
                TokenizedCaptions(written, vocabulary, max_tokens=longest[1] - 1, name=name),
            )
            self._reported[task] = reports(len(own), broken)

    def __len__(self) -> int:
        return sum(map(len, self._samples.values()))

    def count(self, task: str) -> int:
        """How many samples a task has."""
        return len(self._samples[task])

    def answer(self, task: str, index: int) -> Tensor:
        """What is to be written, int64 [length], its end included."""
        return self._texts[task][1][index][0]

    def __getitem__(self, key: tuple[str, int]) -> dict[str, Any]:
        """ "source" and "target" int64 [length], ends included, "task", "path", and "seen" float32, of the file.

        Raises:
            BrokenFile: a file that does not fit, with broken="fatal"; with "skip" a hundred of them in a row.
        """
        task, index = key
        own, modality = self._samples[task], TASKS[task].modality
        place, found = first_whole(
            lambda place: self._files.read(own[place].path, modality), index, len(own), self._reported[task],
            own[index].path,
        )  # fmt: skip
        source, target = (texts[place][0] for texts in self._texts[task])
        begin = source.new_zeros(1)
        return {
            "task": task, "path": own[place].path, "source": torch.cat([begin, source]), "target": target,
            "seen": found,
        }  # fmt: skip


def collate_tasks(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put samples of any tasks together.

    Returns:
        "source" and "target", int64 [samples, length], padded with token 1; what each modality's files hold,
        float32 [rows, ...], and in "samples" which sample each of them belongs to; "tasks", each sample's.

    Raises:
        BrokenFile: files of one modality that differ in size.
    """
    seen: dict[str, list[Tensor]] = {}
    samples: dict[str, list[int]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for place, item in enumerate(items):
        modality = TASKS[item["task"]].modality
        before = first.setdefault(modality, item)
        if item["seen"].shape != before["seen"].shape:
            raise BrokenFile(
                f"{item['path']}: expected what is as large as that of {before['path']}, with which it shares a "
                f"batch, {list(before['seen'].shape)}, got {list(item['seen'].shape)}"
            )
        seen.setdefault(modality, []).append(item["seen"])
        samples.setdefault(modality, []).append(place)
    texts = {name: _padded([item[name] for item in items]) for name in ("source", "target")}
    return {
        **texts, **{name: torch.stack(own) for name, own in seen.items()}, "samples": samples,
        "tasks": [item["task"] for item in items],
    }  # fmt: skip


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PADDING_TOKEN)
