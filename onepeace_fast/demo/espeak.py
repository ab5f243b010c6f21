"""Drives eSpeak NG through ctypes, as a separate program that needs only the standard library.

A clip depends on the calls before it, so all of a set come from one process in one order:
``python espeak.py LIBRARY DATA PLAN OUTPUT``. PLAN is JSON, a list of [voice, speed, pitch, text]; OUTPUT receives one
line of JSON, {"rate": hertz, "samples": [of each clip]}, and then all clips' int16 samples in the machine's byte order.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

SYNCHRONOUS, DO_NOT_EXIT = 2, 0x8000
SPEED, PITCH = 1, 3
NOISE_SEED = 1  # breath is noise, which the engine otherwise draws anew each time
CHARACTERS, UTF_8 = 1, 1

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Engine:
    """eSpeak NG, started; ``data`` is the folder that holds its voices."""

    def __init__(self, library: str, data: str) -> None:
        self._library = ctypes.CDLL(library)
        os.chdir(Path(data).parent)  # the engine cuts long paths off
        self.rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, b".", DO_NOT_EXIT)
        if self.rate <= 0:
            raise RuntimeError(f"eSpeak NG did not start with the data in {data}")
        self._variants = Path(data) / "voices" / "!v"
        self._samples = array.array("h")
        self._callback = _Callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._samples.frombytes(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, voice: str, speed: int, pitch: int, text: str) -> array.array[int]:
        """Samples of a text, by a voice such as "en-us+f3", at words a minute and a pitch from 0 to 100."""
        variant = voice.partition("+")[2]
        # The engine passes over a variant that it does not have.
        unknown = variant and not (self._variants / variant).is_file()
        if unknown or self._library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"eSpeak NG has no voice {voice}")
        self._library.espeak_SetParameter(SPEED, speed, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(NOISE_SEED))
        self._samples = array.array("h")
        data = text.encode() + b"\0"
        size = ctypes.c_size_t(len(data))
        if self._library.espeak_Synth(data, size, 0, CHARACTERS, 0, UTF_8, None, None):
            raise RuntimeError(f"eSpeak NG did not say {text!r}")
        return self._samples


def main(library: str, data: str, plan: str, output: str) -> None:
    requests = json.loads(Path(plan).read_text(encoding="utf-8"))
    target = Path(output).absolute()
    engine = Engine(library, data)
    clips = [engine.say(*request) for request in requests]
    with target.open("wb") as file:
        file.write(json.dumps({"rate": engine.rate, "samples": [len(clip) for clip in clips]}).encode() + b"\n")
        for clip in clips:
            file.write(clip.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
