"""What one run of the demo found, as its report and its tables read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Comparison(NamedTuple):
    """The two backends on one device: the trained model's outputs and gradients."""

    device: str
    agree: bool
    largest_difference: float
    largest_value: float


class Cost(NamedTuple):
    """Forward and backward of one batch of a stage by one backend, on the device that trained."""

    stage: str
    backend: str  # "automatic" is what trained
    seconds: float
    peak_bytes: int


class TokenCount(NamedTuple):
    """Tokens of one modality in batches of a stage: the real ones, and all that a padded layout computes."""

    stage: str
    modality: str
    real: int
    padded: int


class EmbeddingMap(NamedTuple):
    """Where some held-out images and sounds stand on a plane, [rows, 2] each, and their digits."""

    images: np.ndarray
    sounds_before: np.ndarray
    sounds: np.ndarray
    image_labels: list[int]
    sound_labels: list[int]


@dataclass(frozen=True)
class Result:
    """One run of both stages.

    Attributes:
        seed: of weights, batches and noise.
        device: where it trained.
        steps: of each phase that has steps.
        seconds: wall time of each phase.
        losses: contrast of every step, under "image-text" and "audio-text".
        images: the held-out digits as they are shown, float [images, 8, 8] from 0 (paper) to 16 (ink).
        image_labels: the digit that each image shows.
        sounds: the held-out clips, int16 [samples] at 16 kHz each.
        sound_labels: the digit that each clip says.
        sound_voices: who says it, for a reader.
        similarity: cosines after stage 2, [sounds, images].
        similarity_before: the same before stage 2, the control.
        image_text_accuracy: how many held-out images find their caption, for each held-out template.
        bias_vectors: the learned relative position bias of each modality: of text and audio [heads, 2P - 1], by the
            query's position minus the key's, from -(P - 1) to P - 1; of the image [heads, 2S - 1, 2S - 1], by rows and
            columns of patches in the same way.
        comparisons: of the backends, one for each device.
        costs: of a batch of each stage by each backend.
        tokens: of batches of each stage, by modality.
        map: of the embeddings, before and after stage 2.
        parameters: of the encoder.
    """

    seed: int
    device: str
    steps: dict[str, int]
    seconds: dict[str, float]
    losses: dict[str, list[float]]
    images: np.ndarray
    image_labels: list[int]
    sounds: list[np.ndarray]
    sound_labels: list[int]
    sound_voices: list[str]
    similarity: np.ndarray
    similarity_before: np.ndarray
    image_text_accuracy: dict[str, float]
    bias_vectors: dict[str, np.ndarray]
    comparisons: list[Comparison]
    costs: list[Cost]
    tokens: list[TokenCount]
    map: EmbeddingMap
    parameters: int

    @property
    def sound_to_image(self) -> float:
        """The share of the sounds whose nearest image shows the digit that they say."""
        return _top_1(self.similarity, self.sound_labels, self.image_labels)

    @property
    def image_to_sound(self) -> float:
        """The share of the images whose nearest sound says the digit that they show."""
        return _top_1(self.similarity.T, self.image_labels, self.sound_labels)

    @property
    def sound_to_image_before(self) -> float:
        """``sound_to_image`` before stage 2."""
        return _top_1(self.similarity_before, self.sound_labels, self.image_labels)

    @property
    def image_to_sound_before(self) -> float:
        """``image_to_sound`` before stage 2."""
        return _top_1(self.similarity_before.T, self.image_labels, self.sound_labels)

    @property
    def accuracy_per_voice(self) -> dict[str, float]:
        """``sound_to_image`` of each held-out voice alone."""
        right = np.asarray(self.image_labels)[self.similarity.argmax(1)] == np.asarray(self.sound_labels)
        voices = np.asarray(self.sound_voices)
        return {voice: float(right[voices == voice].mean()) for voice in dict.fromkeys(self.sound_voices)}


def _top_1(similarity: np.ndarray, labels: Sequence[int], candidates: Sequence[int]) -> float:
    return float(np.mean(np.asarray(candidates)[similarity.argmax(1)] == np.asarray(labels)))
