"""Training mode: DropPath, dropout and activation checkpointing on both backends."""

import pytest
import torch
from models._small import (
    BACKENDS,
    assert_close,
    assert_same_bits,
    batch_of,
    gradients_of,
    small_config,
    small_model,
    valid_tokens,
    weighted_sum,
    with_gradients,
)

from onepeace_fast.models import stack

ROWS = {"text": [7, 2, 5, 4], "image": (4, 3)}


def training_results(backend, seed, batch, **encoder):
    model = small_model(backend, small_config(**encoder)).train()
    torch.manual_seed(seed)
    return with_gradients(model, batch)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drop_path_drops_the_same_samples_packed_and_padded(seed):
    batch = batch_of(**ROWS, audio=[9, 4, 6, 3])
    want, got = (training_results(backend, seed, batch, drop_path_rate=0.4, layers=4) for backend in BACKENDS)
    assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("drawing", "still"),
    [({"drop_path_rate": 0.4, "layers": 4}, {"layers": 4}), ({"dropout": 0.3}, {})],
    ids=["DropPath", "dropout"],
)
def test_what_is_drawn_depends_on_the_seed_and_is_off_in_evaluation(backend, drawing, still):
    batch = batch_of(**ROWS)
    first, again, other = (training_results(backend, seed, batch, **drawing) for seed in (0, 0, 1))
    assert_same_bits(again, first)
    assert (first["text"] - other["text"]).abs().max() > 1e-3
    evaluated, plain = (with_gradients(small_model(backend, small_config(**c)), batch) for c in (drawing, still))
    assert_same_bits(evaluated, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_dropped_in_every_layer_passes_unchanged_and_leaves_the_others_alone(backend, monkeypatch):
    dropped = 1

    def draw(rates, samples):
        drop_path = torch.full((len(rates), 2, samples), 1.25)
        drop_path[:, :, dropped] = 0
        return drop_path

    batch = batch_of(text=[7, 2, 5])
    valid = valid_tokens(batch)["text"]
    model = small_model(backend, small_config(drop_path_rate=0.4)).train()
    monkeypatch.setattr(stack, "draw_drop_path", draw)
    got = model.encode(**batch)["text"]
    encoder = model.encoder_wrapper
    embedded = encoder.fusion_model.final_norm("text")(encoder.adapter("text")(batch["text"]))
    assert_close({"dropped": got[dropped][valid[dropped]]}, {"dropped": embedded[dropped][valid[dropped]]}, 1e-12)
    gradients = gradients_of(model, got[dropped][valid[dropped]].sum() * 1e3)
    inside = {name: grad for name, grad in gradients.items() if ".layers." in name}
    assert inside
    assert not any(grad.any() for grad in inside.values())
    rest = model.encode(text=batch["text"][[0, 2]])["text"]
    assert (rest[1] - got[2]).abs().max() > 1e-3  # there the dropped row of the two is row 1
    monkeypatch.setattr(stack, "draw_drop_path", lambda rates, samples: torch.full((len(rates), 2, samples), 1.25))
    alone = model.encode(**batch)["text"]
    assert_close({"others": got[[0, 2]][valid[[0, 2]]]}, {"others": alone[[0, 2]][valid[[0, 2]]]}, 1e-12)


@pytest.mark.parametrize(
    "encoder",
    [{}, {"drop_path_rate": 0.4, "layers": 4}, {"dropout": 0.2}, {"bias_table_per_layer": True, "head_scale": True}],
    ids=["plain", "drop path", "dropout", "table per layer"],
)
def test_checkpointed_activations_give_bitwise_the_same_gradients(encoder):
    batch = batch_of(**ROWS)
    plain = training_results("fused", 0, batch, **encoder)
    checkpointed = training_results("fused", 0, batch, checkpoint_activations=True, **encoder)
    assert_same_bits(checkpointed, plain)


def test_checkpointed_reference_gives_the_same_gradients():
    batch = batch_of(**ROWS)
    plain, checkpointed = (
        training_results("reference", 0, batch, drop_path_rate=0.4, checkpoint_activations=flag)
        for flag in (False, True)
    )
    assert_close(checkpointed, plain, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_runs_every_layer_again(backend):
    batch, counts = batch_of(**ROWS), []
    for flag in (False, True):
        model, calls = small_model(backend, small_config(checkpoint_activations=flag)).train(), []
        for layer in model.encoder_wrapper.fusion_model.layers:
            module = layer.self_attn_layer_norm if backend == "reference" else layer
            module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with_gradients(model, batch)
        counts.append(len(calls))
    assert counts == [2, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_under_dropout_follow_the_outputs(backend):
    """A central difference with the same seed: the backward pass must draw the forward's mask again."""
    batch = batch_of(text=[5, 3])
    model, valid = small_model(backend, small_config(dropout=0.3)).train(), valid_tokens(batch)

    def loss():
        torch.manual_seed(5)
        return weighted_sum(model.encode(**batch), valid)

    name, step = "encoder_wrapper.fusion_model.layers.0.text_ffn.3.weight", 1e-5
    gradient, parameter = gradients_of(model, loss())[name], model.get_parameter(name)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=parameter.dtype)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            parameter += sign * step * direction
            values.append(loss().item())
    difference = (values[0] - values[1]) / (2 * step)
    assert difference == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def test_frozen_parameters_get_no_gradient_and_change_no_other():
    batch = batch_of(**ROWS)
    want = with_gradients(small_model("fused"), batch)
    model = small_model("fused")
    frozen = {name for name, _ in model.named_parameters() if "text_ffn" in name or "rel_pos_table" in name}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    got = with_gradients(model, batch)
    assert frozen & set(want)
    assert_close(got, {name: value for name, value in want.items() if name not in frozen}, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_nothing_reads_have_a_gradient_of_zeros_and_change_nothing(backend):
    unread = {f"decoder_wrapper.{name}_adapter.cls_embedding" for name in ("text", "image", "audio")}
    unread |= {f"{stack}_wrapper.audio_adapter.mask_embedding" for stack in ("encoder", "decoder")}

    def run(fill):
        model = small_model(backend)
        with torch.no_grad():
            for name in unread:
                model.get_parameter(name).fill_(fill)
        batch = batch_of(text=[3], image=(1, 3), audio=[9])
        masks = {name: torch.arange(valid.shape[1])[None] == 1 for name, valid in valid_tokens(batch).items()}
        rebuilt = model.reconstruct(**batch, masks=masks)
        sum(value.square().sum() for value in rebuilt.values()).backward()
        return rebuilt, model.to_upstream_state_dict(grads=True)

    (first, gradients), (second, others) = run(0.5), run(torch.nan)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name, gradient in gradients.items():
        assert (others[name] is None) if gradient is None else torch.equal(others[name], gradient), name
    zeros = {name for name in unread if gradients[name] is not None and not gradients[name].any()}
    assert zeros == unread
