"""The demo's report: one HTML file that opens from disk without a network, sounds and pictures inside it."""

from __future__ import annotations

import base64
import io
import os
import platform
import wave
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.image import imsave
from PIL import Image
from scipy.signal import spectrogram

from onepeace_fast.backend import ENVIRONMENT_VARIABLE
from onepeace_fast.checks import require
from onepeace_fast.data.audio import SAMPLE_RATE
from onepeace_fast.demo import charts, cost_charts
from onepeace_fast.demo.charts import CHANCE, DIGITS
from onepeace_fast.demo.costs import COUNTED
from onepeace_fast.demo.data import DARKEST, NAMES, caption
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.result import Comparison, Result

VOICES_PER_DIGIT = 2
NEAREST = 5
MISTAKES = 6
HEARD = 256  # samples of a spectrogram's column: 16 ms
UNFOLDED = 6  # cards that stand open
PACKAGES = ("onepeace_fast", "torch", "numpy", "scikit-learn", "espeakng-loader", "matplotlib")


class Match(NamedTuple):
    """A handwritten digit that was found: its picture, the digit, its cosine, and whether it is the digit asked for."""

    uri: str
    label: int
    score: float
    right: bool


def write(result: Result, folder: Path) -> Path:
    """Write ``folder/index.html`` in one step and return its path."""
    require(bool(np.isfinite(result.similarity).all()), "similarity: expected cosines, got NaN or infinity")
    title, sentence = verdict(result)
    images, sounds = np.asarray(result.image_labels), np.asarray(result.sound_labels)
    wrong = np.flatnonzero(images[result.similarity.argmax(1)] != sounds).tolist()
    chosen = choose(result.sound_labels, result.sound_voices)
    shown_wrong = len(set(chosen) & set(wrong))
    return render(
        folder / "index.html",
        "report.html",
        title=title,
        result=result,
        verdict=sentence,
        cards=[_card(result, row) for row in chosen],
        unfolded=UNFOLDED,
        mistakes=[] if shown_wrong else [_card(result, row) for row in wrong[:MISTAKES]],
        per_digit=VOICES_PER_DIGIT,
        shown_wrong=shown_wrong,
        wrong=len(wrong),
        pictures=_pictures(result),
        captions=[(f'"{caption(key, 3)}"', percent(value, 1)) for key, value in result.image_text_accuracy.items()],
        agreement=" ".join(agreement(result.comparisons)),
        differences=[
            (row.device, f"{row.largest_difference:.1e}", f"{row.largest_value:.3g}", "yes" if row.agree else "NO")
            for row in result.comparisons
        ],
        machine=machine(result),
    )


def write_ranking(
    wav_name: str,
    waveform: np.ndarray,
    ranking: Sequence[tuple[int, float]],
    images: Sequence[tuple[np.ndarray, int, float]],
    unlike: str,
    folder: Path,
) -> Path:
    """Write a page with a visitor's sound, the ten digits and the nearest images; returns its path.

    ``waveform`` is int16 [samples] at 16 kHz; ``ranking`` holds digits with their scores and ``images`` the nearest
    held-out digits, [8, 8] from 0 to 16, with their labels and scores: both best first. ``unlike`` says that it is no
    digit, or is empty. The page stands in ``folder``
    under the sound's own name and ``-ranking.html``, so that the report beside it stays.
    """
    require(len(ranking) > 0, "ranking: expected at least one digit, got none")
    return render(
        folder / f"{Path(wav_name).stem}-ranking.html",
        "ranking.html",
        title=f"onepeace_fast: {Path(wav_name).name}",
        name=Path(wav_name).name,
        sound=sound_uri(waveform),
        spectrogram=spectrogram_uri(waveform),
        unlike=unlike,
        report="index.html" if (folder / "index.html").exists() else None,
        best=NAMES[ranking[0][0]],
        ranking=[(f"{digit} {NAMES[digit]}", f"{score:.3f}") for digit, score in ranking],
        matches=[Match(image_uri(image), label, score, label == ranking[0][0]) for image, label, score in images],
    )


def verdict(result: Result) -> tuple[str, str]:
    """What the two figures mean, as a title and a sentence: both depend on them and on the control before stage 2."""
    now = min(result.sound_to_image, result.image_to_sound)
    control = max(CHANCE, result.sound_to_image_before, result.image_to_sound_before)
    if now < 2 * control:
        title = "Spoken and handwritten digits, never paired, hardly align in this run"
        return title, "One figure at least is below twice the chance, or below twice the control before stage 2."
    if now < 0.5:
        title = "Spoken and handwritten digits, never paired, align in part"
        return title, "Both figures are at least twice the chance and twice the control before stage 2."
    title = "Spoken digits find handwritten ones, though no sound was ever paired with an image"
    return title, "Both modalities were paired with captions only: they meet in the encoder that they share."


def agreement(comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences: where the backends agree."""
    disagreeing = [row.device for row in comparisons if not row.agree]
    if disagreeing:
        sentences = [f"THE BACKENDS DISAGREE by more than rounding on {' and '.join(disagreeing)}."]
    else:
        sentences = ["Both backends compute the same outputs and gradients, up to rounding."]
    return sentences


def choose(labels: Sequence[int], voices: Sequence[str]) -> list[int]:
    """Rows of the sounds to show: for every digit two voices, all voices in turn, each with its first sound of it.

    First one of every digit, then the others. Looks at no result, so that right and wrong answers have the same chance
    to be shown.
    """
    order = list(dict.fromkeys(voices))
    chosen: list[list[int]] = []
    turn = 0
    for digit in range(DIGITS):
        first: dict[str, int] = {}
        for row, (label, voice) in enumerate(zip(labels, voices, strict=True)):
            if label == digit:
                first.setdefault(voice, row)
        speakers = [voice for voice in order[turn:] + order[:turn] if voice in first]
        chosen.append([first[voice] for voice in speakers[:VOICES_PER_DIGIT]])
        turn = (turn + VOICES_PER_DIGIT) % len(order)
    return [rows[place] for place in range(VOICES_PER_DIGIT) for rows in chosen if place < len(rows)]


def image_uri(image: np.ndarray) -> str:
    """A handwritten digit, [8, 8] from 0 (paper) to 16 (ink), as a PNG data URI of 8 x 8 pixels."""
    require(image.shape == (8, 8), f"image: expected [8, 8], got {list(image.shape)}")
    shades = np.round(255 * (1 - image / DARKEST)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shades).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sound_uri(waveform: np.ndarray) -> str:
    """A sound, int16 [samples] at 16 kHz, as a WAV data URI."""
    if waveform.ndim != 1 or waveform.dtype != np.int16:
        raise ValueError(f"waveform: expected int16 [samples], got {waveform.dtype} {list(waveform.shape)}")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(waveform.astype("<i2").tobytes())
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


def spectrogram_uri(waveform: np.ndarray) -> str:
    """A sound, int16 [samples] at 16 kHz, as a PNG data URI: time to the right, 0 to 8 kHz upwards, 60 dB of shades."""
    width = min(HEARD, len(waveform))
    _, _, power = spectrogram(waveform.astype(np.float32), SAMPLE_RATE, nperseg=width, noverlap=width // 2)
    levels = 10 * np.log10(power + 1e-9 * max(float(power.max()), 1e-12))
    file = io.BytesIO()
    imsave(file, levels, cmap="magma", vmin=levels.max() - 60, vmax=levels.max(), origin="lower", format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _card(result: Result, row: int) -> dict[str, Any]:
    """One sound and the images nearest to it, best first; of equal ones the first."""
    label = result.sound_labels[row]
    nearest = np.argsort(-result.similarity[row], kind="stable")[:NEAREST].tolist()
    matches = [
        Match(image_uri(result.images[i]), found := result.image_labels[i], result.similarity[row, i], found == label)
        for i in nearest
    ]
    sound = {"label": label, "name": NAMES[label], "voice": result.sound_voices[row]}
    heard = result.sounds[row]
    return {**sound, "uri": sound_uri(heard), "spectrogram": spectrogram_uri(heard), "matches": matches}


def _pictures(result: Result) -> dict[str, Any]:
    sounds, images = result.sound_labels, result.image_labels
    found_images = [images[i] for i in result.similarity.argmax(1)]
    found_sounds = [sounds[i] for i in result.similarity.argmax(0)]
    units = {"text": "tokens", "audio": "frames of 20 ms"}
    biases = [
        charts.grid_bias(name, values) if values.ndim == 3 else charts.series_bias(name, units[name], values)
        for name, values in result.bias_vectors.items()
    ]
    return {
        "similarity": charts.similarity(result.similarity_before, result.similarity, sounds, images),
        "sound_to_image": charts.confusion(sounds, found_images, "spoken", "handwritten"),
        "image_to_sound": charts.confusion(images, found_sounds, "handwritten", "spoken"),
        "voices": charts.voices(result.accuracy_per_voice, Counter(result.sound_voices)),
        "map": charts.embeddings(result.map),
        "library": [
            cost_charts.tokens(result.tokens, COUNTED),
            cost_charts.times(result.costs),
            cost_charts.memory(result.costs),
        ],
        "losses": charts.loss_curves(result.losses),
        "biases": biases,
    }


def machine(result: Result) -> list[tuple[str, str]]:
    """What the figures were made with, on and how long that took: a name and a value each."""
    return [
        ("Model", f"{result.parameters:,} parameters"),
        ("Seed", str(result.seed)),
        ("Device", result.device),
        *environment(("Threads", str(torch.get_num_threads()))),
        ("Steps", ", ".join(f"{stage} {steps:,}" for stage, steps in result.steps.items())),
        ("Seconds", ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in result.seconds.items())),
    ]


def environment(*own: tuple[str, str]) -> list[tuple[str, str]]:
    """The processor, the backend, what else a demo names, and the packages: a name and a value each."""
    return [
        ("CPU", cpu()),
        ("Backend", backend()),
        *own,
        ("Python", f"{platform.python_version()} on {platform.system()}"),
        *((package, version(package)) for package in PACKAGES),
    ]


def backend() -> str:
    """Which backend trains: the automatic one, unless the environment names another."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or "automatic"


def cpu() -> str:
    """The processor's own name, where the system tells it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def render(path: Path, template: str, **values: Any) -> Path:
    """Render a template and put the page in its place in one step."""
    environment = Environment(
        loader=PackageLoader("onepeace_fast.demo"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = percent
    icon = image_uri(np.kron(np.array([[0, 1], [1, 0]]), np.full((4, 4), DARKEST)))
    text = environment.get_template(template).render(icon=icon, chance=CHANCE, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    return put(path, text)


def put(path: Path, text: str) -> Path:
    """Put a text in its place in one step."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8", errors="replace")  # a sound's name may be no text
    os.replace(draft, path)
    return path
