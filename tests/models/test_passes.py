"""A pretraining step as one packed call: how often each part runs, and that joining passes changes nothing."""

import pytest
import torch
from models._small import (
    BACKENDS,
    assert_close,
    assert_same_bits,
    batch_of,
    hide,
    losses_with_gradients,
    small_config,
    small_model,
    text_batch,
)

from onepeace_fast.config import TextAdapterConfig
from onepeace_fast.layers.adapters.audio import FeatureExtractor
from onepeace_fast.models import stack as stack_module
from onepeace_fast.models.inputs import read_batch

TEXT = [7, 2, 5]


def vision_language(seed=1, grid=3):
    batch = batch_of(text=TEXT, image=(3, grid))
    alone, pair = hide(batch, seed=seed), hide(batch, seed=seed + 1)
    masks = {"text": alone["text"], "image": alone["image"], "vl_text": pair["text"], "vl_image": pair["image"]}
    return "vision_language_loss", {**batch, "masks": masks}


def audio_language(seed=1):
    batch = batch_of(text=TEXT, audio=[9, 4, 6])
    alone, pair = hide(batch, seed=seed), hide(batch, seed=seed + 1)
    masks = {"audio": alone["audio"], "al_text": pair["text"], "al_audio": pair["audio"]}
    return "audio_language_loss", {**batch, "masks": masks}


TASKS = pytest.mark.parametrize("task", [vision_language, audio_language], ids=["vision language", "audio language"])


@TASKS
def test_a_step_is_one_gradient_carrying_call_of_the_encoder_and_one_of_the_decoder(task):
    model, calls, (name, inputs) = small_model("fused"), [], task()
    for which in ("encoder", "decoder"):
        transformer = model.get_submodule(f"{which}_wrapper.fusion_model")
        transformer.register_forward_pre_hook(lambda *_, which=which: calls.append((which, torch.is_grad_enabled())))
    model(name, **inputs)
    # In this order, since older torch's autocast would lose gradients of weights that it cast without one first.
    assert calls == [("encoder", True), ("encoder", False), ("decoder", True)]


def test_the_waveforms_are_convolved_once_in_a_step(monkeypatch):
    calls, forward = [], FeatureExtractor.forward
    monkeypatch.setattr(FeatureExtractor, "forward", lambda self, value: (calls.append(1), forward(self, value))[1])
    name, inputs = audio_language()
    small_model("fused")(name, **inputs)
    assert len(calls) == 1
    calls.clear()
    small_model("reference")(name, **inputs)
    assert len(calls) == 4  # upstream's passes: audio, the pair as teacher, and both with hidden frames


@TASKS
def test_both_backends_draw_the_same_drop_path_in_every_pass_of_a_step(task):
    config = small_config(decoder={"drop_path_rate": 0.4, "layers": 3}, drop_path_rate=0.4, layers=3)
    name, inputs = task()
    results = []
    for backend in BACKENDS:
        torch.manual_seed(7)
        results.append(losses_with_gradients(small_model(backend, config).train(), name, inputs))
    assert_close(results[1], results[0])


def test_drop_path_is_drawn_for_every_sample_of_every_pass(monkeypatch):
    drawn = []
    draw = stack_module.draw_drop_path
    monkeypatch.setattr(
        stack_module, "draw_drop_path", lambda rates, samples, *a: (drawn.append(samples), draw(rates, samples, *a))[1]
    )
    name, inputs = vision_language()
    small_model("fused", small_config(drop_path_rate=0.4)).train()(name, **inputs)
    assert drawn == [3] * 6  # text, image, both hidden, the pair hidden, and the pair as teacher


def test_joined_passes_give_each_sample_what_it_has_alone():
    batch = batch_of(text=TEXT, image=(3, 3))
    model = small_model("fused")
    encoder = model.encoder_wrapper
    masks = hide(batch, seed=4)
    read, (hidden,) = read_batch(encoder.adapters, batch, masks=masks, passes=[{name: name for name in masks}])
    parts = [
        encoder.embed(read.select("text")),
        encoder.embed(read.select("image"), hidden.visible),
        encoder.embed(read, hidden.visible),
        encoder.embed(read),
    ]
    joined = encoder(parts)
    for together, part in zip(joined, parts, strict=True):
        (alone,) = encoder([part])
        assert_close(together.unpacked(), alone.unpacked(), 1e-12)
        for name, rows in together.packed.items():
            assert torch.equal(rows.row, alone.packed[name].row)
            assert torch.equal(rows.position, alone.packed[name].position)
            assert torch.equal(rows.cls, alone.packed[name].cls)
            assert rows.position[rows.cls].eq(0).all()


def test_joined_passes_keep_each_rows_sample():
    batch = batch_of(text=[7, 2], image=(3, 3))
    samples = {"text": [2, 0], "image": [1, 0, 2]}
    model = small_model("fused")
    encoder = model.encoder_wrapper
    read, _ = read_batch(encoder.adapters, batch, samples=samples)
    part = encoder.embed(read)
    (alone,) = encoder([part], read.samples)
    for together in encoder([part, part, part], read.samples):
        assert_close(together.unpacked(), alone.unpacked(), 1e-12)


@TASKS
def test_a_step_is_bitwise_the_same_when_repeated(task):
    name, inputs = task()
    model = small_model("fused", dtype=torch.float32)
    inputs = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    assert_same_bits(*(losses_with_gradients(model, name, inputs) for _ in range(2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_decoder_with_a_bias_does_not_see_padding_and_one_without_does(backend, bias):
    decoder = {"text": TextAdapterConfig(bucket_size=6, use_bias=bias), "image": None, "audio": None}
    model = small_model(backend, small_config(decoder=decoder))
    padded, alone = text_batch([6, 3], seed=1), text_batch([6, 3], seed=1)[1:, :3]
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 2] = True
    together = model.reconstruct(text=padded, masks={"text": mask})["text"][1, :4]
    single = model.reconstruct(text=alone, masks={"text": mask[1:, :4]})["text"][0]
    assert torch.allclose(together, single, rtol=1e-9, atol=1e-12) == bias


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_layers_fire_once_a_layer(backend):
    model, seen = small_model(backend), []
    for i, layer in enumerate(model.encoder_wrapper.fusion_model.layers):
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
    model.encode(**batch_of(text=[3, 2], image=(2, 2)))
    assert seen == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_calling_the_model_calls_the_task(backend):
    model, batch = small_model(backend), batch_of(text=[3, 2])
    assert torch.equal(model("embed", **batch), model.embed(**batch))
    with pytest.raises(ValueError, match=r"^task: expected one of encode, embed.*, got 'save'"):
        model("save", directory="nowhere")
