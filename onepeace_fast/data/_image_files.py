"""Checks of images whose decoders make up what a file lacks and say nothing.

libjpeg fills a scan that ends early with grey, and shows a progressive image without its last scans as a coarse one.
Pillow decodes the zeros of a GIF that was never written to its end as pixels.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy

from onepeace_fast.data._optional import optional

if TYPE_CHECKING:
    from PIL.Image import Image

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan only restarts and escaped bytes are none
_END, _SCAN = 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
# libjpeg reads this far ahead of a scan's last bit. No Huffman code consists of ones.
_AHEAD = b"\xff\x00" * 8
_PROBE = bytes(181 * place % 251 for place in range(1, 65))  # any bytes, but no marker
# The filters of warnings are the process's: of two threads that change them, one restores what the other has set.
_FILTERS = threading.Lock()
if hasattr(os, "register_at_fork"):
    # Else a process that is forked meanwhile, such as a loader's, would wait for a thread that it does not have.
    os.register_at_fork(before=_FILTERS.acquire, after_in_parent=_FILTERS.release, after_in_child=_FILTERS.release)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Pillow's are of damaged EXIF, and of sizes, which are checked here. For one thread at a time: not to decode."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(source: str | BytesIO) -> Image:
    """Pillow's ``open``, which reads no pixels, without its warnings."""
    with without_warnings():
        return optional("PIL.Image").open(source)


def open_whole_jpeg(data: bytes) -> Image:
    """Open a JPEG, or the first image of an MPO, so that only a whole one can be loaded.

    libjpeg gets a single scan without the marker behind it, and waits for what is missing. Several scans are decoded
    twice, the second time with more bytes behind each, which change a scan that ended early and no other. An end within
    the last two blocks (8 x 8 pixels) of a single scan goes unseen.

    Raises:
        OSError: bytes, scans or the end are missing.
    """
    frame, ends, lacking = _read_jpeg(data)
    if lacking:
        raise OSError("its last scans are missing")
    if frame in _SEQUENTIAL and len(ends) == 1:
        return open_image(BytesIO(data[: ends[0]] + _AHEAD))
    image = open_image(BytesIO(data))
    if frame in (*_SEQUENTIAL, _PROGRESSIVE):
        pieces = [data[start:end] for start, end in pairwise([0, *ends, len(data)])]
        with open_image(BytesIO(_PROBE.join(pieces))) as probed:
            if not numpy.array_equal(numpy.asarray(image), numpy.asarray(probed)):
                raise OSError("a scan ends early")
    return image


def _read_jpeg(data: bytes) -> tuple[int, list[int], bool]:
    """The kind of a JPEG's frame, where each scan ends, and whether scans of some coefficients are missing."""
    place, frame, components = 2, 0, b""
    ends: list[int] = []
    exact: set[tuple[int, int]] = set()
    while (marker := _MARKER.search(data, place)) is not None:
        code, place = marker[0][1], marker.end()
        if ends and ends[-1] < 0:
            ends[-1] = marker.start()
        if code == _END and ends:
            return frame, ends, frame == _PROGRESSIVE and len(exact) < 64 * len(components)
        length = int.from_bytes(data[place : place + 2], "big")
        segment = data[place + 2 : place + length]
        if code in _FRAMES:
            frame, components = code, segment[6::3]
        elif code == _SCAN:
            count = segment[0]
            first, last, approximation = segment[1 + 2 * count : 4 + 2 * count]
            if not approximation & 15:
                exact |= {(name, k) for name in segment[1 : 1 + 2 * count : 2] for k in range(first, last + 1)}
            ends.append(-1)
        place += length
    raise OSError("its end marker is missing")


def check_gif(data: bytes) -> None:
    """Check that the first image of a GIF is followed by another block or the end.

    Raises:
        OSError: there is something else.
    """
    place = 13 + _colours(data[10])
    while data[place : place + 1] == b"!":
        place = _behind_blocks(data, place + 2)
    if data[place : place + 1] == b",":
        place = _behind_blocks(data, place + 11 + _colours(data[place + 9]))
    if data[place : place + 1] not in (b"", b"!", b",", b";"):
        raise OSError("its end was never written")


def _colours(flags: int) -> int:
    """Bytes of a table of colours."""
    return 3 * 2 ** (1 + flags % 8) if flags & 0x80 else 0


def _behind_blocks(data: bytes, place: int) -> int:
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return place + 1
