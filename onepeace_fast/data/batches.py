"""Batches of pairs: which ones belong to a step, how they are read and put together.

    sampler = BatchSampler(len(dataset), batch_size, seed, rank, world_size, start_step)
    DataLoader(dataset, batch_sampler=sampler, collate_fn=partial(collate, frames=adapter.frames), num_workers=4)

The pairs of a step depend on the seed and its number alone, not on workers, ranks or where a run was resumed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from onepeace_fast.checks import describe, require
from onepeace_fast.data._optional import optional
from onepeace_fast.data.audio import pad_waveforms, prepare_waveform, read_audio
from onepeace_fast.data.image import prepare_image, read_image
from onepeace_fast.data.manifest import Entry
from onepeace_fast.data.text import MAX_TOKENS, TokenizedCaptions, Tokenizer, pad_tokens

BROKEN = ("fatal", "skip")
MAX_BROKEN_IN_A_ROW = 100
_PACKAGES = {"image": ("PIL.Image",), "audio": ("soundfile", "scipy.signal")}

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class BrokenFile(ValueError):
    """A file that cannot be used; its message stays one line when a DataLoader's worker hands it on."""

    def __init__(self, message: str) -> None:
        # The loader makes a new one out of the worker's whole traceback, whose last line is the message.
        super().__init__(message.strip().rpartition("\n")[2].removeprefix(f"{type(self).__module__}.BrokenFile: "))


class PairDataset(Dataset[dict[str, Tensor]]):
    """Captions and their images or clips; ``dataset[epoch, index]`` is a pair, ready for ``collate``.

    Augmentation is a function of ``seed``, epoch and index alone. Captions are encoded once, at the start.

    Args:
        entries: of ``read_manifest``.
        tokenizer: for the captions; only needed here.
        modality: "image" or "audio".
        side: of the images, in pixels; None for audio.
        seed: of the augmentation; None: no augmentation, for held-out pairs.
        broken: about a file that does not decode. "fatal": ``BrokenFile``; "skip": the next pair takes its place, and
            one line is logged for each such file.
        max_tokens: a longer caption is cut; how many were is logged.

    Raises:
        ValueError: an argument that does not fit, or a caption without text.
        ImportError: a package that reads these files is missing.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        modality: str,
        *,
        side: int | None,
        seed: int | None,
        broken: str = "fatal",
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        require(modality in _PACKAGES, lambda: f"modality: expected one of {', '.join(_PACKAGES)}, got {modality!r}")
        require(broken in BROKEN, lambda: f"broken: expected one of {', '.join(BROKEN)}, got {broken!r}")
        image = modality == "image"
        require(
            type(side) is int and side > 0 if image else side is None,
            lambda: f"side: expected {'a positive number of pixels' if image else 'None'} for {modality}, got {side!r}",
        )
        require(len(entries) > 0, "entries: expected at least one, got none")
        for package in _PACKAGES[modality]:
            optional(package)
        self.modality, self.side, self.seed = modality, side, seed
        self._entries = entries
        self._captions = TokenizedCaptions(
            [entry.caption for entry in entries],
            tokenizer,
            max_tokens=max_tokens,
            name=lambda place: f"{entries[place].path}, line {entries[place].line} of the manifest",
        )
        self._reported = reports(len(entries), broken)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """The pair ``index`` in an epoch: "text" int64 [length], "word_starts" bool [length], and either "image"
        float32 [3, side, side] or "audio" float32 [samples].

        Raises:
            BrokenFile: a file that does not decode, with broken="fatal"; with "skip" a hundred of them in a row.
        """
        require(
            isinstance(key, tuple) and len(key) == 2 and 0 <= key[1] < len(self),
            lambda: f"key: expected (epoch, index), an index below {len(self)}, got {key!r}; a BatchSampler gives them",
        )
        epoch, index = key
        place, media = first_whole(
            lambda place: self._read(epoch, place), index, len(self), self._reported, self._entries[index].path
        )
        text, word_starts = self._captions[place]
        return {"text": text, "word_starts": word_starts, self.modality: media}

    def _read(self, epoch: int, index: int) -> Tensor:
        generator = None if self.seed is None else generator_of(self.seed, "augmentation", epoch, index)
        return _read_file(self._entries[index].path, self.side, generator)


def reports(count: int, broken: str) -> Tensor | None:
    """Which files were reported as broken, shared by a loader's workers; None where a broken one stops all."""
    return torch.zeros(count, dtype=torch.bool, device="cpu").share_memory_() if broken == "skip" else None


def first_whole(
    read: Callable[[int], Result], index: int, count: int, reported: Tensor | None, first: Path | str
) -> tuple[int, Result]:
    """The first place from ``index`` on, round ``count``, that can be read, and what was read there.

    Args:
        read: what a place has; ``ValueError`` where its file does not decode.
        reported: of ``reports``; each file is logged once.
        first: what a message calls ``index``.

    Raises:
        BrokenFile: a file that does not decode, without ``reported``; else a hundred of them in a row.
    """
    attempts = min(MAX_BROKEN_IN_A_ROW, count)
    for place in (step % count for step in range(index, index + attempts)):
        try:
            return place, read(place)
        except ValueError as error:
            if reported is None:
                raise BrokenFile(str(error)) from error
            if not reported[place]:
                reported[place] = True
                _log.warning("%s; the next pair takes its place", error)
    raise BrokenFile(f"{first}: expected fewer broken files, got {attempts} in a row from this one on")


class FileDataset(Dataset[Tensor]):
    """Images, or clips where ``side`` is None, without captions or augmentation: float32 as in a ``PairDataset``.

    ``dataset[index]`` raises ``BrokenFile`` where a file does not decode.
    """

    def __init__(self, paths: Sequence[Path], side: int | None) -> None:
        for package in _PACKAGES["audio" if side is None else "image"]:
            optional(package)
        self._paths, self.side = paths, side

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return _read_file(self._paths[index], self.side, None)
        except ValueError as error:
            raise BrokenFile(str(error)) from error


def _read_file(path: Path, side: int | None, generator: torch.Generator | None) -> Tensor:
    """An image [3, side, side], or a clip [samples] where ``side`` is None."""
    try:
        if side is not None:
            return prepare_image(read_image(path), side, generator=generator)
        return prepare_waveform(read_audio(path), generator=generator)
    except ValueError as error:
        line = str(error)
        raise ValueError(line if line.startswith(str(path)) else f"{path}: {line}") from error


def collate(items: Sequence[Mapping[str, Tensor]], *, frames: Callable[[int], int] | None = None) -> dict[str, Any]:
    """Put pairs of one modality together.

    Args:
        items: pairs of a ``PairDataset``.
        frames: for audio, the frames that a number of samples gives, such as ``AudioAdapter.frames``.

    Raises:
        ValueError: audio without ``frames``.

    Returns:
        "text" int64 [rows, length] and "word_starts" bool [rows, length], neither with CLS; END is inside and begins no
        word, padding is token 1. Then "image" float32 [rows, 3, side, side], or "audio" float32 [rows, samples],
        "audio_padding" bool [rows, 1 + frames], CLS first, True at padding, and "frames", each row's, as a list.
    """
    text, word_starts = pad_tokens([(item["text"], item["word_starts"]) for item in items])
    batch = {"text": text, "word_starts": word_starts}
    if "image" in items[0]:
        return {**batch, "image": torch.stack([item["image"] for item in items])}
    if frames is None:
        raise ValueError("frames: expected a function from samples to frames, as AudioAdapter.frames, got None")
    return batch | collate_clips([item["audio"] for item in items], frames)


def collate_clips(clips: Sequence[Tensor], frames: Callable[[int], int]) -> dict[str, Any]:
    """The entries "audio", "audio_padding" and "frames" of ``collate`` from clips, float32 [samples] each."""
    audio, samples = pad_waveforms(clips)
    lengths = [frames(count) for count in samples]
    places = torch.arange(1 + max(lengths), device="cpu")
    padding = places > torch.tensor(lengths, device="cpu")[:, None]
    return {"audio": audio, "audio_padding": padding, "frames": lengths}


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) pairs of one rank's batches, step after step without end.

    Every epoch is a new permutation of all pairs; those after its last whole batch wait for another epoch. All ranks
    together take the same pairs at a step as one rank would with their batch sizes added up.

    Args:
        count: pairs in the dataset.
        batch_size: pairs of one rank at a step.
        seed: of the permutations.
        rank, world_size: this process and how many there are.
        start_step: the first step, counted from 0, to resume at.

    Raises:
        ValueError: an argument that does not fit, or fewer pairs than all ranks take at one step.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start_step: int = 0
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("start_step", start_step, 0),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected {least} or more, got {describe(value)}")
        require(0 <= rank < world_size, lambda: f"rank: expected 0 to {world_size - 1}, got {rank}")
        if batch_size * world_size > count:
            raise ValueError(
                f"batch_size: expected at most the {count} pairs of the dataset in all, got {batch_size} on each of "
                f"{world_size} ranks; make it smaller"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of all ranks in one epoch."""
        return self.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = divmod(self.start_step, self.steps_per_epoch)
        while True:
            order = torch.randperm(self.count, generator=generator_of(self.seed, "order", epoch), device="cpu")
            for place in range(step, self.steps_per_epoch):
                first = (place * self.world_size + self.rank) * self.batch_size
                yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]
            epoch, step = epoch + 1, 0


def generator_of(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on these arguments alone, and on each of them."""
    key = " ".join([purpose, *(str(int(number)) for number in (seed, *numbers))])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
