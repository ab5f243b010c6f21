"""Texts, images and sounds as a model takes them, under the names of ONE-PEACE's public interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.config import AudioAdapterConfig
from onepeace_fast.data._optional import optional
from onepeace_fast.data.audio import prepare_waveform, read_audio
from onepeace_fast.data.batches import collate_clips
from onepeace_fast.data.image import FITS, check_depth, prepare_image, read_image, to_rgb
from onepeace_fast.data.text import Tokenizer, pad_tokens
from onepeace_fast.layers.adapters import frames_of

Sizes = tuple[Tensor, Tensor, Tensor]


class Processor:
    """Prepares inputs as ONE-PEACE's public code does; what it returns goes into ``OnePeacePretrain.embed``.

    Args:
        tokenizer: for texts, such as ``Tokenizer.from_gpt2`` gives; None where none are processed.
        image_size: pixels of a side, a multiple of 16.
        fit: "squash" as upstream, or "crop", the centre as wide as the shorter side.
        frames: the frames that a number of samples gives, such as ``AudioAdapter.frames``; by default the 4 B model's.
        device, dtype: of what is returned. ``dtype`` is that of images and sounds; token ids stay int64.

    Every method takes a list and raises ``ValueError`` in one line, which names the file, or the place in the list of
    what is no file. Missing packages raise ``ImportError``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        image_size: int = 256,
        *,
        fit: str = "squash",
        frames: Callable[[int], int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        require(fit in FITS, lambda: f"fit: expected one of {', '.join(FITS)}, got {fit!r}")
        require(
            type(image_size) is int and image_size > 0 and image_size % 16 == 0,
            lambda: f"image_size: expected a positive multiple of 16, got {image_size!r}",
        )
        require(
            isinstance(dtype, torch.dtype) and dtype.is_floating_point,
            lambda: f"dtype: expected a floating point torch.dtype, got {describe(dtype)}",
        )
        self.tokenizer, self.image_size, self.fit = tokenizer, image_size, fit
        self.frames = frames or partial(frames_of, layers=AudioAdapterConfig().feature_layers)
        self.device, self.dtype = torch.device(device or "cpu"), dtype

    def process_text(self, text_list: Sequence[str]) -> Tensor:
        """Token ids int64 [rows, length]: at most 70 tokens and END, then padding, token 1."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one for texts, got None; Tokenizer.from_gpt2 reads upstream's files")
        rows = []
        for place, text in enumerate(_listed("text_list", text_list)):
            require(isinstance(text, str), lambda place=place, text=text: _expected("text_list", place, "a str", text))
            try:
                rows.append(self.tokenizer.encode(text))
            except ValueError as error:
                raise ValueError(f"text_list[{place}]: {error}") from None
        return pad_tokens(rows)[0].to(self.device)

    def process_image(self, image_list: Sequence[Any], return_image_sizes: bool = False) -> Tensor | Sizes:
        """Images [rows, 3, image_size, image_size] from paths, Pillow images or uint8 arrays [height, width, 3].

        With ``return_image_sizes`` also the widths and heights before, int64 [rows] each. An image file is turned as
        its EXIF orientation says, and transparency lies on white, which upstream does not do.
        """
        images, sizes = [], []
        for place, item in enumerate(_listed("image_list", image_list)):
            image = _image(place, item)
            images.append(prepare_image(image, self.image_size, fit=self.fit))
            sizes.append(image.size)
        pixels = torch.stack(images).to(self.device, self.dtype)
        if not return_image_sizes:
            return pixels
        widths, heights = torch.tensor(sizes, device=self.device).unbind(1)
        return pixels, widths, heights

    def process_audio(self, audio_list: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Clips [rows, samples] from paths, or float32 tensors or arrays [samples] at 16 kHz, and their padding.

        The padding is bool [rows, 1 + frames], True where a clip has ended. ``clips`` gives them unpadded.
        """
        batch = collate_clips(self.clips(audio_list), self.frames)
        return batch["audio"].to(self.device, self.dtype), batch["audio_padding"].to(self.device)

    def clips(self, audio_list: Sequence[Any]) -> list[Tensor]:
        """Each clip for itself, float32 [samples] on the CPU, for ``onepeace_fast.models.clips.embed_clips``."""
        return [_clip(place, item) for place, item in enumerate(_listed("audio_list", audio_list))]

    def process_image_text_pairs(
        self, image_text_list: Sequence[tuple[Any, str]], return_image_sizes: bool = False
    ) -> tuple[Tensor | Sizes, Tensor]:
        """What ``process_image`` makes of the first of each pair, and ``process_text`` of the second."""
        for place, pair in enumerate(_listed("image_text_list", image_text_list)):
            require(
                isinstance(pair, (tuple, list)) and len(pair) == 2,
                lambda place=place, pair=pair: _expected("image_text_list", place, "(image, text)", pair),
            )
        texts = self.process_text([text for _, text in image_text_list])
        return self.process_image([image for image, _ in image_text_list], return_image_sizes), texts


def _listed(name: str, items: Sequence[Any]) -> Sequence[Any]:
    """The items; one alone is no list of them, though a str has a length."""
    require(
        isinstance(items, Sequence) and not isinstance(items, (str, bytes)) and len(items) > 0,
        lambda: f"{name}: expected a list with at least one, got {describe(items)}",
    )
    return items


def _expected(name: str, place: int, what: str, got: object) -> str:
    return f"{name}[{place}]: expected {what}, got {describe(got)}"


def _image(place: int, item: Any) -> Any:
    if isinstance(item, (str, os.PathLike)):
        return read_image(item)
    pillow = optional("PIL.Image")
    if isinstance(item, pillow.Image):
        name = f"image_list[{place}]"
        try:
            item.load()
        except Exception as error:  # Pillow's decoders may raise anything
            raise ValueError(f"{name}: expected an image that decodes, got another ({error})") from error
        check_depth(name, item)
        return to_rgb(item)
    require(
        isinstance(item, numpy.ndarray) and item.dtype == numpy.uint8 and item.ndim == 3 and item.shape[2] == 3,
        lambda: _expected("image_list", place, "a path, a Pillow image or a uint8 array [height, width, 3]", item),
    )
    require(item.size > 0, lambda: _expected("image_list", place, "pixels", item.shape))
    return pillow.fromarray(item)


def _clip(place: int, item: Any) -> Tensor:
    if isinstance(item, (str, os.PathLike)):
        name, waveform = os.fspath(item), read_audio(item)
    else:
        name = f"audio_list[{place}]"
        waveform = torch.from_numpy(item) if isinstance(item, numpy.ndarray) else item
        require(
            isinstance(waveform, Tensor),
            lambda: _expected("audio_list", place, "a path, or float32 samples at 16 kHz", item),
        )
    try:
        return prepare_waveform(waveform)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
