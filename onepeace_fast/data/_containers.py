"""What an audio file says about its length. A decoder reads a file that was cut off as a shorter one and says nothing.

Chunked files (WAV, RF64, AIFF), AU and Wave64 tell how many bytes of sound follow; the pages of Ogg are numbered, have
checksums, and the last is marked. FLAC and MP3 count samples, which the reader holds against what was decoded.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import BinaryIO

UNKNOWN_LENGTH = "a header without a length"
_UNKNOWN = 0xFFFFFFFF  # from writers that cannot go back to the header; in RF64 it refers to ds64


def missing_part(path: str) -> str | None:
    """What a file promises but lacks ("48,000 of 96,000 bytes of sound"), or None if nothing is known to be missing.

    ``UNKNOWN_LENGTH`` where a header that has room for a length gives none, as of a file that was streamed.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(24)
        kind = start[:4]
        if kind in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
            return _chunks(file, size, ">" if kind in (b"RIFX", b"FORM") else "<")
        if kind in (b".snd", b"dns.") and len(start) >= 12:
            offset, length = struct.unpack((">" if kind == b".snd" else "<") + "II", start[4:12])
            return UNKNOWN_LENGTH if length == _UNKNOWN else _lack(length, size - offset)
        if kind == b"riff" and len(start) == 24:
            return _lack(struct.unpack("<Q", start[16:])[0], size)
        return _pages(start + file.read()) if kind == b"OggS" else None


def _chunks(file: BinaryIO, size: int, order: str) -> str | None:
    """Walk the chunks up to the samples."""
    place, long_length = 12, None
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack(order + "4sI", file.read(8))
        if name == b"ds64":
            long_length = struct.unpack("<Q", file.read(16)[8:].ljust(8, b"\0"))[0]
        if name in (b"data", b"SSND", b"BODY"):
            length = long_length if length == _UNKNOWN else length
            return UNKNOWN_LENGTH if length is None else _lack(length, size - place - 8)
        place += 8 + length + length % 2
    return None


def _lack(promised: int, there: int) -> str | None:
    return f"{max(there, 0):,} of {promised:,} bytes of sound" if there < promised else None


def _pages(data: bytes) -> str | None:
    """Check that every page of an Ogg file is whole and unchanged, that none is missing and every stream has its end.

    Decoders bridge a hole: Opus invents sound, others go on behind it.
    """
    place = 0
    following: dict[int, int] = {}
    streams: set[int] = set()
    while data.startswith(b"OggS\0", place):
        body = place + 27 + data[place + 26] if place + 26 < len(data) else len(data) + 1
        end = body + sum(data[place + 27 : body])
        if end > len(data):
            return "an unfinished last page"
        flags, serial, number, checksum = data[place + 5], *struct.unpack("<III", data[place + 14 : place + 26])
        page = data[place : place + 22] + bytes(4) + data[place + 26 : end]
        begins = flags & 2
        if _checksum(page) != checksum or number != (number if begins else following.get(serial, number)):
            return f"a damaged or lost page at byte {place:,}"
        following[serial] = (number + 1) % 2**32
        streams.add(serial)
        if flags & 4:
            streams.discard(serial)
        place = end
    if not streams:
        return None
    return f"a damaged or lost page at byte {place:,}" if place < len(data) else "no last page of its stream"


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32, which is zlib's with the bits of bytes and result in the other order and nothing inverted."""
    return int(f"{zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)
