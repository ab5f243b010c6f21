"""What several tests of the demo need: the data, and a model that has learned nothing."""

import pytest


@pytest.fixture(scope="session")
def digits():
    """The digits to learn from and those held out."""
    from onepeace_fast.demo import data

    return data.load()


@pytest.fixture(scope="session")
def vocabulary():
    """The words of the training captions."""
    from onepeace_fast.demo import data

    return data.Vocabulary()


@pytest.fixture(scope="session")
def spoken():
    """Spoken digits of two training voices and a held-out one, as the demo holds them."""
    pytest.importorskip("espeakng_loader")
    from onepeace_fast.demo import speech, synthesis

    clips = speech.plan(["adam", "f3", "Annie"])
    sounds = synthesis.synthesise(speech.requests(clips))
    rows = {
        held_out: [i for i, c in enumerate(clips) if (c.voice == "Annie") is held_out] for held_out in (False, True)
    }
    return tuple(speech.Speech([sounds[i] for i in part], [clips[i] for i in part]) for part in rows.values())


@pytest.fixture
def model(vocabulary):
    """The untrained model, the same one every time."""
    from onepeace_fast.demo import experiment

    return experiment.build(len(vocabulary), seed=0).eval()
