"""More modalities: what they add, what they leave bitwise alone, and stage 2's freezing."""

import pytest
import torch
from data._refused import refused
from models._added import everything
from models._mico import refusal
from models._small import (
    BACKENDS,
    assert_close,
    assert_same_bits,
    at_tokens,
    batch_of,
    gradients_of,
    randomise,
    small_config,
    small_model,
    valid_tokens,
    weighted_sum,
)
from torch import nn

from onepeace_fast import OnePeacePretrain
from onepeace_fast.layers.adapters import SeriesAdapter, valid_from_padding


class SensorAdapter(SeriesAdapter):
    """A series of readings: one token for each."""

    takes_padding = True

    def __init__(self, embed_dim=48, heads=3, tables=1, channels=2):
        super().__init__(embed_dim, heads, tables, bucket_size=6)
        self.embed_readings = nn.Linear(channels, embed_dim)
        self.embed_positions = nn.Embedding(32, embed_dim)

    def valid(self, name, value, padding):
        return valid_from_padding(name, padding, value.shape[0], value.shape[1] + 1, value.device, tokens="readings")

    def tokens(self, value):
        readings = self.embed_readings(value)
        return torch.cat([self.cls_embedding.expand(value.shape[0], -1, -1), readings], dim=1)

    def position_table(self, width):
        return self.embed_positions.weight[:width]


def readings(lengths, seed=0):
    value = torch.randn(
        len(lengths), max(lengths), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    padding = torch.arange(max(lengths) + 1) > torch.tensor(lengths)[:, None]
    return {"sensor": value, "sensor_padding": padding}


def extended(backend="fused", init_from=None, **config):
    model = small_model(backend, small_config(**config))
    tables = model.config.encoder.bias_tables
    model.add_modality("sensor", SensorAdapter(tables=tables), init_from=init_from)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("init_from", [None, "audio"])
def test_adding_a_modality_leaves_all_other_outputs_bitwise_alone(backend, init_from):
    model = small_model(backend)
    before = everything(model)
    model.add_modality("sensor", SensorAdapter(), init_from=init_from)
    assert_same_bits(everything(model), before)


def contrast_with_text(model):
    from onepeace_fast.models.losses import contrastive_loss

    with torch.no_grad():
        text = model.embed(text=batch_of(text=[7, 2, 5])["text"])
    return contrastive_loss(model.embed(**readings([4, 6, 3])), text, model.logit_scale_exp())[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_an_added_modality_leaves_the_rest_bitwise_alone(backend):
    torch.manual_seed(0)
    model = extended(backend, init_from="text", drop_path_rate=0.2)
    before = everything(model)
    model.train()
    model.train_only("sensor")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    losses = []
    for _ in range(15):
        loss = contrast_with_text(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    assert_same_bits(everything(model), before)


def test_an_added_modality_joins_any_set_of_modalities_packed_as_padded():
    results = []
    for backend in BACKENDS:
        model = extended(backend)
        randomise(model, seed=3)
        inputs = {**batch_of(text=[7, 2, 5], image=(3, 3)), **readings([4, 6, 1])}
        outputs = model.encode(**inputs)
        valid = valid_tokens(inputs) | {"sensor": ~inputs["sensor_padding"]}
        results.append(at_tokens(outputs, valid) | gradients_of(model, weighted_sum(outputs, valid)))
        assert any("sensor_adapter.rel_pos_table_list" in name for name in results[-1])
    assert_close(results[1], results[0])


def test_copied_parts_equal_their_origin_and_share_no_memory():
    model = extended(init_from="audio")
    parts = ["audio_proj", "encoder_wrapper.fusion_model.audio_layer_norm"]
    parts += [f"encoder_wrapper.fusion_model.layers.{i}.audio_ffn" for i in range(2)]
    for part in parts:
        copied = dict(model.get_submodule(part.replace("audio", "sensor")).named_parameters())
        for name, parameter in model.get_submodule(part).named_parameters():
            assert torch.equal(copied[name], parameter)
            assert copied[name].data_ptr() != parameter.data_ptr()


def test_fresh_parts_start_as_a_new_models():
    model = extended()
    layer = model.encoder_wrapper.fusion_model.layers[0].sensor_ffn
    assert layer[0].wi_0.weight.abs().max() <= 0.02
    assert not layer[3].bias.any()
    assert layer[2].weight.eq(1).all()
    assert not model.encoder_wrapper.sensor_adapter.rel_pos_table_list[0].weight.any()
    parameter = model.get_parameter("sensor_proj.weight")
    assert parameter.dtype == torch.float64


@pytest.mark.parametrize("config", [{}, {"bias_table_per_layer": True}])
def test_a_saved_model_with_an_added_modality_loads_with_its_adapter(tmp_path, config):
    model = extended(**config).float()
    randomise(model)
    model.save(tmp_path)
    adapter = SensorAdapter(tables=model.config.encoder.bias_tables)
    loaded = OnePeacePretrain.load(tmp_path, backend="fused", adapters={"sensor": adapter}).eval()
    assert loaded.config == model.config
    inputs = readings([4, 6, 3])
    inputs["sensor"] = inputs["sensor"].float()
    assert torch.equal(loaded.embed(**inputs), model.eval().embed(**inputs))
    with pytest.raises(ValueError, match=r"adapters: expected one for each added modality .*sensor.*, got \[\]"):
        OnePeacePretrain.load(tmp_path)


def test_stage_two_trains_exactly_the_audio_side():
    model = small_model("fused")
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.train_only("audio")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    encoder = {name.removeprefix("encoder_wrapper.") for name in trained if name.startswith("encoder_wrapper.")}
    assert encoder and all(
        name.startswith("audio_adapter.") or ".audio_ffn." in name or name.startswith("fusion_model.audio_layer_norm.")
        for name in encoder
    )
    every = {name for name, _ in model.named_parameters()}
    frozen = every - trained
    assert {n for n in frozen if not n.startswith("encoder_wrapper.")} == {
        "text_proj.weight", "text_proj.bias", "image_proj.weight", "image_proj.bias",
    }  # fmt: skip
    assert not [n for n in frozen if ("audio_adapter" in n and "encoder" in n) or ".audio_ffn." in n]
    assert model.logit_scale.item() == pytest.approx(2.659260036932778)


def test_freezing_for_another_modality_starts_from_the_whole_model():
    model = extended()
    model.train_only("audio")
    model.train_only("sensor")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "sensor_proj.weight" in trained and "audio_proj.weight" not in trained
    assert not any("audio_ffn" in name and "encoder" in name for name in trained)
    assert any("sensor_ffn" in name for name in trained)


@pytest.mark.parametrize(
    ("name", "adapter", "init_from", "message"),
    [
        ("audio", SensorAdapter, None, "name: expected one that the model does not have yet, got 'audio'"),
        ("Sensor 1", SensorAdapter, None, "added: expected names of lower-case letters"),
        *(
            (name, SensorAdapter, None, f"none that ends with _padding and none of {taken}, got ['{name}']")
            for taken in (["text", "image", "audio", "samples", "self", "task"],)
            for name in ("text_padding", "samples", "self", "task")
        ),
        ("sensor", SensorAdapter, "video", "init_from: expected None or one of"),
        ("sensor", lambda: SensorAdapter(embed_dim=24), None, "adapter sensor: expected embed_dim 48, got 24"),
        ("sensor", lambda: SensorAdapter(heads=2), None, ": expected 1 bias tables of 3 heads, got 1 of [2]"),
        ("sensor", lambda: SensorAdapter(tables=0), None, "adapter sensor: expected 1 bias tables of 3 heads, got 0"),
        ("sensor", lambda: nn.Linear(2, 48), None, "adapter sensor: expected a subclass of Adapter, got Linear"),
    ],
)
def test_a_modality_that_does_not_fit_is_refused_and_nothing_changes(name, adapter, init_from, message):
    model = small_model("fused")
    before, config = set(dict(model.named_parameters())), model.config
    line = refusal(lambda: model.add_modality(name, adapter(), init_from=init_from))
    assert message in line and "\n" not in line
    assert set(dict(model.named_parameters())) == before and model.config == config


def test_padding_of_an_added_modality_is_checked_as_audios_is():
    model = extended()
    sensor, padding = readings([4, 6, 3]).values()
    wrong = padding.clone()
    wrong[1, 0] = True
    for task, inputs, start, part in (
        ("embed", {"sensor": sensor, "sensor_padding": padding[:, :6]}, "sensor_padding: expected bool [3, 7]", "3, 6"),
        ("embed", {"sensor": sensor, "sensor_padding": wrong}, "sensor_padding: expected False at CLS, ", "got True"),
        ("reconstruct", {"sensor": sensor, "masks": {"sensor": padding}}, "sensor: ", "the decoder lacks"),
        ("encode", {"video": sensor}, "video: expected no tensor", "the model was built without"),
    ):
        refused(lambda task=task, inputs=inputs: model(task, **inputs), start, part)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("init_from", [None, "text"])
def test_new_parts_train_in_the_models_mode_and_every_part_knows_the_new_configuration(training, init_from):
    model = small_model("fused").train(training)
    model.train_only("audio")
    modules, names = set(model.modules()), {name for name, _ in model.named_parameters()}
    adapter = SensorAdapter().train(not training).requires_grad_(False)
    model.add_modality("sensor", adapter, init_from=init_from)
    assert {module.training for module in set(model.modules()) - modules} == {training}
    new = [parameter for name, parameter in model.named_parameters() if name not in names]
    assert len(new) > 10 and all(parameter.requires_grad for parameter in new)
    encoder = model.encoder_wrapper
    assert model.config.encoder.modalities[-1] == "sensor"
    assert encoder.config == encoder.fusion_model.config == model.config.encoder
