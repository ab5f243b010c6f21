"""A flat map of embeddings: t-SNE of how near each image and each sound is to the images of every digit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.manifold import TSNE

from onepeace_fast.demo.result import EmbeddingMap

SHOWN = 150  # images, and as many sounds; t-SNE takes seconds for them
ITERATIONS = 500


def embedding_map(
    images: np.ndarray, image_labels: Sequence[int], before: np.ndarray, after: np.ndarray, sound_labels: Sequence[int]
) -> EmbeddingMap:
    """Places of evenly chosen images and sounds, from embeddings [rows, dim] before and after stage 2.

    What a sound says is not used. The mean of each modality is taken away: its offset tells a sound from an image,
    not one digit from another.
    """
    written, spoken = (np.arange(0, len(rows), -(-len(rows) // SHOWN)) for rows in (images, before))
    of_image = np.asarray(image_labels)
    centred = [_unit(rows - rows.mean(0)) for rows in (images, before, after)]
    middles = _unit(np.stack([centred[0][of_image == digit].mean(0) for digit in np.unique(of_image)]))
    near = [rows[chosen] @ middles.T for rows, chosen in zip(centred, (written, spoken, spoken), strict=True)]
    together = np.concatenate(near)
    project = TSNE(init="pca", random_state=0, max_iter=ITERATIONS, perplexity=min(40, len(together) // 4))
    places = project.fit_transform(together)
    bounds = np.cumsum([len(written), len(spoken)])
    of_images, of_sounds_before, of_sounds = np.split(places, bounds)
    labels = of_image[written].tolist(), np.asarray(sound_labels)[spoken].tolist()
    return EmbeddingMap(of_images, of_sounds_before, of_sounds, *labels)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
