"""Image files: decoded to RGB, cropped or squashed to a square, normalised."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.data._image_files import check_gif, open_image, open_whole_jpeg, without_warnings
from onepeace_fast.data._optional import optional

if TYPE_CHECKING:
    from PIL.Image import Image

FITS = ("crop", "squash")
MAX_PIXELS = 89_000_000  # Pillow itself speaks of a decompression bomb from 89.5 million on
QUIETLY_DECODED = ("JPEG", "MPO", "PNG", "WEBP", "GIF")  # TIFF and ICO warn while they decode
CROP_SCALE = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# CLIP's statistics, as in ONE-PEACE's public code.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def read_image(path: str | os.PathLike[str]) -> Image:
    """Decode a file to an RGB Pillow image, turned as its EXIF orientation says; of an animation the first frame.

    Transparency is laid on white; 16 bits become their upper 8. The size is checked before anything is decoded.

    Raises:
        ValueError: no such file, not an image, broken, truncated or huge; one line naming the file.
        ImportError: Pillow is missing.
    """
    settings = optional("PIL.ImageFile")
    path = os.path.expanduser(os.fspath(path))
    require(os.path.isfile(path), lambda: f"{path}: expected an image file, got no file there")
    if settings.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            f"{path}: expected PIL.ImageFile.LOAD_TRUNCATED_IMAGES to be False, got True; it makes up what a file lacks"
        )
    with _decoding(path):
        image = open_image(path)
    with image:
        width, height = image.size
        require(
            width * height <= MAX_PIXELS,
            lambda: f"{path}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}; make it smaller",
        )
        with _decoding(path):
            if image.format == "PNG":  # whose checksums decoding does not look at
                with open_image(path) as checked:
                    checked.verify()
            elif image.format == "GIF":
                check_gif(Path(path).read_bytes())
            elif image.format in ("JPEG", "MPO"):
                image = open_whole_jpeg(Path(path).read_bytes())
            upright = _upright(image)
        check_depth(path, upright)
        with _decoding(path):
            hidden = _transparent_colour(path, image, upright)
            if hidden is None:
                return to_rgb(upright)
            del upright.info["transparency"]
            rgb = to_rgb(upright)
            rgb.paste("white", mask=hidden)
            return rgb


def prepare_image(
    image: Image, side: int, *, fit: str = "crop", generator: torch.Generator | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] = (MEAN, DEVIATION),
) -> Tensor:  # fmt: skip
    """Make a square, resampled bicubically and normalised: float32 [3, side, side].

    With fit="squash" the whole image becomes the square, whatever its shape, as in ONE-PEACE's public interface; with
    "crop" a part of it. With ``generator`` the crop is random: half of the area to all of it, aspect ratio 3:4 to 4:3,
    of a very long image less area. It is never mirrored, since captions speak of left and right. Without, it is the
    centre, as wide as the shorter side. ``statistics`` are mean and deviation of the three colours, from 0 to 1.

    Raises:
        ValueError: an image that is not RGB, a side that is no positive integer, another fit, or a random squash.
    """
    pillow = optional("PIL.Image")
    require(fit in FITS, lambda: f"fit: expected one of {', '.join(FITS)}, got {fit!r}")
    require(
        fit == "crop" or generator is None, "generator: expected None with fit='squash', got one; nothing is random"
    )
    require(type(side) is int and side > 0, lambda: f"side: expected a positive number of pixels, got {side!r}")
    require(
        isinstance(image, pillow.Image) and image.mode == "RGB",
        lambda: f"image: expected an RGB Pillow image, got {describe(image)}; read_image gives one",
    )
    box = None
    if fit == "crop":
        box = _centre_box(*image.size) if generator is None else _random_box(*image.size, generator)
    resized = image.resize((side, side), pillow.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(numpy.array(resized)).permute(2, 0, 1).float() / 255
    mean, deviation = (pixels.new_tensor(values).view(3, 1, 1) for values in statistics)
    return (pixels - mean) / deviation


def _centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    return left, top, left + shorter, top + shorter


def _random_box(width: int, height: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    area, ratio, across, down = torch.rand(4, generator=generator, dtype=torch.float64, device="cpu").tolist()
    area = width * height * (CROP_SCALE[0] + area * (CROP_SCALE[1] - CROP_SCALE[0]))
    ratio = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** ratio
    # The aspect ratio gives way to the area; only in a long image is the crop smaller.
    ratio = min(max(ratio, area / height**2), width**2 / area)
    ratio = min(max(ratio, CROP_RATIO[0]), CROP_RATIO[1])
    crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    fit = min(1.0, width / crop_width, height / crop_height)
    crop_width, crop_height = min(crop_width * fit, width), min(crop_height * fit, height)
    left, top = across * (width - crop_width), down * (height - crop_height)
    return left, top, min(left + crop_width, width), min(top + crop_height, height)


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    pillow = optional("PIL.Image")
    try:
        yield
    except pillow.DecompressionBombError as error:
        raise ValueError(f"{path}: expected at most {MAX_PIXELS:,} pixels, got more ({error})") from error
    except Exception as error:  # Pillow's decoders may raise anything
        reason = "not an image" if isinstance(error, pillow.UnidentifiedImageError) else " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected JPEG, PNG, WebP or another format that Pillow reads, got what does not decode as an "
            f"image ({reason or type(error).__name__})"
        ) from error


def _upright(image: Image) -> Image:
    if image.format in QUIETLY_DECODED:
        image.load()
    with without_warnings():
        return optional("PIL.ImageOps").exif_transpose(image)


def check_depth(path: str, image: Image) -> None:
    """Raise ``ValueError`` where an image has other than unsigned pixels of 8 or 16 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = cast("tuple[float, float]", image.getextrema())  # of its one channel
        require(
            image.mode != "F" and low >= 0 and high <= 65535,
            lambda: f"{path}: expected pixels of 8 or 16 bits, unsigned, got {low} to {high} (mode {image.mode})",
        )


def _transparent_colour(path: str, image: Image, upright: Image) -> Image | None:
    """The mask of the one transparent colour of a PNG without alpha, or None if it has none.

    Pillow compares that colour, which stands in the file's own depth, with the 8 bits that it made of it.
    """
    pillow = optional("PIL.Image")
    colour = upright.info.get("transparency")
    if image.format != "PNG" or upright.mode == "P" or not isinstance(colour, (int, tuple)):
        return None
    with open(path, "rb") as file:
        depth = file.read(25)[24]  # in IHDR, which comes first
    top = 2**depth - 1
    colour = numpy.array(colour, ndmin=1) & top
    pixels = numpy.asarray(upright, dtype=numpy.int64).reshape(upright.height, upright.width, -1)
    if depth < 8:
        colour = colour * (1 if upright.mode == "1" else 255 // top)
    elif depth == 16 and upright.mode == "RGB":
        lower: Any = open_image(path)  # of an open file, which has tiles
        with lower:
            # The same samples read with their bytes exchanged: Pillow keeps the first byte alone.
            lower.tile = [(*tile[:3], "RGB;16L") for tile in lower.tile]
            pixels = pixels * 256 + numpy.asarray(_upright(lower))
    return pillow.fromarray((pixels == colour).all(axis=2))


def to_rgb(image: Image) -> Image:
    """An image of any mode as RGB: transparency on white, of 16 bits the upper 8."""
    pillow = optional("PIL.Image")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        return pillow.fromarray((numpy.asarray(image) >> 8).astype("uint8")).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
