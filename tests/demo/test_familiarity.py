"""Whether a sound is like a digit: its score, its threshold and what is kept of both."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from onepeace_fast.demo import experiment, familiarity
from onepeace_fast.demo.familiarity import Familiarity, calibrate
from onepeace_fast.demo.speech import Speech


def test_the_score_is_the_cosine_of_the_fifth_nearest_training_sound():
    known = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    sounds = torch.eye(4)[:2]
    expected = (sounds @ known.t()).sort(dim=1, descending=True).values[:, 4]
    torch.testing.assert_close(Familiarity(known, 0, 0, 0).score(sounds), expected)
    assert len(Familiarity(known[:3], 0, 0, 0).score(sounds)) == 2


def test_the_threshold_is_what_19_of_20_held_out_digits_reach(monkeypatch):
    def embedded(model, sounds):
        """Training sounds lie along the first axis; of the noises every second one does too."""
        if len(sounds) == len(training):
            return torch.eye(2)[[0] * len(sounds)]
        return torch.eye(2)[[place % 2 for place in range(len(sounds))]]

    training = [np.zeros(3, np.int16) for _ in range(8)]
    monkeypatch.setattr(experiment, "sound_embeddings", embedded)
    cosines = torch.linspace(0.5, 1, 101)
    found = calibrate(None, Speech(training, []), torch.stack([cosines, (1 - cosines**2).sqrt()], 1))
    assert found.threshold == pytest.approx(0.525) and found.digits_below == pytest.approx(5 / 101)
    assert found.noises_below == 0.5


def test_at_most_so_many_training_sounds_are_kept_and_of_every_digit(monkeypatch):
    monkeypatch.setattr(familiarity, "KNOWN", 100)
    monkeypatch.setattr(experiment, "sound_embeddings", lambda model, sounds: torch.tensor(sounds).float()[:, None])
    monkeypatch.setattr(familiarity, "noises", lambda: [0.0])
    found = calibrate(None, Speech(list(range(600)), []), torch.ones(3, 1))
    rows = found.known.flatten().int().tolist()
    assert len(set(rows)) == 100 and {row % 10 for row in rows} == set(range(10))


def test_what_is_kept_is_what_was_measured(tmp_path):
    written = Familiarity(torch.randn(5, 3), 0.1 + 0.2, 1 / 3, 0.9)
    written.save(tmp_path)
    read = Familiarity.load(tmp_path)
    assert read[1:] == written[1:] and torch.equal(read.known, written.known)


def test_noises_are_sounds_of_at_most_a_second():
    sounds = familiarity.noises()
    assert len(sounds) == 4 * familiarity.OF_EACH
    assert all(sound.dtype == np.int16 and len(sound) <= 16_000 and np.abs(sound).max() == 30_000 for sound in sounds)
