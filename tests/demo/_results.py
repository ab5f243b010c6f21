"""Results of the demo made up for the tests of its report: real handwriting, tones for speech, figures as asked for."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from onepeace_fast.demo.result import Comparison, Cost, EmbeddingMap, Result, TokenCount

VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-us+f3", "en-gb+m7")
SOUNDS_PER_VOICE = 2  # of each digit


def made_up(noise: float, seed: int = 0) -> Result:
    """A result whose cosines separate the digits the worse, the more ``noise``: 0 is always right, 10 is chance."""
    generator = np.random.default_rng(seed)
    bunch = load_digits()
    images, image_labels = bunch.images[-150:], bunch.target[-150:].tolist()
    spoken = [(digit, voice) for digit in range(10) for voice in VOICES for _ in range(SOUNDS_PER_VOICE)]
    sound_labels, voices = [digit for digit, _ in spoken], [voice for _, voice in spoken]
    same = np.equal.outer(sound_labels, image_labels)
    spread = generator.normal(size=same.shape)
    angles = np.arange(10) * np.pi / 5
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    return Result(
        seed=seed,
        device="cpu",
        steps={"image-text": 300, "audio-text": 200},
        seconds={"synthesis": 3.2, "image-text": 31.0, "audio-text": 40.5, "evaluation": 6.25},
        losses={"image-text": _falling(300, 0.1, generator), "audio-text": _falling(200, 0.3, generator)},
        images=images,
        image_labels=image_labels,
        sounds=[_tone(digit, generator) for digit in sound_labels],
        sound_labels=sound_labels,
        sound_voices=voices,
        similarity=np.tanh(0.5 * same + 0.2 * noise * spread).astype(np.float32),
        similarity_before=np.tanh(0.1 * generator.normal(size=same.shape)).astype(np.float32),
        image_text_accuracy={"a handwritten {figure}": 0.9, "the digit {name} on a paper form": 0.875},
        bias_vectors={
            "text": generator.normal(scale=0.1, size=(4, 31)),
            "image": generator.normal(scale=0.1, size=(4, 3, 3)),
            "audio": generator.normal(scale=0.1, size=(4, 99)),
        },
        comparisons=[Comparison("cpu", True, 3.1e-6, 4.2)],
        costs=[
            Cost("image-text", "reference", 0.120, 200 << 20),
            Cost("image-text", "fused", 0.150, 140 << 20),
            Cost("image-text", "automatic", 0.121, 200 << 20),
            Cost("audio-text", "reference", 0.200, 300 << 20),
            Cost("audio-text", "fused", 0.180, 300 << 20),
            Cost("audio-text", "automatic", 0.180, 300 << 20),
        ],
        tokens=[
            TokenCount("image-text", "text", 6_000, 12_000),
            TokenCount("image-text", "image", 4_000, 4_000),
            TokenCount("audio-text", "audio", 40_000, 40_000),
        ],
        map=EmbeddingMap(
            circle[image_labels] + 0.1 * generator.normal(size=(len(image_labels), 2)),
            generator.normal(size=(len(sound_labels), 2)),
            circle[sound_labels] + 0.1 * noise * generator.normal(size=(len(sound_labels), 2)),
            image_labels,
            sound_labels,
        ),
        parameters=1_234_567,
    )


def _falling(steps: int, end: float, generator: np.random.Generator) -> list[float]:
    curve = end + (2.4 - end) * np.exp(-np.arange(steps) / 40)
    return (curve * generator.uniform(0.85, 1.15, steps)).tolist()


def _tone(digit: int, generator: np.random.Generator) -> np.ndarray:
    times = np.arange(int(16_000 * generator.uniform(0.3, 0.7))) / 16_000
    return (8_000 * np.sin(2 * np.pi * (200 + 50 * digit) * times)).astype(np.int16)
