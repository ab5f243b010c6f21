"""What a sample of UnIVAL's tasks sees or hears: a feature map, or for a model with networks what these take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.data.audio import read_audio
from onepeace_fast.data.image import prepare_image, read_image

SAMPLE_RATE = 48000
HALVES = (0.5, 0.5, 0.5)  # mean and deviation of pixels, so that they go from -1 to 1
ARRAY = ".npy"
_MAPS = {
    "image": "[channels, height, width]", "video": "[channels, frames, height, width]",
    "audio": "[channels, height, width]",
}  # fmt: skip
_RAW = {"image": "[3, height, width]", "video": "[3, frames, height, width]", "audio": "[samples]"}


def read_array(path: Path) -> Tensor:
    """The array of a .npy file; ``ValueError`` where it is none."""
    try:
        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(
            f"{path}: expected an array, a {ARRAY} file, got another ({' '.join(str(error).split())})"
        ) from error


class Files(NamedTuple):
    """How files are read.

    Attributes:
        channels: of feature maps.
        networks: whether the model makes these itself, of pixels, frames and waveforms.
        image_size: the side in pixels that an image is squashed to.
        audio_seconds: what a clip is cut to from its start, or repeated to.
        check: called with the modality and what was read; ``ValueError`` where a model does not take it.
    """

    channels: int
    networks: bool = False
    image_size: int = 384
    audio_seconds: float = 10.0
    check: Callable[[str, Tensor], None] | None = None

    def read(self, path: Path, modality: str) -> Tensor:
        """A feature map of a .npy file, float32; with networks an image, a clip or a .npy of what these take.

        Raises:
            ValueError: another file, or an array of another layout, with other channels or with what is no number; or
                what the model does not take, such as a map larger than its positions.
        """
        found = self._read(path, modality)
        try:
            if self.check is not None:
                self.check(modality, found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return found

    def _read(self, path: Path, modality: str) -> Tensor:
        if path.suffix == ARRAY:
            return self._array(path, modality)
        require(
            self.networks,
            lambda: f"{path}: expected a feature map, a {ARRAY} file, for a model without networks, got another file",
        )
        require(modality != "video", lambda: f"{path}: expected frames {_RAW['video']} as a {ARRAY} file, got another")
        if modality == "image":
            return prepare_image(read_image(path), self.image_size, fit="squash", statistics=(HALVES, HALVES))
        clip, length = read_audio(path, sample_rate=SAMPLE_RATE), round(self.audio_seconds * SAMPLE_RATE)
        return clip.repeat(-(-length // len(clip)))[:length]

    def _array(self, path: Path, modality: str) -> Tensor:
        found = read_array(path)
        layout = (_RAW if self.networks else _MAPS)[modality]
        channels = 3 if self.networks else self.channels
        rank = layout.count(",") + 1
        what = "what networks take" if self.networks else "a feature map"
        fits = found.is_floating_point() and found.dim() == rank and found.numel() > 0
        require(
            fits and (rank == 1 or found.shape[0] == channels),
            lambda: (
                f"{path}: expected {what} of {modality}, floating point "
                f"{layout.replace('channels', str(channels))}, got {str(found.dtype).removeprefix('torch.')} "
                f"{list(found.shape)}"
            ),
        )
        found = found.float()
        require(bool(found.isfinite().all()), lambda: f"{path}: expected finite numbers, got some that are not")
        return found
