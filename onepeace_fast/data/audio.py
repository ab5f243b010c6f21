"""Audio files: decoded to mono at 16 kHz, normalised, cut or tiled, padded to a batch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.data._containers import UNKNOWN_LENGTH, missing_part
from onepeace_fast.data._mp3 import DamagedMP3, with_frame_count
from onepeace_fast.data._optional import optional

if TYPE_CHECKING:
    from soundfile import SoundFile

SAMPLE_RATE = 16000
_HIGHEST_RATE = 768_000  # beyond it resampling's filter alone would fill memory
_UNKNOWN_FRAMES = 2**62  # libsndfile's count for a header without a length is about 2**63
_BLOCK_FRAMES = 1 << 18
# Formats of libsndfile whose lost end is noticed, by their containers or by decoding.
WHOLE_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC", "OGG", "MP3")
# These code each sample alone; with others a decoder makes up the end of a block that was cut off.
_SAMPLEWISE = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
TAKEN = "WAV, AIFF, AU, FLAC, OGG or MP3"


def read_audio(path: str | os.PathLike[str], *, max_seconds: float = 600, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Decode a file of any sample rate, channels (averaged) and sample format: float32 [samples], mono.

    It is resampled to ``sample_rate``. A header that says more than ``max_seconds`` is refused before anything is
    decoded. A file that was cut off, or that gives fewer samples than its header says, is refused: what is returned was
    decoded.

    Raises:
        ValueError: no such file, not audio, broken, cut off, empty, silent, not finite, or too long; one line naming
            the file.
        ImportError: soundfile or scipy is missing.
    """
    soundfile, signal = optional("soundfile"), optional("scipy.signal")
    path = os.path.expanduser(os.fspath(path))
    require(os.path.isfile(path), lambda: f"{path}: expected an audio file, got no file there")
    blocks = []
    try:
        lack = missing_part(path)
        with _open(soundfile, path) as file:
            rate, frames = file.samplerate, file.frames
            require(
                file.format in WHOLE_FORMATS,
                lambda: f"{path}: expected {TAKEN}, got {file.format}; of other formats a lost end goes unseen",
            )
            _check_header(path, frames, rate, max_seconds)
            if lack == UNKNOWN_LENGTH:
                require(file.subtype in _SAMPLEWISE, lambda: _without_length(path, file.subtype))
            elif lack is not None:
                raise ValueError(f"{path}: expected a whole file, got {lack}; it was cut off, fetch it again")
            # In blocks, so that many channels are never held at once; by read(), which says how much it decoded.
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
    except DamagedMP3 as error:
        raise ValueError(f"{path}: expected a whole file, got {error}; fetch it again") from None
    except (soundfile.SoundFileError, OSError, TypeError, UnicodeError) as error:
        reason = " ".join(getattr(error, "error_string", str(error)).split()).rstrip(".")
        raise ValueError(f"{path}: expected {TAKEN}, got what does not decode as audio ({reason})") from error
    mono = torch.from_numpy(numpy.concatenate(blocks or [numpy.empty(0, "float32")]))
    if len(mono) < frames:
        raise ValueError(
            f"{path}: expected a whole file, got {len(mono):,} of {frames:,} samples decoded; "
            "it was cut off or is damaged, fetch it again"
        )
    _check_sound(path, mono)
    if rate != sample_rate:
        common = math.gcd(rate, sample_rate)
        mono = torch.from_numpy(signal.resample_poly(mono.numpy(), sample_rate // common, rate // common))
        _check_sound(path, mono)  # resampling may leave one sample of two, and make the largest larger
    return mono


def prepare_waveform(
    waveform: Tensor,
    *,
    crop_seconds: float = 15.0,
    minimum_seconds: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normalise a clip as a whole, then crop a long one or tile a short one: float32 [samples].

    Args:
        waveform: float32 [samples] at 16 kHz.
        crop_seconds: a longer clip is cropped to this, at a random place with ``generator``, else from the start.
        minimum_seconds: a shorter clip is repeated up to this.

    Mean and variance are the whole clip's; 1e-5 is added to the variance, as in upstream, so that a clip of nearly
    nothing is not blown up. (ONE-PEACE's public code; it always crops from the start.)

    Raises:
        ValueError: not float32 [samples]; empty, silent or not finite.
    """
    if not (isinstance(waveform, Tensor) and waveform.dtype == torch.float32 and waveform.dim() == 1):
        raise ValueError(f"waveform: expected float32 [samples], got {describe(waveform)}")
    _check_sound("waveform", waveform)
    waveform = F.layer_norm(waveform, waveform.shape)
    crop, minimum = round(crop_seconds * SAMPLE_RATE), round(minimum_seconds * SAMPLE_RATE)
    surplus = len(waveform) - crop
    if surplus > 0:
        start = 0 if generator is None else int(torch.randint(surplus + 1, (), generator=generator, device="cpu"))
        waveform = waveform[start : start + crop].clone()  # a view would keep the whole clip alive
    if len(waveform) < minimum:
        waveform = waveform.repeat(math.ceil(minimum / len(waveform)))[:minimum]
    return waveform


def pad_waveforms(waveforms: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Pad clips with zeros at the end: float32 [rows, samples of the longest], and the samples of each."""
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), [len(clip) for clip in waveforms]


def _open(soundfile: ModuleType, path: str) -> SoundFile:
    """Open a file so that the number of its samples is known."""

    class Forward(soundfile.SoundFile):  # type: ignore[name-defined]  # imported where it is needed
        """Does not seek after every read, which would decode a piece twice behind a hole."""

        def seekable(self) -> bool:
            return False

    # As bytes, since soundfile encodes a name strictly and a file's may be no UTF-8.
    file = Forward(path if os.name == "nt" else os.fsencode(path))
    if file.format == "MP3":
        with file:
            require(
                file.subtype == "MPEG_LAYER_III",
                lambda: f"{path}: expected {TAKEN}, got {file.subtype}; of other layers a lost end goes unseen",
            )
            counted = with_frame_count(Path(path).read_bytes())
        file = Forward(BytesIO(counted) if counted is not None else file.name)
    return file


def _check_header(path: str, frames: int, rate: int, max_seconds: float) -> None:
    if not 0 < rate <= _HIGHEST_RATE:
        raise ValueError(f"{path}: expected a sample rate of at most {_HIGHEST_RATE} Hz, got {rate} Hz")
    require(frames < _UNKNOWN_FRAMES, lambda: _without_length(path, "FLAC"))
    require(
        frames <= max_seconds * rate,
        lambda: f"{path}: expected at most {max_seconds:g} s of audio, got {frames / rate:,.1f} s; cut it into clips",
    )


def _without_length(path: str, codec: str) -> str:
    return f"{path}: expected a header with a length, got none ({codec}); write the file anew, as WAV or FLAC"


def _check_sound(name: str, waveform: Tensor) -> None:
    require(len(waveform) > 0, lambda: f"{name}: expected samples of audio, got none")
    low, high = waveform.aminmax()
    if not torch.isfinite(torch.var(waveform, correction=0)):
        raise ValueError(f"{name}: expected finite samples, got some that are not or are too large")
    require(bool(low < high), lambda: f"{name}: expected sound, got silence (every sample is {float(low):g})")
