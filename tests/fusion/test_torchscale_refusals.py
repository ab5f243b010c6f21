"""What resembles torchscale's encoder and is not taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onepeace_fast import fuse
from tests.fusion._torchscale import WIDTH, Model, make


def refusal(model: nn.Module) -> str:
    """Why the model is refused; an empty text where it is not."""
    try:
        fuse(model)
    except ValueError as error:
        return str(error).removeprefix("encoder: resembles torchscale, but ")
    return ""


class Subclass(nn.Linear):
    pass


def _moe(model: Model) -> None:
    model.encoder.layers[1].is_moe_layer = True


def _another_forward(model: Model) -> None:
    model.encoder.layers[0].forward = model.encoder.layers[0].forward


def _gamma(model: Model) -> None:
    model.encoder.layers[0].gamma = nn.Parameter(torch.ones(WIDTH))


def _copies_that_differ(model: Model) -> None:
    model.encoder.layers[0].ffn.B.fc1.bias = None


def _another_activation(model: Model) -> None:
    for copy_ in (model.encoder.layers[0].ffn.A, model.encoder.layers[0].ffn.B):
        copy_.activation_fn = F.elu


def _an_adapter(model: Model) -> None:
    model.encoder.layers[0].self_attn.q_proj.A = Subclass(WIDTH, WIDTH)


def _another_norm(model: Model) -> None:
    model.encoder.layer_norm = nn.RMSNorm(WIDTH)


def _a_further_part(model: Model) -> None:
    model.encoder.layers[1].adapter = nn.Linear(WIDTH, WIDTH)


def _time_first(model: Model) -> None:
    model.encoder.layers[0].ffn.dim = 0


def _few_columns(model: Model) -> None:
    model.encoder.relative_position.relative_attention_bias = nn.Embedding(12, 1)


def _of_the_instance(model: Model) -> None:
    model.encoder.forward = model.encoder.forward


def _stochastic_depth(model: Model) -> None:
    model.encoder.layers[0].drop_path = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_moe, "layers.1: expected one feed-forward network, got a mixture of experts (moe_freq)"),
        (
            _another_forward,
            "layers.0: expected the class's forward, got one of its own, such as that of fairscale's "
            "checkpoint_wrapper; build it with checkpoint_activations=False and wrap the layers after fuse",
        ),
        (_gamma, "layers.0: expected no parameters of its own, got gamma"),
        (_copies_that_differ, "layers.0.ffn: expected copies A and B that are alike, got others in fc1"),
        (
            _another_activation,
            f"layers.0.ffn.A.activation_fn: expected one of F.gelu, F.relu, F.silu, got {F.elu!r}",
        ),
        (_an_adapter, "layers.0.self_attn.q_proj: expected copies A and B that are alike, got others in the copies"),
        (_another_norm, "layer_norm: expected a LayerNorm of torch, got RMSNorm"),
        (_a_further_part, "layers.1.adapter: expected no such module, got a Layer with it"),
        (_time_first, "layers.0.ffn.dim: expected 1, that of tokens, got 0"),
        (_few_columns, "relative_position: expected a column for each of 4 heads, got 1"),
        (
            _of_the_instance,
            "forward: expected that of the class Encoder, got one set on the instance; take it off, fuse, then put it "
            "on again",
        ),
        (_stochastic_depth, "layers.0.drop_path: expected one with drop_prob, got Identity"),
    ],
)
def test_look_alikes_are_refused(change: Callable[[Model], None], message: str) -> None:
    model = make()
    change(model)
    assert refusal(model) == message


@pytest.mark.parametrize(
    ("name", "value"), [("flash_attention", True), ("xpos_rel_pos", True), ("dilated_ratio", [1, 2])]
)
def test_other_attention_is_refused(name: str, value: Any) -> None:
    message = f"layers.0.self_attn.args.{name}: expected it to be off, got {value!r}"
    assert refusal(make(**{name: value})) == message


def test_a_hook_that_is_there_before_fuse_is_refused() -> None:
    model = make()
    model.encoder.layers[0].ffn.B.register_forward_hook(lambda *_: None)
    assert "layers.0.ffn.B: expected no hooks" in refusal(model)
