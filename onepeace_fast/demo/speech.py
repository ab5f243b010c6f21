"""The demo's sounds: the digits spoken by eSpeak NG in many voices, accents, speeds and pitches, at 16 kHz.

The engine and its voices come with the package espeakng-loader. Some voices are held out: whatever the accent, speed or
pitch, none of their speech is trained on. Synthesis takes seconds; its clips are kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import zipfile
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onepeace_fast.demo import espeak, synthesis
from onepeace_fast.demo.data import NAMES

VOICES = (
    "Alex", "Alicia", "Andy", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Mario", "Michael",
    "Nguyen", "Reed", "RicishayMax", "Storm", "adam", "aunty", "benjamin", "boris", "caleb", "croak", "david", "f1",
    "f2", "f3", "f4", "grandpa", "gustave", "ian", "iven4", "john", "kaukovalta", "klatt", "klatt2", "klatt3", "m1",
    "m2", "m3", "m4", "m5", "m6", "m7", "marcelo", "max", "michel", "miguel", "norbert", "pablo", "paul", "quincy",
    "rob", "robert", "sandro", "shelby", "steph", "travis", "victor", "whisper", "zac",
    # Held out:
    "Annie", "Mike", "belinda", "edward", "f5", "grandma", "klatt4", "m8",
)  # fmt: skip
HELD_OUT_VOICES = VOICES[-8:]
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-029", "en-gb-x-gbclan")  # the last two: Caribbean, Lancashire
MANNERS = tuple((speed, pitch) for speed in (120, 145, 170) for pitch in (35, 50, 65))


class Clip(NamedTuple):
    """How one clip is made: who says which digit, at how many words a minute, with a pitch from 0 to 100."""

    digit: int
    voice: str
    accent: str
    speed: int
    pitch: int


class Speech(NamedTuple):
    """Sounds, int16 [samples] at 16 kHz each, and how each was made."""

    sounds: list[np.ndarray]
    clips: list[Clip]

    @property
    def labels(self) -> list[int]:
        """The digit that each sound says."""
        return [clip.digit for clip in self.clips]


def plan(voices: Sequence[str] = VOICES) -> list[Clip]:
    """Every clip, in the order of synthesis: each voice says every digit in every accent, manners in turn."""
    return [
        Clip(digit, voice, accent, *MANNERS[(3 * turn + 2 * place + 4 * digit) % len(MANNERS)])
        for turn, voice in enumerate(voices)
        for place, accent in enumerate(ACCENTS)
        for digit in range(10)
    ]


def load(clips: Sequence[Clip]) -> tuple[Speech, Speech]:
    """The sounds for training and those of the held-out voices, from the cache or synthesised.

    Raises:
        ValueError: eSpeak NG does not work here, in one line.
    """
    sounds = _cached(clips)
    halves = []
    for held_out in (False, True):
        rows = [row for row, clip in enumerate(clips) if (clip.voice in HELD_OUT_VOICES) is held_out]
        halves.append(Speech([sounds[row] for row in rows], [clips[row] for row in rows]))
    return halves[0], halves[1]


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again, by the platform's convention."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "onepeace_fast"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "onepeace_fast" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "onepeace_fast"


def cache_file(clips: Sequence[Clip]) -> Path:
    """The file of these clips; its name is a digest of everything that decides them."""
    sources = [Path(synthesis.__file__), Path(espeak.__file__)]
    packages = {name: version(name) for name in ("espeakng-loader", "scipy", "numpy")}
    decisive = [requests(clips), packages, platform.platform(), *(path.read_text(encoding="utf-8") for path in sources)]
    return cache_folder() / f"speech-{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]}.npz"


def requests(clips: Sequence[Clip]) -> list[tuple[str, int, int, str]]:
    """The clips as ``synthesis.synthesise`` takes them."""
    return [(f"{clip.accent}+{clip.voice}", clip.speed, clip.pitch, NAMES[clip.digit]) for clip in clips]


def _cached(clips: Sequence[Clip]) -> list[np.ndarray]:
    path = cache_file(clips)
    if path.exists():
        try:
            return _read(path, len(clips))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            print(f"The spoken digits kept in {path} are damaged ({error}): they are made anew.")
    sounds = synthesis.synthesise(requests(clips))
    try:
        _write(path, sounds)
    except OSError as error:
        print(f"The spoken digits cannot be kept for the next time: {error}")
    return sounds


def _read(path: Path, count: int) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        samples, lengths = file["samples"], file["lengths"]
    if samples.dtype != np.int16 or len(lengths) != count or lengths.sum() != len(samples):
        raise ValueError("its arrays do not fit together")
    return np.split(samples, np.cumsum(lengths)[:-1])


def _write(path: Path, sounds: Sequence[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    with draft.open("wb") as file:
        np.savez(file, samples=np.concatenate(sounds), lengths=[len(sound) for sound in sounds])
    os.replace(draft, path)
