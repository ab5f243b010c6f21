"""The demo's training and measures: what learns in which stage, from which pairs, and how the figures are counted."""

import copy
import functools

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("scipy")

from onepeace_fast.backend import use_backend
from onepeace_fast.demo import data, experiment
from onepeace_fast.demo.result import Result
from onepeace_fast.demo.waveform import waveforms


@pytest.fixture(autouse=True)
def reference():
    """The quicker backend for sequences this short; the parity tests hold the other one to it."""
    with use_backend("reference"):
        yield


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def embeddings(model, digits, vocabulary):
    texts = experiment.caption_embeddings(model, data.HELD_OUT_TEMPLATES, vocabulary)
    return texts, experiment.image_embeddings(model, digits.images[:50])


def test_contrast_is_that_of_each_group_alone(model, digits, vocabulary):
    rows = data.draw_rows(digits[0].labels, 2, torch.Generator().manual_seed(0))
    text = vocabulary.encode([data.caption("the digit {figure}", digit) for digit in digits[0].labels[rows].tolist()])
    with torch.no_grad():
        a, b = model.embed(image=data.enlarge(digits[0].images[rows])), model.embed(text=text)
        whole = experiment.contrast(model, a, b)
        parts = [experiment.contrast(model, a[part], b[part]) for part in (slice(10), slice(10, 20))]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


@pytest.mark.slow
def test_the_first_stage_lowers_the_loss_and_names_more_digits_than_chance(model, digits, vocabulary, monkeypatch):
    lower = functools.partial(experiment.fit, peak=1e-3)  # so short a warm-up does not bear more
    monkeypatch.setattr(experiment, "fit", lower)
    losses = experiment.train_image_text(model, digits[0], 100, vocabulary, seed=0)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    images = experiment.image_embeddings(model, digits[1].images)
    found = experiment.image_text_accuracy(model, images, digits[1].labels, vocabulary)
    assert set(found) == set(data.HELD_OUT_TEMPLATES) and min(found.values()) > 0.4


def test_the_second_stage_leaves_text_and_images_bit_for_bit(model, digits, vocabulary, spoken):
    before, weights = embeddings(model, digits[1], vocabulary), state(model)
    experiment.train_audio_text(model, spoken[0], 2, vocabulary, seed=0)
    for a, b in zip(before, embeddings(model, digits[1], vocabulary), strict=True):
        assert torch.equal(a, b)
    trained = changed(weights, model)
    assert trained and all("audio" in name or name == "logit_scale" for name in trained), trained


def test_no_stage_reads_what_the_other_modality_shows(model, digits, vocabulary, spoken, monkeypatch):
    seen = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda **inputs: (seen.append(set(inputs)), embed(**inputs))[1])
    experiment.train_image_text(model, digits[0], 1, vocabulary, seed=0)
    assert seen == [{"image"}, {"text"}]
    seen.clear()
    experiment.train_audio_text(model, spoken[0], 1, vocabulary, seed=0)
    assert {"audio"} in seen and {"image"} not in seen


def test_the_same_seed_gives_the_same_training_and_another_one_another(digits, vocabulary, spoken):
    runs = []
    for seed in (1, 1, 2):
        model = experiment.build(len(vocabulary), seed)
        first = experiment.train_image_text(model, digits[0], 2, vocabulary, seed)
        runs.append((first, experiment.train_audio_text(model, spoken[0], 2, vocabulary, seed)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0] and runs[0][1] != runs[2][1]


def test_denoising_trains_the_decoder_too_in_both_stages(digits, vocabulary, spoken):
    model = experiment.build(len(vocabulary), 0, denoise=True)
    before = state(model)
    (contrast,) = experiment.train_image_text(model, digits[0], 1, vocabulary, 0, denoise=True)
    assert 1 < contrast < 5  # the contrast alone: the whole objective would be far above
    first = changed(before, model)
    assert any("decoder" in name and "image" in name for name in first)
    before = state(model)
    experiment.train_audio_text(model, spoken[0], 1, vocabulary, 0, denoise=True)
    assert any("decoder" in name and "audio" in name for name in changed(before, model))


def test_embeddings_of_a_batch_are_those_of_each_alone(model, digits, spoken, monkeypatch):
    sounds, images = spoken[1].sounds[:5], digits[1].images[:5]
    together = experiment.sound_embeddings(model, sounds), experiment.image_embeddings(model, images)
    monkeypatch.setattr(experiment, "ROWS", 2)
    apart = experiment.sound_embeddings(model, sounds), experiment.image_embeddings(model, images)
    for a, b in zip(together, apart, strict=True):
        assert a.shape == (5, experiment.WIDTH)
        torch.testing.assert_close(a, b)


def test_similarity_is_the_cosine_of_every_sound_with_every_image(model, digits, spoken):
    sounds = experiment.sound_embeddings(model, spoken[1].sounds[:3])
    images = experiment.image_embeddings(model, digits[1].images[:4])
    expected = torch.nn.functional.cosine_similarity(sounds[:, None], images[None], dim=2)
    torch.testing.assert_close(torch.from_numpy(experiment.similarity(sounds, images)), expected)


def test_accuracy_counts_the_images_whose_own_caption_is_the_nearest(vocabulary):
    labels = torch.arange(10).repeat(4)

    class Oracle:
        """Embeds a caption as its row."""

        logit_scale = torch.zeros(())

        def embed(self, *, text):
            return torch.eye(10)[: len(text)]

    images = torch.eye(10)[labels + (labels == 5).long()]  # every five looks like a six
    found = experiment.image_text_accuracy(Oracle(), images, labels, vocabulary)
    assert list(found.values()) == pytest.approx([0.9] * len(found))


def test_bias_vectors_hold_a_value_for_every_distance_and_no_cls(model, vocabulary):
    with torch.no_grad():
        for name, table in model.named_parameters():
            if "rel_pos_table" in name:
                table.normal_()
    vectors = experiment.bias_vectors(model, vocabulary)
    frames = model.encoder_wrapper.audio_adapter.frames(experiment.WINDOW)
    side = 2 * (data.SIDE // 16) - 1
    assert set(vectors) == {"text", "image", "audio"}
    assert vectors["image"].shape == (4, side, side) and vectors["audio"].shape == (4, 2 * frames + 1)
    assert vectors["text"].shape[1] % 2 == 1 and all(np.ptp(value) > 1 for value in vectors.values())


def test_configuration_denoises_only_when_asked():
    plain, denoising = (experiment.configuration(50, denoise) for denoise in (False, True))
    assert plain.encoder == denoising.encoder and plain.decoder.image is None and denoising.decoder.image is not None


def test_voices_are_counted_apart(model):
    labels, images = [0, 1, 0, 1], [0, 1]
    similarity = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    values = dict.fromkeys((field for field in Result.__dataclass_fields__), None)
    values |= {"similarity": similarity, "similarity_before": similarity[::-1], "sound_labels": labels}
    values |= {"image_labels": images, "sound_voices": ["a", "a", "b", "b"]}
    result = Result(**values)
    assert result.accuracy_per_voice == {"a": 1.0, "b": 0.5}
    assert result.sound_to_image == 0.75 and result.image_to_sound == 1.0
    assert result.sound_to_image_before == 0.25


def test_training_sounds_are_heard_in_noise_and_held_out_ones_without(spoken):
    sounds = copy.copy(spoken[1].sounds[:2])
    clean, noisy = waveforms(sounds), waveforms(sounds, torch.Generator().manual_seed(3))
    assert clean[:, :50].std(1).max() < 1e-3 < noisy[:, :50].std(1).min()
