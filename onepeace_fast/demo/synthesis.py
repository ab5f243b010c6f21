"""Speaks texts with eSpeak NG in a separate process, and resamples the sound to 16 kHz."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from onepeace_fast.data.audio import SAMPLE_RATE
from onepeace_fast.demo import espeak
from onepeace_fast.demo.waveform import trim
from onepeace_fast.info import DEMO_INSTALL


def synthesise(requests: Sequence[tuple[str, int, int, str]]) -> list[np.ndarray]:
    """Say all of (voice, speed, pitch, text), in this order: int16 [samples] at 16 kHz each, quiet ends cut off.

    Raises:
        ValueError: eSpeak NG does not work here, in one line.
    """
    import espeakng_loader  # the command has seen that it is installed

    with tempfile.TemporaryDirectory() as folder:
        plan, output = Path(folder, "plan.json"), Path(folder, "clips")
        plan.write_text(json.dumps(requests), encoding="utf-8")
        arguments = [espeakng_loader.get_library_path(), espeakng_loader.get_data_path(), plan, output]
        program = [sys.executable, "-I", espeak.__file__, *map(str, arguments)]
        done = subprocess.run(program, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"its process ended with code {done.returncode}"]
            raise ValueError(f"eSpeak NG failed ({said[-1]}): {DEMO_INSTALL}")
        header, _, samples = output.read_bytes().partition(b"\n")
    header = json.loads(header)
    clips = np.split(np.frombuffer(samples, np.int16), np.cumsum(header["samples"])[:-1])
    for clip, (voice, _, _, text) in zip(clips, requests, strict=True):
        if not clip.any():
            raise ValueError(f"eSpeak NG said nothing for {text!r} by the voice {voice}")
    return [_finish(clip, header["rate"]) for clip in clips]


def _finish(samples: np.ndarray, rate: int) -> np.ndarray:
    common = math.gcd(rate, SAMPLE_RATE)
    resampled = resample_poly(samples.astype(np.float32), SAMPLE_RATE // common, rate // common)
    return np.clip(np.round(trim(resampled)), -32768, 32767).astype(np.int16)
