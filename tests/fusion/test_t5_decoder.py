"""``fuse`` on decoders like T5's and UMT5's; ``test_in_transformers.py`` has transformers' own."""

from __future__ import annotations

import pytest
import torch
from fusion import _checks as checks
from fusion import _t5, _t5_decoder

from onepeace_fast import fuse, use_backend

KINDS = ("t5", "umt5")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def part_of(handle):
    return next(part for part in handle.report().parts if part.path == "decoder")


def test_values_gradients_and_the_way_back(kind):
    checks.check_values_and_undo(_t5_decoder.case(kind))


def test_copies_have_parameters_of_their_own(kind):
    case = _t5_decoder.case(kind)
    # In float64: gradients of the encoder come through both stacks, and float32's rounding is larger than this check's.
    checks.check_copies(checks.Case(lambda: case.make().double(), case.batch, case.parts))


@pytest.mark.slow
def test_training_is_the_same(kind):
    checks.check_training(_t5_decoder.case(kind))


MASKS = {
    "of both": (_t5.mask_of([5, 12, 9]), _t5.mask_of([4, 2, 7])),
    "left": (_t5.mask_of([5, 12, 9]).flip(1), _t5.mask_of([4, 2, 7]).flip(1)),
    "with holes": tuple(
        torch.rand(3, width, generator=torch.Generator().manual_seed(3)) < 0.6 for width in (12, 7)
    ),
    "of the encoder": (_t5.mask_of([5, 12, 9]), None),
    "of the decoder": (None, _t5.mask_of([4, 2, 7])),
    "none": (None, None),
    "long": (_t5.mask_of([5, 12, 9]), _t5.mask_of([40, 2, 31])),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, kind):
    seen, written = MASKS[name]
    case = _t5_decoder.case(kind)
    given = {
        "input_ids": torch.randint(_t5.WORDS, (3, 12)), "attention_mask": seen,
        "decoder_input_ids": torch.randint(_t5.WORDS, (3, 7) if written is None else written.shape),
        "decoder_attention_mask": written,
    }  # fmt: skip
    plain, model = case.make().double(), case.make().double()
    handle = fuse(model)
    want = checks.run(case, plain, given)
    with use_backend("fused"):
        found = checks.run(case, model, given)
    part = part_of(handle)
    real = given["decoder_input_ids"].numel() if written is None else int(written.sum())
    assert (part.fused_calls, part.computed_tokens) == (1, real), str(handle.report())
    for key, value in found.items():
        assert (value is None) == (want[key] is None), key
        if value is not None:
            torch.testing.assert_close(value, want[key], rtol=1e-6, atol=1e-7, msg=key)


def test_a_cache_that_a_call_makes_is_filled_as_the_model_fills_it(kind):
    caches = []
    given = {
        name: value.double() if value.is_floating_point() else value for name, value in _t5_decoder.batch().items()
    }
    real = [given[name].bool()[:, None, :, None] for name in ("decoder_attention_mask", "attention_mask")]
    for fused in (False, True):
        model = _t5_decoder.model(kind).double()
        states = model.encoder(given["input_ids"], given["attention_mask"])["last_hidden_state"]
        handle = fuse(model) if fused else None
        with use_backend("fused"):
            out = model.decoder(
                given["decoder_input_ids"], given["decoder_attention_mask"], encoder_hidden_states=states,
                encoder_attention_mask=given["attention_mask"], use_cache=True,
            )  # fmt: skip
        caches.append(out["cache"])
        assert handle is None or part_of(handle).fused_calls == 1
    assert caches[0].is_updated == caches[1].is_updated == dict.fromkeys(range(_t5.LAYERS), True)
    for name, mask in zip(("self_attention_cache", "cross_attention_cache"), real, strict=True):
        assert getattr(caches[0], name).keys() == getattr(caches[1], name).keys()
        for layer, wanted in getattr(caches[0], name).items():
            for one, other in zip(wanted, getattr(caches[1], name)[layer], strict=True):
                assert other.shape == one.shape
                torch.testing.assert_close(other * mask, one * mask, rtol=1e-9, atol=1e-12)


OWN = {
    "cache: it is filled token by token": {"cache": _t5_decoder.Cache()},
    "encoder_attention_mask: it is not one of the encoder's tokens, [batch, length]": {
        "encoder_attention_mask": torch.zeros(4, 1, 1, 12)
    },
    "encoder_attention_mask: a sample has no token; the model's own attention averages its padding": {
        "encoder_attention_mask": _t5_decoder.batch()["attention_mask"] * torch.tensor([[1], [0], [1], [1]])
    },
    "output_attentions: attention's probabilities are not kept": {"output_attentions": True},
    "more: it is not known to the packed stack": {"more": 1},
}


@pytest.mark.parametrize("reason", OWN)
def test_what_is_not_known_keeps_the_model_s_own_code(reason):
    model, given = _t5_decoder.model(), _t5_decoder.batch()
    states = model.encoder(given["input_ids"], given["attention_mask"])["last_hidden_state"]
    call = {
        "input_ids": given["decoder_input_ids"], "encoder_hidden_states": states,
        "encoder_attention_mask": given["attention_mask"], **OWN[reason],
    }  # fmt: skip
    want = model.decoder(**call)["last_hidden_state"]
    handle = fuse(model)
    with use_backend("fused"):
        found = model.decoder(**call)["last_hidden_state"]
    assert torch.equal(found, want) and part_of(handle).own_calls == {reason: 1}


def test_without_an_encoder_s_tokens_the_stack_keeps_its_own_code():
    handle = fuse(model := _t5_decoder.model())
    fusion = handle.parts["decoder"]
    assert fusion.declines(input_ids=torch.ones(1, 2).long()) == "encoder_hidden_states: there are none"
    says = "encoder_hidden_states: they are not [batch, length, width]"
    assert fusion.declines(input_ids=torch.ones(1, 2).long(), encoder_hidden_states=torch.ones(2, 2)) == says
    model.train()
    model.decoder.block[0].layer[1].EncDecAttention.dropout = 0.1
    given = {"input_ids": torch.ones(1, 2).long(), "encoder_hidden_states": torch.ones(1, 2, _t5.WIDTH)}
    assert fusion.declines(**given) == "dropout in training"


def test_cross_attention_with_a_bias_of_its_own_is_refused():
    model = _t5_decoder.model()
    model.decoder.block[1].layer[1].EncDecAttention.relative_attention_bias = torch.nn.Embedding(8, _t5.HEADS)
    says = "block.1.layer.1.EncDecAttention: expected no relative_attention_bias, got one"
    assert [(one.path, one.reason) for one in fuse(model).report().refused] == [("decoder", says)]
