"""How well a UnIVAL checkpoint answers: of each task of a manifest, the share written word for word, and the loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from onepeace_fast.checks import require
from onepeace_fast.config import named_kind
from onepeace_fast.data.task_batches import TaskDataset, collate_tasks
from onepeace_fast.data.task_files import Files
from onepeace_fast.data.tasks import MATCHES, Vocabulary, read_tasks
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.models.unival import Trie, Unival, UnivalConfig
from onepeace_fast.models.unival.inputs import END, PADDING, require_seen
from onepeace_fast.models.upstream import CONFIG_FILE
from onepeace_fast.progress import progress
from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import TOKENIZER_FILE, TRAINING_FILE
from onepeace_fast.training.evaluation import require_trained, require_whole
from onepeace_fast.training.unival import modalities_of

BEAMS = 5


class TaskFigures(NamedTuple):
    """Of one task: how many samples, how many of them were answered word for word, and the mean loss of a token.

    ``choices`` is how many answers there were to choose from; None where any text could be written.
    """

    samples: int
    right: int
    loss: float
    choices: int | None


def kind_of(folder: Path) -> str | None:
    """Which kind of model a folder holds; None where none is named.

    Raises:
        ValueError: no folder of a model, or one whose configuration cannot be read; one line.
    """
    path = folder.expanduser() / CONFIG_FILE
    require(path.is_file(), f"{folder}: expected a folder that save() wrote, got one without {CONFIG_FILE}")
    return named_kind(path)


@torch.no_grad()
def evaluate_tasks(folder: Path, manifest: Path, batch_size: int) -> dict[str, TaskFigures]:
    """The figures of each task of a manifest.

    Questions are answered among all answers of the manifest's questions, matching by yes or no; all else is written
    freely, up to twice the longest answer. The search keeps five beams.

    Args:
        folder: a checkpoint.
        manifest: JSON lines, as in training.
        batch_size: samples at once.

    Raises:
        ValueError: what does not fit, in one line.
    """
    folder = folder.expanduser()
    require(
        (folder / TRAINING_FILE).is_file(),
        f"{folder}: expected a checkpoint of onepeace-fast train, got a folder without {TRAINING_FILE}",
    )
    require_whole(folder)  # before anything of it is read
    settings = checkpoint.load_state(folder)["settings"]
    config, bins = UnivalConfig.load(folder / CONFIG_FILE), settings["bins"]
    sizes = (config.feature_channels, config.networks, settings["image_size"], settings["audio_seconds"])
    files = Files(*sizes, functools.partial(require_seen, config))
    samples = read_tasks(manifest, bins=bins)
    require_trained(folder, ["text", *modalities_of(samples)])
    model = Unival.load(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.eval().to(device)
    vocabulary = Vocabulary(Tokenizer.load(folder / TOKENIZER_FILE), config.vocab_size, bins)
    longest = (config.max_source_positions, config.max_target_positions)
    dataset = TaskDataset(samples, vocabulary, files=files, longest=longest)
    return {task: _figures(model, vocabulary, dataset, task, batch_size) for task in samples}


def _figures(model: Unival, vocabulary: Vocabulary, dataset: TaskDataset, task: str, batch_size: int) -> TaskFigures:
    count = dataset.count(task)
    written = [tuple(dataset.answer(task, place).tolist()[:-1]) for place in range(count)]
    answers = {"matching": [tuple(vocabulary.tokens(match)[0]) for match in MATCHES], "vqa": written}.get(task)
    choices = None if answers is None else sorted({*answers})  # texts of the same tokens are one
    longest = max(len(text) + 1 for text in (*written, *(choices or ())))  # with its end
    limit = min(2 * longest if choices is None else longest, model.config.max_target_positions)
    right, tokens, loss = 0, 0, 0.0
    bar = progress(f"Answering {task}", "sample", count)
    for batch in _batches(dataset, task, batch_size, next(model.parameters()).device):
        target = batch.pop("target")
        length = int((target != PADDING).sum())
        loss, tokens = loss + length * model.loss(target=target, **batch).item(), tokens + length
        trie = None if choices is None else Trie(choices)
        found = model.generate(**batch, beams=BEAMS, max_length=limit, answers=trie)
        for own, wanted in zip(found, target.tolist(), strict=True):
            right += bool(own) and [*own[0].tokens, END] == [token for token in wanted if token != PADDING]
        bar.update(len(found))
    bar.close()
    return TaskFigures(count, right, loss / tokens, None if choices is None else len(choices))


def _batches(dataset: TaskDataset, task: str, batch_size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    places = [(task, place) for place in range(dataset.count(task))]
    chunks = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
    for batch in DataLoader(dataset, batch_sampler=chunks, collate_fn=collate_tasks):
        del batch["tasks"]
        yield {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
