"""Which parameters decay, what AdamW does with them, and the learning rate of every step."""

import math

import pytest
import torch
from models._small import small_config
from torch import nn

from onepeace_fast import OnePeacePretrain
from onepeace_fast.training.optimizer import adamw, learning_rate, parameter_groups

ENCODER, DECODER = "encoder_wrapper", "decoder_wrapper"
LAYER = f"{ENCODER}.fusion_model.layers.0"
DECAYED = [
    f"{LAYER}.self_attn.q_proj.weight",
    f"{LAYER}.text_ffn.0.wi_0.weight",
    f"{ENCODER}.text_adapter.embed_tokens.weight",
    f"{ENCODER}.image_adapter.embed_images.0.weight",
    f"{ENCODER}.audio_adapter.embed_audios.0.conv_layers.0.0.weight",
    f"{ENCODER}.audio_adapter.embed_positions.1.0.weight",
    f"{ENCODER}.audio_adapter.cls_pos_embed",
    f"{ENCODER}.audio_adapter.mask_embedding",
    *(f"{ENCODER}.{name}_adapter.rel_pos_table_list.0.weight" for name in ("text", "image", "audio")),
    *(f"{name}_mask_token" for name in ("text", "image", "audio")),
    "text_proj.weight",
    "decoder_audio_embed.weight",
    "image_mask_head.weight",
]
SPARED = [
    f"{LAYER}.self_attn.q_proj.bias",
    f"{LAYER}.self_attn.ln.weight",
    f"{LAYER}.self_attn.c_attn",
    f"{LAYER}.self_attn_layer_norm.weight",
    f"{LAYER}.gamma_1",
    f"{LAYER}.gamma_2",
    f"{LAYER}.text_ffn.2.weight",
    f"{ENCODER}.fusion_model.audio_layer_norm.bias",
    f"{ENCODER}.audio_adapter.embed_positions.1.0.bias",
    *(f"{stack}.{name}_adapter.cls_embedding" for stack in (ENCODER, DECODER) for name in ("text", "image", "audio")),
    *(f"{stack}.text_adapter.embed_positions.weight" for stack in (ENCODER, DECODER)),
    *(f"{stack}.image_adapter.pos_embed" for stack in (ENCODER, DECODER)),
    f"{DECODER}.audio_adapter.embed_positions.weight",
    "text_proj.bias",
    "logit_scale",
]


def full_model():
    """A small model with all modalities, LayerScale and head scale."""
    return OnePeacePretrain(small_config(head_scale=True))


def names_of(model, groups):
    """The parameters' names, group by group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def test_decay_is_as_upstreams():
    """What has one dimension is spared, and of matrices CLS and positions alone; all are in one group."""
    model = full_model()
    groups = parameter_groups(model, weight_decay=0.07)
    decayed, spared = names_of(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.07, 0.0]
    assert sorted(decayed + spared) == sorted(name for name, _ in model.named_parameters())
    assert set(DECAYED) <= set(decayed) and set(SPARED) <= set(spared)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    assert set(decayed) <= matrices and matrices & set(spared) == matrices & set(SPARED)


def test_names_are_told_apart_behind_the_prefix_of_a_wrapper():
    model = full_model()
    wrapped = nn.ModuleDict({"module": model})
    got = names_of(wrapped, parameter_groups(wrapped))
    assert got == [[f"module.{name}" for name in group] for group in names_of(model, parameter_groups(model))]


def test_frozen_parameters_are_left_out():
    model = full_model()
    model.encoder_wrapper.requires_grad_(False)
    model.encoder_wrapper.adapter("audio").requires_grad_(True)
    groups = parameter_groups(model)
    names = [name for group in names_of(model, groups) for name in group]
    assert sorted(names) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert f"{ENCODER}.audio_adapter.cls_pos_embed" in names
    assert not any(name.startswith(f"{ENCODER}.text_adapter") for name in names)


def test_a_group_without_parameters_is_left_out():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizer = adamw(model, 0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.0)]


def test_a_step_is_adams_after_decay_of_the_decayed_alone():
    model = nn.Linear(3, 2).double()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rate, weight_decay, (beta_1, beta_2), eps = 0.01, 0.07, (0.9, 0.98), 1e-8
    optimizer = adamw(model, rate, weight_decay)
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in start.items()}
    want = dict(start)
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            parameter.grad = gradient.clone()
            first, second = moments[name]
            first, second = beta_1 * first + (1 - beta_1) * gradient, beta_2 * second + (1 - beta_2) * gradient**2
            moments[name] = first, second
            decay = weight_decay if name == "weight" else 0.0
            update = (first / (1 - beta_1**step)) / ((second / (1 - beta_2**step)).sqrt() + eps)
            want[name] = want[name] * (1 - rate * decay) - rate * update
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), want[name], rtol=1e-12, atol=1e-14)


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    def rate(step):
        return learning_rate(step, peak=5e-4, warm_up=100, total=1100, minimum=1e-6)

    assert rate(0) == 1e-6
    assert [rate(step) for step in (1, 99)] == pytest.approx([1e-6 + (5e-4 - 1e-6) * part for part in (0.01, 0.99)])
    assert rate(50) == pytest.approx((5e-4 + 1e-6) / 2)
    assert rate(100) == 5e-4
    assert rate(600) == pytest.approx((5e-4 + 1e-6) / 2)
    assert rate(350) == pytest.approx(1e-6 + (5e-4 - 1e-6) * (1 + math.sqrt(0.5)) / 2)
    assert rate(1100) == rate(5000) == 1e-6
    rates = [rate(step) for step in range(1101)]
    assert max(rates) == rates[100]
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_the_learning_rate_without_warm_up_starts_at_its_peak_and_ends_at_zero():
    rates = [learning_rate(step, peak=0.2, warm_up=0, total=4) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.1 + 0.1 * math.sqrt(0.5), 0.1, 0.1 - 0.1 * math.sqrt(0.5), 0.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", -1), ("step", 1.0), ("warm_up", -1), ("warm_up", 10), ("total", 3), ("total", 0), ("total", 9.0),
     ("peak", 0.0), ("peak", math.inf), ("minimum", -1e-6), ("minimum", 2e-3), ("minimum", math.nan)],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_is_refused_in_one_line(name, value):
    arguments = {"step": 0, "peak": 1e-3, "warm_up": 3, "total": 10, "minimum": 0.0, name: value}
    with pytest.raises(ValueError, match=r"^(step|warm_up|total|peak|minimum): expected [^\n]*, got .*$") as refusal:
        learning_rate(**arguments)
    assert str(refusal.value).startswith("total" if (name, value) == ("warm_up", 10) else name)


@pytest.mark.parametrize("weight_decay", [-0.1, math.inf, math.nan])
def test_a_decay_that_does_not_fit_is_refused_in_one_line(weight_decay):
    with pytest.raises(ValueError, match=r"^weight_decay: expected [^\n]*, got [^\n]*$"):
        parameter_groups(nn.Linear(2, 2), weight_decay)


def test_a_model_that_is_frozen_whole_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^model: expected a parameter with requires_grad, got none$"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))
