"""Counts the frames of an MP3 file that does not say how many it has, and puts the count in front, as encoders do.

Without a count libmpg123 guesses a length from the first frame and the file's size, and stops reading there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by the version's bits
_KILOBITS = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # of MPEG 1
)
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"3DI", b"ID3")  # which may follow the last frame
_SYNC = 0xFFE00000


class DamagedMP3(ValueError):
    """What is damaged and where."""


class _Frame(NamedTuple):
    """Where a frame stands, its bytes, and the bytes from its start to what follows its side information."""

    place: int
    length: int
    beginning: int


def with_frame_count(data: bytes) -> bytes | None:
    """The file with a frame in front that counts the others, or None where it has one already.

    Raises:
        DamagedMP3: something that is no frame stands between them; which and where.
    """
    start = _first_frame(data)
    first = _frame(data, start)
    if first is None:
        return None
    content = data[start : start + first.length]
    announced = content[first.beginning :][:4] in (b"Xing", b"Info")
    if announced and content[first.beginning + 7] & 1:
        return None
    frames = list(_frames(data, start))
    end = frames[-1].place + frames[-1].length
    if end < len(data) and not data.startswith(_TAGS, end):
        raise DamagedMP3(f"a damaged or lost frame at byte {end:,}")
    if announced or content[36:40] == b"VBRI":
        del frames[0]
    # The same header, without a checksum and with the longest frame that it can have.
    header = (int.from_bytes(data[start : start + 4], "big") | 0x10000) & ~0xF000 | 0xE000
    frame = _frame(header.to_bytes(4, "big"), 0)
    assert frame is not None  # it differs from the first one's in what it may have
    count = b"Xing" + (1).to_bytes(4, "big") + len(frames).to_bytes(4, "big")
    counting = (header.to_bytes(4, "big") + bytes(frame.beginning - 4) + count).ljust(frame.length, b"\0")
    return counting + data[frames[0].place if frames else end : end]


def _first_frame(data: bytes) -> int:
    """Where the first frame begins: behind ID3 tags, where another frame or the end of the file follows it."""
    place = 0
    while data.startswith(b"ID3", place):
        size = 0
        for byte in data[place + 6 : place + 10]:
            size = size << 7 | byte & 127
        place += 10 + size + (10 if data[place + 5] & 16 else 0)
    while (place := data.find(b"\xff", place)) >= 0:
        frame = _frame(data, place)
        if frame and (place + frame.length >= len(data) or _frame(data, place + frame.length)):
            break
        place += 1
    return place if place >= 0 else len(data)


def _frames(data: bytes, place: int) -> Iterator[_Frame]:
    while (frame := _frame(data, place)) is not None:
        yield frame
        place += frame.length


def _frame(data: bytes, place: int) -> _Frame | None:
    """Read a header of Layer III (ISO/IEC 11172-3, 2.4.1.3, and its extensions to lower rates)."""
    header = int.from_bytes(data[place : place + 4].ljust(4, b"\0"), "big")
    version, kilobits, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    if header & _SYNC != _SYNC or version == 1 or header >> 17 & 3 != 1 or not 0 < kilobits < 15 or rate == 3:
        return None
    whole, mono = version == 3, header >> 6 & 3 == 3
    length = (144 if whole else 72) * 1000 * _KILOBITS[whole][kilobits] // _RATES[version][rate] + (header >> 9 & 1)
    return _Frame(place, length, 4 + ((17 if mono else 32) if whole else (9 if mono else 17)))
