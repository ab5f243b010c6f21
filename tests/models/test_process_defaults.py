"""Dtypes and devices come from the model and its inputs, never from what torch's defaults are in this process."""

import contextlib

import pytest
import torch
from models import _mico
from models._small import BACKENDS, assert_same_bits, batch_of, losses_with_gradients, small_config, small_model
from models._unival import unival
from models.test_add_modality import SensorAdapter, extended
from training._batches import STAGES, batch_number, masks_of

from onepeace_fast import OnePeacePretrain
from onepeace_fast.compared_model import ComparedModel
from onepeace_fast.demo import data as demo_data
from onepeace_fast.demo.waveform import waveforms
from onepeace_fast.differences import named_tensors
from onepeace_fast.layers.adapters.adapter import padded_batch
from onepeace_fast.models.mico.encoder import rope_angles
from onepeace_fast.models.unival import beam_search, spectrogram, state
from onepeace_fast.relative_position import series_index
from onepeace_fast.training.pairs import INPUTS


@contextlib.contextmanager
def default(value):
    """Another default dtype, or another default device: meta stands for one that is not the inputs'."""
    before = torch.get_default_dtype()
    if isinstance(value, torch.dtype):
        torch.set_default_dtype(value)
    else:
        torch.set_default_device(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


DTYPES = [torch.float64, torch.bfloat16, torch.float16]
DEFAULTS = pytest.mark.parametrize("value", [*DTYPES, "meta"])


def same_under(value, made):
    """See that what a function makes is the same where that is the default."""
    expected = made()
    with default(value):
        assert_same_bits(made(), expected)


@DEFAULTS
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_computes_the_same_whatever_the_defaults_are(backend, value):
    model = small_model(backend, dtype=torch.float32)
    batch = batch_of(text=[3, 5], image=(2, 4), audio=[9, 20], dtype=torch.float32)  # the positions are 3 x 3
    samples = {"text": [0, 1], "image": [1, 2], "audio": [2, 0]}
    same_under(value, lambda: model.encode(**batch, samples=samples))


@pytest.mark.parametrize("value", [torch.bfloat16, "meta"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mico_computes_the_same_whatever_the_defaults_are(backend, value):
    model, batch = _mico.mico(backend, torch.float32), _mico.batch(torch.float32)
    same_under(value, lambda: model.losses(_mico.CAPTIONS, generator=torch.Generator("cpu").manual_seed(0), **batch))


@pytest.mark.parametrize("value", [torch.float64, torch.bfloat16, "meta"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradients_are_the_same_whatever_the_defaults_are(backend, stage, value):
    model = small_model(backend, dtype=torch.float32).train()
    batch = batch_number(stage, 0)
    inputs = {name: batch[name] for name in INPUTS if name in batch} | {"masks": masks_of(stage, batch, 0)}
    same_under(value, lambda: losses_with_gradients(model, f"{stage}_loss", inputs))


@DEFAULTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_loaded_model_has_its_file_s_dtypes_whatever_the_defaults_are(dtype, value, tmp_path):
    model = extended().to(dtype)
    model.logit_scale.data = model.logit_scale.data.float()
    adapter = SensorAdapter()
    model.save(tmp_path)
    with default(value):
        loaded = OnePeacePretrain.load(tmp_path, adapters={"sensor": adapter})
    assert_same_bits(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert_same_bits(dict(loaded.named_buffers()), dict(model.named_buffers()))
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert loaded.encoder.adapter("sensor") is adapter and loaded.training


@DEFAULTS
def test_an_added_modality_has_the_model_s_dtype_whatever_the_defaults_are(value):
    adapter = SensorAdapter()
    model = small_model("fused", dtype=torch.float32)
    with default(value):
        model.add_modality("sensor", adapter)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_distances_of_a_series_are_upstream_s_whatever_the_default_dtype_is(dtype):
    expected = [series_index(size) for size in (6, 256, 512)]
    with default(dtype):
        assert all(torch.equal(series_index(size), index) for size, index in zip((6, 256, 512), expected, strict=True))
        model = OnePeacePretrain(small_config(), backend="fused")
    assert torch.equal(model.encoder_wrapper.text_adapter.series_index, series_index(6))


@DEFAULTS
@pytest.mark.parametrize("stage", STAGES)
def test_masks_are_drawn_the_same_whatever_the_defaults_are(stage, value):
    batch = batch_number(stage, 0)
    same_under(value, lambda: masks_of(stage, batch, 0))


@DEFAULTS
def test_what_the_demo_trains_on_is_the_same_whatever_the_defaults_are(value):
    def made():
        generator = torch.Generator().manual_seed(0)
        images = torch.arange(640.0, dtype=torch.float32, device="cpu").reshape(10, 8, 8)
        vocabulary = demo_data.Vocabulary()
        digits = torch.tensor([3, 1, 4], device="cpu")
        captions = demo_data.draw_captions(demo_data.IMAGE_TEMPLATES, digits, generator)
        sounds = [torch.sin(torch.arange(900.0, dtype=torch.float32, device="cpu")).numpy()]
        return {
            "images": demo_data.enlarge(images, generator),
            "text": vocabulary.encode(captions),
            "sounds": waveforms(sounds, generator),
        }

    same_under(value, made)


CPU = torch.device("cpu")


def searched():
    """The hypotheses of a search over fixed logits."""

    def step(written, texts_of, parents):
        scores = torch.arange(6, dtype=torch.float32, device="cpu").sin() * written.shape[1]
        return scores.expand(len(written), 6)

    settings = beam_search.Settings(beams=2, max_length=4)
    return {str(place): own for place, own in enumerate(beam_search.search(step, 2, settings, CPU))}


def cotangents():
    linear = torch.nn.Linear(3, 2, device="cpu", dtype=torch.float32)
    x = torch.ones(4, 3, device="cpu", dtype=torch.float32)
    model = ComparedModel("a", linear, (x,), {}, {"x": x}, None)
    model.gradients(model.run())
    return model.cotangents


def upstream_buffers():
    config = unival("reference").config
    names = ("version", "token_rp_bucket", "image_rp_bucket", "image_position_idx")
    return {name: state.buffer(config, f"decoder.{name}") for name in names}


MADE = {
    "padding": lambda: padded_batch("x", [torch.ones(2, 3, dtype=torch.float32, device="cpu")], [2]),
    "beam search": searched,
    "upstream's buffers": upstream_buffers,
    "spectrogram": lambda: dict(enumerate((*spectrogram.fourier(), spectrogram.mel_filters()))),
    "rotary angles": lambda: {"": rope_angles(_mico.VISION)},
    "cotangents": cotangents,
    "numbers": lambda: {name: one.tolist() for name, one in named_tensors({"a": 1, "b": True}).items()},
}


@pytest.mark.parametrize("value", [torch.float64, "meta"])
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_on_the_cpu_is_the_same_whatever_the_defaults_are(name, value):
    same_under(value, MADE[name])
