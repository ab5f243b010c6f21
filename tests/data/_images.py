"""Image files for tests, how they are read, and how a refusal looks."""

import struct
import warnings
import zlib

import numpy
from PIL import Image

from onepeace_fast.data.image import read_image

RED, WHITE = (200, 30, 10), (255, 255, 255)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def read_pixels(path):
    """Read a file with warnings as errors; its pixels, uint8 [height, width, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(path)
    assert image.mode == "RGB"
    return numpy.asarray(image)


def png(width, height, depth, kind, rows=b"", *, interlace=0, chunks=()):
    """A PNG of these rows, each with its filter's byte; without rows it has no pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows) if rows else b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def colours():
    """A small image of many colours, without noise."""
    x, y = numpy.meshgrid(numpy.arange(24), numpy.arange(16))
    return Image.fromarray(numpy.stack([x * 10, y * 15, 255 - x * 5], 2).astype("uint8"))
