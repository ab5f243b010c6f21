"""The map of the embeddings: groups that are apart stay apart, and images stand still."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from onepeace_fast.demo import embedding_map as module


def test_sounds_that_point_to_a_digit_stand_at_its_images_in_spite_of_an_offset(monkeypatch):
    generator = np.random.default_rng(0)
    monkeypatch.setattr(module, "ITERATIONS", 300)
    monkeypatch.setattr(module, "SHOWN", 60)
    image_labels, sound_labels = list(range(3)) * 40, list(range(3)) * 30
    axes = np.eye(8)
    images = axes[image_labels] + 0.05 * generator.normal(size=(120, 8))
    before = axes[7] + 0.05 * generator.normal(size=(90, 8))
    after = axes[sound_labels] + 5 * axes[0] + 0.05 * generator.normal(size=(90, 8))
    found = module.embedding_map(images, image_labels, before, after, sound_labels)
    assert found.images.shape == (60, 2) and found.sounds.shape == found.sounds_before.shape == (45, 2)
    assert found.image_labels == image_labels[::2] and found.sound_labels == sound_labels[::2]
    written, spoken = np.array(found.image_labels), np.array(found.sound_labels)
    middles = np.stack([found.images[written == digit].mean(0) for digit in range(3)])
    shares = [
        (((rows[:, None] - middles) ** 2).sum(2).argmin(1) == spoken).mean()
        for rows in (found.sounds_before, found.sounds)
    ]
    assert shares[0] < 0.7 and shares[1] == 1
