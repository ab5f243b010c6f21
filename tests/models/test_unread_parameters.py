"""Where processes train together every parameter that trains gets a gradient: DistributedDataParallel waits for all."""

import pytest
import torch
from models._small import BACKENDS, assert_same_bits, gradients_of, small_config, small_model
from models.test_add_modality import SensorAdapter
from models.test_passes import audio_language, vision_language

from onepeace_fast.models.modalities import parameters_of

VARIANTS = {
    "as it is": {},
    "other settings": {"bias_table_per_layer": True, "head_scale": True, "attention_layer_norm": True},
    "a decoder of two": {"decoder": {"image": None}},
}


def model_of(backend, variant, stage_two):
    model = small_model(backend, small_config(**VARIANTS[variant])).train()
    if variant == "other settings":
        model.add_modality("sensor", SensorAdapter(tables=2))
    if stage_two:
        model.train_only("audio")
    return model


@pytest.mark.parametrize("stage_two", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_parameter_that_trains_has_a_gradient(backend, variant, stage_two, group):
    tasks = [audio_language] if stage_two or variant == "a decoder of two" else [vision_language, audio_language]
    for task in tasks:
        model, (name, inputs) = model_of(backend, variant, stage_two), task()
        model(name, **inputs)["loss"].backward()
        without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        frozen = [key for key, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
        assert not without and not frozen


@pytest.mark.parametrize("task", [vision_language, audio_language])
def test_what_a_stage_does_not_read_gets_zeros_and_changes_nothing(task, group):
    results = []
    for fill in (0.5, torch.nan):
        model, (name, inputs) = small_model("fused"), task()
        unread = {"vision_language_loss": "audio", "audio_language_loss": "image"}[name]
        with torch.no_grad():
            for parameter in parameters_of(model, [unread]):
                parameter.fill_(fill)
        gradients = gradients_of(model, model(name, **inputs)["loss"])
        own = [key for key in gradients if f"{unread}_" in key]
        assert len(own) == len(parameters_of(model, [unread])) and not any(gradients[key].any() for key in own)
        results.append(gradients)
    assert_same_bits(*results)


@pytest.mark.parametrize("task", [vision_language, audio_language])
def test_alone_a_step_leaves_what_its_stage_does_not_read_as_it_is(task):
    model, (name, inputs) = small_model("fused"), task()
    unread = parameters_of(model, [{"vision_language_loss": "audio", "audio_language_loss": "image"}[name]])
    before = [parameter.detach().clone() for parameter in unread]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    model(name, **inputs)["loss"].backward()
    optimizer.step()
    assert unread and all(torch.equal(*pair) for pair in zip(unread, before, strict=True))
