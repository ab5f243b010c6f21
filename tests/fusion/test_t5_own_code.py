"""Which calls of encoders like T5 keep the model's own code, and which look-alikes are refused."""

from __future__ import annotations

import pytest
import torch
from fusion import _t5
from torch import nn

from onepeace_fast import fuse, use_backend
from onepeace_fast.fusion.family import TOO_LITTLE_PADDING


def report_of(handle):
    (part,) = handle.report().parts
    return part


IDS = _t5.batch()["input_ids"]
PADDED = _t5.batch()["attention_mask"]
DECLINED = {
    "probabilities": ({"output_attentions": True}, "output_attentions: attention's probabilities are not kept"),
    "a cache": ({"use_cache": True}, "use_cache: it is not known to the packed stack"),
    "another's tokens": (
        {"encoder_hidden_states": torch.zeros(4, 2, _t5.WIDTH)},
        "encoder_hidden_states: it is not known to the packed stack",
    ),
    "a mask of pairs": (
        {"attention_mask": torch.zeros(4, 1, 12, 12)},
        "attention_mask: it is not one of the tokens, [batch, length]",
    ),
    "a text of padding": (
        {"attention_mask": PADDED * torch.tensor([[1], [0], [1], [1]])},
        "attention_mask: a sample has no token; the model's own attention averages its padding",
    ),
    "nothing but padding": ({"attention_mask": torch.zeros_like(PADDED)}, "there is no token"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_calls_that_keep_the_model_s_own_code(name):
    given, reason = DECLINED[name]
    given = {"input_ids": IDS, "attention_mask": PADDED, **given}
    model = _t5.model().encoder
    want = model(**given)["last_hidden_state"]
    handle = fuse(model)
    with use_backend("fused"):
        found = model(**given)["last_hidden_state"]
    assert torch.equal(found, want) and report_of(handle).own_calls == {reason: 1}


def test_probabilities_asked_for_by_the_configuration_keep_the_model_s_own_code():
    model = _t5.model()
    handle = fuse(model)
    model.encoder.config.output_attentions = True
    with use_backend("fused"):
        model(**_t5.batch())
    assert report_of(handle).own_calls == {DECLINED["probabilities"][1]: 1}


@pytest.mark.parametrize("of", ["attention", "a layer"])
def test_dropout_in_training_keeps_the_model_s_own_code(of):
    model, given = _t5.model(), _t5.batch()
    handle = fuse(model)
    if of == "attention":
        model.encoder.block[1].layer[0].SelfAttention.dropout = 0.1
    else:
        model.encoder.block[1].layer[1].dropout.p = 0.1
    with use_backend("fused"):
        model(**given)
        model.train()(**given)
    part = report_of(handle)
    assert part.fused_calls == 1 and part.own_calls == {"dropout in training": 1}


def test_a_cpu_packs_where_padding_pays():
    model = _t5.model()
    handle = fuse(model)
    model(**_t5.batch())
    assert report_of(handle).own_calls == {TOO_LITTLE_PADDING: 1}
    mask = _t5.mask_of([3, 3, 3], 3000 // torch.get_num_threads())
    model.encoder.__dict__["_onepeace_fast_fusion"].of_a_row = 1e9  # as if it were wide
    model(input_ids=torch.ones_like(mask[:, :400]).long(), attention_mask=mask[:, :400])
    assert report_of(handle).fused_calls == 1


def with_decoder(model):
    model.encoder.is_decoder = model.encoder.config.is_decoder = True


def with_cross_attention(model):
    block = model.encoder.block[0]
    block.layer.insert(1, nn.Identity())


def without(name):
    return lambda model: delattr(model.encoder.block[0].layer[0].SelfAttention, name)


def setting(name, value, block=1):
    return lambda model: setattr(model.encoder.block[block].layer[0].SelfAttention, name, value)


class Old(_t5.Block):
    def forward(self, hidden_states, attention_mask=None, position_bias=None):
        return super().forward(hidden_states, attention_mask, position_bias)


def configured_as_decoder(model):
    model.encoder.config.is_decoder = True


def test_transforms_of_torch_func_keep_the_model_s_own_code():
    model, given = _t5.model().encoder, _t5.batch()
    x = model.embed_tokens(given["input_ids"]).detach()

    def loss(x):
        return model(inputs_embeds=x, attention_mask=given["attention_mask"])["last_hidden_state"].square().mean()

    def derivatives():
        return torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]

    wanted = derivatives()
    handle = fuse(model)
    with use_backend("fused"):
        assert all(map(torch.equal, derivatives(), wanted))
    reason = "torch.func or a forward-mode derivative: the ops have plain reverse mode"
    assert report_of(handle).own_calls == {reason: 2}


class Neighbours(nn.Module):
    """An adapter around a feed-forward that looks at the tokens beside each."""

    def __init__(self, inner, reach):
        super().__init__()
        self.inner, self.conv = inner, nn.Conv1d(_t5.WIDTH, _t5.WIDTH, 2 * reach + 1, padding=reach)

    def forward(self, x):
        return self.inner(x) + self.conv(x.mT).mT


def with_neighbours(model, reach=1):
    layer = model.encoder.block[0].layer
    layer[1] = Neighbours(layer[1], reach)


class Nearer(_t5.SharedBiasAttention):
    def compute_bias(self, length, key_length):
        return super().compute_bias(length, key_length).roll(1, -1)


def with_other_buckets(model):
    for block in model.encoder.block:
        block.layer[0].SelfAttention.__class__ = Nearer


REFUSED = {
    "an adapter that mixes tokens": (
        with_neighbours,
        "block.0.layer.1.conv: expected what works token by token, got a Conv1d",
    ),
    "other buckets": (
        with_other_buckets,
        "block.0.layer.0.SelfAttention.compute_bias: expected T5's row of the table for each distance, got others",
    ),
    "a decoder's configuration": (configured_as_decoder, "config.is_decoder: expected False, got True"),
    "a causal mask": (
        setting("is_causal", True),
        "block.1.layer.0.SelfAttention.is_causal: expected False, got True",
    ),
    "a bias that is switched off": (
        setting("has_relative_attention_bias", False, 0),
        "block.0.layer.0.SelfAttention.has_relative_attention_bias: expected True, got False",
    ),
    "experts whose capacity is the batch's": (
        lambda model: setattr(model.encoder.config, "model_type", "switch_transformers"),
        "config.model_type: expected one of t5, mt5, umt5, pop2piano, got 'switch_transformers'",
    ),
    "cross attention in an encoder": (
        with_cross_attention,
        "block.0.layer: expected SelfAttention and a feed-forward, got SelfAttentionLayer, Identity, FeedForwardLayer",
    ),
    "another kind of attention": (
        lambda model: setattr(model.encoder.block[1].layer[0], "SelfAttention", _t5.OwnBiasAttention(True)),
        "block.1.layer.0.SelfAttention: expected a SharedBiasAttention, as in block.0, got OwnBiasAttention",
    ),
    "no keys": (without("k"), "block.0.layer.0.SelfAttention: expected q, k, v and o, got no k"),
    "no bias": (
        without("relative_attention_bias"),
        "block.0.layer.0.SelfAttention: expected a relative_attention_bias, got none",
    ),
    "causal attention": (
        setting("is_decoder", True),
        "block.1.layer.0.SelfAttention.is_decoder: expected False, got True",
    ),
    "heads of another number": (
        setting("n_heads", 3),
        "block.1.layer.0.SelfAttention.n_heads: expected 2, got 3",
    ),
    "another scale": (
        setting("scaling", "no"),
        "block.1.layer.0.SelfAttention.scaling: expected a number, got 'no'",
    ),
    "no further keywords": (
        lambda model: setattr(model.encoder.block[0], "__class__", Old),
        "block.0: expected a forward that takes further keywords, as of transformers 5.23, got none",
    ),
    "a hook": (
        lambda model: model.encoder.final_layer_norm.register_forward_hook(lambda *_: None),
        "final_layer_norm: expected no hooks, got some",
    ),
}


def test_a_convolution_of_single_tokens_is_fused():
    model = _t5.model()
    with_neighbours(model, 0)
    want = model(**_t5.batch())[-1]
    handle = fuse(model)
    with use_backend("fused"):
        torch.testing.assert_close(model(**_t5.batch())[-1], want, rtol=1e-4, atol=1e-4)
    assert report_of(handle).fused_calls == 1


SWITCHED = {
    "model.config.is_decoder": (configured_as_decoder, False, True),
    "model.is_decoder": (lambda model: setattr(model.encoder, "is_decoder", True), False, True),
    **{
        f"block.0.layer.0.SelfAttention.{name}": (setting(name, now, 0), not now, now)
        for name, now in (("is_decoder", True), ("is_causal", True), ("has_relative_attention_bias", False))
    },
}


@pytest.mark.parametrize("name", SWITCHED)
def test_a_switch_that_was_turned_since_keeps_the_model_s_own_code(name):
    change, before, now = SWITCHED[name]
    model = _t5.model()
    handle = fuse(model)
    change(model)
    with use_backend("fused"):
        model(**_t5.batch())
    assert report_of(handle).own_calls == {f"{name}: expected {before}, as when it was fused, got {now}": 1}


def said(model):
    """The error's message; empty where there is none."""
    try:
        fuse(model)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes_are_refused_in_one_line(name):
    change, message = REFUSED[name]
    model = _t5.model()
    change(model)
    assert said(model) == f"encoder: resembles T5, but {message}"


def test_a_decoder_without_cross_attention_is_refused():
    model = _t5.model()
    with_decoder(model)
    assert said(model) == (
        "encoder: resembles T5 decoder, but block.0.layer: expected SelfAttention, EncDecAttention and a feed-forward, "
        "got SelfAttentionLayer, FeedForwardLayer"
    )


class Forgetful(_t5.Block):
    """It takes further keywords, and keeps them."""

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        return super().forward(hidden_states, attention_mask, position_bias)


def test_attention_that_is_told_nothing_of_packed_tokens_does_not_compute_all_texts_as_one():
    model, message = _t5.model("umt5"), ""
    model.encoder.block[1].__class__ = Forgetful
    fuse(model)
    try:
        with use_backend("fused"):
            model(**_t5.batch())
    except RuntimeError as error:
        message = str(error)
    assert "The size of tensor a (27) must match the size of tensor b (28)" in message
