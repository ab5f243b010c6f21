"""A branch: a smaller model of some modalities that gives what the whole one gives."""

import pytest
import torch
from data._refused import refused
from models._encoder_only import classify, retrieval, vision
from models._small import BACKENDS, audio_batch, batch_of, image_batch, small_model
from models.test_add_modality import SensorAdapter, readings

from onepeace_fast import OnePeaceEncoder, OnePeaceRetrieval, from_pretrained


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [small_model, lambda backend: retrieval("image", "audio", backend=backend)])
def test_a_branch_embeds_as_the_whole_model_and_has_no_more_than_it_needs(backend, make):
    whole = make(backend)
    branch, image = whole.branch("image"), image_batch(2, 3)
    assert type(branch) is OnePeaceRetrieval and not branch.training
    assert torch.equal(branch.embed(image=image), whole.embed(image=image))
    others = ("text", "audio", "decoder", "mask")
    assert not any(word in name for name in branch.state_dict() for word in others)
    assert all(value.data_ptr() != whole.state_dict()[name].data_ptr() for name, value in branch.state_dict().items())


def test_a_branch_is_saved_and_loaded_like_any_model(tmp_path):
    branch, (audio, padding) = small_model("fused").branch("audio"), audio_batch([5, 9])
    branch.save(tmp_path)
    loaded = from_pretrained(tmp_path, backend="fused")
    assert loaded.config == branch.config
    inputs = {"audio": audio, "audio_padding": padding}
    assert torch.equal(loaded.embed(**inputs), branch.embed(**inputs))
    assert torch.equal(OnePeaceRetrieval.load(tmp_path, backend="fused").embed(**inputs), branch.embed(**inputs))


def test_a_branch_of_two_modalities_encodes_them_together():
    whole, batch = small_model("reference"), batch_of(text=[3, 7], image=(2, 3))
    for name, value in whole.branch("text", "image").encode(**batch).items():
        assert torch.equal(value, whole.encode(**batch)[name])


@pytest.mark.parametrize("whole", [vision(), classify("image", "text")])
def test_the_branch_of_a_model_that_does_not_embed_is_an_encoder(whole):
    branch = whole.branch("image")
    assert type(branch) is OnePeaceEncoder and branch.config.encoder.final_norm == whole.config.encoder.final_norm
    image = image_batch(2, 3)
    if whole.config.encoder.modalities == ("image",):
        assert torch.equal(branch.encode(image=image)["image"], whole.encode(image=image)["image"])
    assert not any("text" in name or "head" in name for name in branch.state_dict())


def test_an_added_modality_has_a_branch_too():
    whole = small_model("reference")
    whole.add_modality("sensor", SensorAdapter())
    branch, inputs = whole.branch("text", "sensor"), readings([4, 6])
    assert torch.equal(branch.embed(**inputs), whole.embed(**inputs))
    refused(lambda: whole.branch("sensor"), "text, image, audio: ", "at least one adapter")


def test_a_branch_of_nothing_or_of_others_is_refused():
    model = retrieval("text")
    refused(lambda: model.branch("image"), "modalities: expected some of text, got image")
    refused(model.branch, "modalities: expected some of text, got none")
