"""Upstream's state dicts: strict, all problems in one message, nothing half-changed."""

import pytest
import torch
from data._refused import refused, taken
from models._small import small_config, small_model
from support.memory import filled_memory

from onepeace_fast import OnePeacePretrain
from onepeace_fast.relative_position import dense_index, grid_code_offset, grid_codes, grid_table_rows

TEXT_TABLE = "encoder_wrapper.text_adapter.rel_pos_table_list.0.weight"
BUCKET = "encoder_wrapper.{}_adapter.rp_bucket"


def grid_index(grid=4):
    """The index of image tokens, upstream's formula."""
    place = torch.arange(grid * grid)
    y, x = place // grid, place % grid
    index = torch.zeros(grid * grid + 1, grid * grid + 1, dtype=torch.int64)
    index[1:, 1:] = (y[:, None] - y + grid - 1) * (2 * grid - 1) + x[:, None] - x + grid - 1
    rows = (2 * grid - 1) ** 2 + 3
    index[0], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index


def series_index(bucket, positions=1024):
    """The index of text or audio tokens, upstream's formula in float64 apart from its edges."""
    distance = torch.arange(positions)[:, None] - torch.arange(positions)
    middle = bucket // 2
    magnitude = distance.abs().clamp(min=middle).double()
    steps = (magnitude / middle).log() / torch.tensor((positions - 1) / middle).double().log() * (middle - 1)
    far = (middle + (steps - 1e-5).ceil().long()) * distance.sign()
    index = torch.where(distance.abs() <= middle, distance, far) + bucket - 1
    index[0], index[:, 0], index[0, 0] = 2 * bucket - 1, 2 * bucket, 2 * bucket + 1
    return index


def right_buffers():
    """What public checkpoints also carry, for small_config."""
    return {
        "encoder_wrapper.image_adapter.position_idx": torch.arange(3 * 3 + 1),
        BUCKET.format("image"): grid_index(),
        BUCKET.format("text"): series_index(6),
        BUCKET.format("audio"): series_index(8),
        "encoder_wrapper.text_adapter.embed_positions.version": torch.tensor([3.0]),
    }


def other_values(model):
    """A state dict for the model with values that it does not have."""
    return {name: value + 1 for name, value in model.to_upstream_state_dict().items()}


def refuse(model, state_dict, *expected):
    """Loading raises one line that names everything expected, and leaves every parameter bit for bit."""
    before = {name: value.clone() for name, value in model.to_upstream_state_dict().items()}
    refused(lambda: model.load_upstream_state_dict(state_dict), "state_dict: expected ", *expected)
    after = model.to_upstream_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_every_missing_unexpected_and_misshaped_key_is_listed():
    model = small_model("fused")
    state_dict = other_values(model)
    del state_dict["text_proj.weight"], state_dict["logit_scale"]
    state_dict |= {"head.weight": torch.zeros(2), "text_proj.wieght": torch.zeros(2)}
    state_dict["image_proj.bias"] = torch.zeros(7)
    state_dict[TEXT_TABLE] = torch.zeros(3, 3)
    refuse(
        model, state_dict, "missing: logit_scale, text_proj.weight", "unexpected: head.weight, text_proj.wieght",
        "image_proj.bias [7] instead of [48]", f"{TEXT_TABLE} [3, 3] instead of [14, 3]",
    )  # fmt: skip


def test_an_empty_state_dict_is_refused():
    refuse(small_model("fused"), {}, "missing: ", "logit_scale")


@pytest.mark.parametrize(
    "value", [torch.zeros(48, 48, device="meta"), [[0.0] * 48] * 48, None], ids=["meta", "list", "None"]
)
@pytest.mark.parametrize("name", ["encoder_wrapper.fusion_model.layers.0.self_attn.q_proj.weight", "text_proj.weight"])
def test_a_value_that_cannot_be_copied_is_refused_before_any_other_is(name, value):
    model = small_model("fused")
    refuse(model, {**other_values(model), name: value}, name)


def changed(value):
    value = value.clone()
    value.view(-1)[-1] += 1
    return value


@pytest.mark.parametrize("name", right_buffers())
@pytest.mark.parametrize("how", ["another value", "another shape"])
def test_a_buffer_that_contradicts_the_configuration_is_refused(name, how):
    model, buffers = small_model("fused"), right_buffers()
    buffers[name] = changed(buffers[name]) if how == "another value" else buffers[name][:-1]
    refuse(model, {**other_values(model), **buffers}, name)


@pytest.mark.parametrize(
    "name", ["encoder_wrapper.nothing.rp_bucket", "text_proj.position_idx", "decoder_wrapper.text_adapter.rp_bucket"]
)
def test_a_buffer_of_no_part_of_the_model_is_refused(name):
    model = small_model("fused")
    refuse(model, {**other_values(model), name: torch.zeros(1)}, f"{name} belongs to no part of this model")


def test_the_old_name_of_a_bias_table_is_accepted():
    model = small_model("fused")
    values = other_values(model)
    old = {name.replace("rel_pos_table_list.0.weight", "rel_pos_table.weight"): value for name, value in values.items()}
    assert set(old) != set(values)
    model.load_upstream_state_dict(old)
    assert torch.equal(model.to_upstream_state_dict()[TEXT_TABLE], values[TEXT_TABLE])


def test_a_table_under_both_its_old_and_its_new_name_is_refused():
    model = small_model("fused")
    old = TEXT_TABLE.replace("rel_pos_table_list.0.weight", "rel_pos_table.weight")
    refuse(model, {**other_values(model), old: torch.zeros(14, 3)}, old)


def test_a_model_with_a_table_per_layer_does_not_take_the_old_name_for_all():
    model = small_model("fused", small_config(bias_table_per_layer=True))
    values = other_values(model)
    values = {
        name.replace("rel_pos_table_list.0.weight", "rel_pos_table.weight"): value
        for name, value in values.items() if "rel_pos_table_list.1" not in name
    }  # fmt: skip
    refuse(model, values, "rel_pos_table_list.1.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loading_keeps_the_models_dtype(dtype):
    source = small_model("fused", dtype=torch.float32, seed=1)
    model = small_model("fused", dtype=dtype)
    model.load_upstream_state_dict(source.to_upstream_state_dict())
    got = model.to_upstream_state_dict()
    assert {value.dtype for value in got.values()} == {dtype}
    assert torch.equal(got["text_proj.weight"], source.text_proj.weight.to(dtype))


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_built_without_memory_computes_the_same_once_loaded(strict):
    source, text = small_model("fused"), torch.randint(4, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        model = OnePeacePretrain(small_config(), backend="fused").double()
    with filled_memory():
        model = model.to_empty(device="cpu").eval()
    if strict:
        model.load_state_dict(source.state_dict())
    else:
        model.load_upstream_state_dict(source.to_upstream_state_dict())
    assert torch.equal(model.embed(text=text), source.embed(text=text))


def test_names_are_upstreams_and_pytorchs_own_state_dict_agrees():
    model = small_model("fused")
    values = model.to_upstream_state_dict()
    assert set(values) == set(model.state_dict())
    assert {
        "encoder_wrapper.fusion_model.layers.1.text_ffn.0.wi_0.weight", "text_mask_token", "logit_scale",
        "encoder_wrapper.audio_adapter.embed_audios.0.conv_layers.0.2.1.weight", "decoder_text_embed.bias",
    } <= set(values)  # fmt: skip


def test_code_form_of_an_image_gives_upstreams_index():
    codes = grid_codes(4, 4)
    is_cls = torch.arange(17) == 0
    assert torch.equal(dense_index(codes, is_cls, grid_code_offset(4), grid_table_rows(4)), grid_index())


def test_right_buffers_are_accepted_by_a_model_whose_memory_holds_anything():
    with torch.device("meta"):
        model = OnePeacePretrain(small_config())
    with filled_memory():
        model = model.to_empty(device="cpu")
    values = small_model("fused", dtype=torch.float32).to_upstream_state_dict()
    with taken():
        model.load_upstream_state_dict({**values, **right_buffers()})
    assert all(torch.equal(got, values[name]) for name, got in model.to_upstream_state_dict().items())
