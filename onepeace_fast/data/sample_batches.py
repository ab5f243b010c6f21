"""Batches of MiCo's samples: frames of files, texts, and what is hidden of captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from onepeace_fast.checks import require
from onepeace_fast.data.batches import first_whole, generator_of, reports
from onepeace_fast.data.image import prepare_image, read_image
from onepeace_fast.data.manifest import CAPTION
from onepeace_fast.data.samples import SUBTITLE, MixedSample, Seen
from onepeace_fast.data.task_files import ARRAY, read_array
from onepeace_fast.data.text import TokenizedCaptions
from onepeace_fast.data.word_pieces import BertTokenizer

SPECTROGRAMS = "audio"  # what has no files of images


class SampleDataset(Dataset[dict[str, Any]]):
    """Samples of any modalities; ``dataset[epoch, index]`` is one, ready for ``collate_samples``.

    What is hidden of a caption is a function of ``seed``, epoch and index alone; nothing else is random.

    Args:
        samples: of ``read_samples``.
        tokenizer: for the texts; only needed here.
        side: of frames, in pixels.
        longest: the most tokens of a text, both ends included; a longer one is cut, and how many were is logged.
        hide: hidden captions of integers [texts, length], with a generator, such as ``mask_captions``.
        seed: of what is hidden.
        broken: as for ``PairDataset``.

    Raises:
        ValueError: a text without a token, by file and line.
    """

    def __init__(
        self, samples: Sequence[MixedSample], tokenizer: BertTokenizer, *, side: int, longest: int,
        hide: Callable[..., tuple[Tensor, Tensor]], seed: int, broken: str = "fatal",
    ) -> None:  # fmt: skip
        self._samples, self._side, self._hide, self._seed = samples, side, hide, seed
        self._begin = torch.tensor([tokenizer.begin], device="cpu")
        self._subtitle_of = [place for place, sample in enumerate(samples) if sample.subtitle is not None]
        self._captions = _tokenized(CAPTION, [(sample.where, sample.caption) for sample in samples], tokenizer, longest)
        self._subtitles = _tokenized(
            SUBTITLE,
            [(samples[place].where, samples[place].subtitle or "") for place in self._subtitle_of],
            tokenizer,
            longest,
        )
        self._place_of = {place: row for row, place in enumerate(self._subtitle_of)}
        self._reported = reports(len(samples), broken)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """ "text" int64 [length], the same hidden as "masked" with "hidden" bool, "seen", {modality: float32 frames},
        and "subtitle" int64 [length] where there is one.

        Raises:
            BrokenFile: a file that does not fit, with broken="fatal"; with "skip" a hundred of them in a row.
        """
        epoch, index = key
        own = self._samples
        place, seen = first_whole(
            lambda place: {name: read_frames(own[place].where, name, seen, self._side)
                           for name, seen in own[place].seen.items()},
            index, len(own), self._reported, own[index].where,
        )  # fmt: skip
        text = self._with_begin(self._captions, place)
        masked, hidden = self._hide(text[None], generator=generator_of(self._seed, "hidden", epoch, index))
        found = {"text": text, "masked": masked[0], "hidden": hidden[0], "seen": seen}
        if place in self._place_of:
            found[SUBTITLE] = self._with_begin(self._subtitles, self._place_of[place])
        return found

    def _with_begin(self, texts: TokenizedCaptions, place: int) -> Tensor:
        return torch.cat([self._begin, texts[place][0]])


def _tokenized(
    what: str, texts: Sequence[tuple[str, str]], tokenizer: BertTokenizer, longest: int
) -> TokenizedCaptions:
    return TokenizedCaptions(
        [text for _, text in texts], tokenizer, max_tokens=longest - 2, end=tokenizer.end,
        name=lambda place: texts[place][0], what=what,
    )  # fmt: skip


def read_frames(where: str, modality: str, seen: Seen, side: int) -> Tensor:
    """The frames of a sample's files, float32 [frames, 3, side, side], or of one channel [frames, side, side].

    An image is squashed to a square and normalised as CLIP's; an array, a .npy file, is taken as it is.

    Raises:
        ValueError: a file that does not decode, or frames of unlike sizes; one line with the manifest's line.
    """
    try:
        return _read(modality, seen, side)
    except ValueError as error:
        raise ValueError(f"{where}: {seen.column}: {error}") from error


def _read(modality: str, seen: Seen, side: int) -> Tensor:
    first, *others = seen.paths
    if first.suffix == ARRAY:
        require(not others, lambda: f"expected one array of all frames, or images, got {1 + len(others)} files")
        frames = read_array(first)
        shape = tuple(frames.shape)
        fits = len(shape) in (3, 4) and shape[0] > 0 and shape[1:] in ((side, side), (3, side, side))
        require(
            fits and frames.is_floating_point(),
            lambda: (
                f"{first}: expected floating point frames [frames, 3, {side}, {side}], or of one channel "
                f"[frames, {side}, {side}], got {str(frames.dtype).removeprefix('torch.')} {list(shape)}"
            ),
        )
        frames = frames.float()  # where large float64 are infinite
        require(bool(frames.isfinite().all()), lambda: f"{first}: expected finite numbers, got some that are not")
        return frames
    require(
        modality != SPECTROGRAMS,
        lambda: f"{first}: expected spectrograms [frames, {side}, {side}], a {ARRAY} file, got another",
    )
    images = [read_image(path) for path in seen.paths]
    for path, image in zip(seen.paths, images, strict=True):
        require(
            image.size == images[0].size,
            lambda: (
                f"{path}: expected frames of one size, that of {first}, {images[0].width} x {images[0].height}, got "  # noqa: B023
                f"{image.width} x {image.height}"  # noqa: B023
            ),
        )
    return torch.stack([prepare_image(image, side, fit="squash") for image in images])


def collate_samples(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put samples together.

    Returns:
        "text" and "masked", int64 [samples, length], and "hidden", bool, padded with 0; "subtitle" int64
        [rows, length]; of each modality the rows' frames, as a list; and in "samples" whose each row is.
    """
    batch: dict[str, Any] = {name: _padded([item[name] for item in items]) for name in ("text", "masked", "hidden")}
    samples: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        for name, frames in item["seen"].items():
            batch.setdefault(name, []).append(frames)
            samples.setdefault(name, []).append(place)
    subtitles = {place: item[SUBTITLE] for place, item in enumerate(items) if SUBTITLE in item}
    if subtitles:
        batch[SUBTITLE], samples[SUBTITLE] = _padded([*subtitles.values()]), [*subtitles]
    return {**batch, "samples": samples}


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True)
