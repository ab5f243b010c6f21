"""The route plan of a few tokens without padding is kept on a CPU, and serves as if it had been made anew."""

import copy

import pytest
import torch
from models._small import assert_close, batch_of, small_model, with_gradients

from onepeace_fast.models import stack
from onepeace_fast.models.inputs import read_batch

WHOLE = ({"text": [5, 5], "image": (2, 2)}, {"text": [5, 5]}, {"image": (2, 3)}, {"text": [6, 6]}, {"image": (3, 2)})


def tokens_of(model, seed=0, **sizes):
    """The embedded tokens of a batch."""
    batch, _ = read_batch(model.encoder.adapters, batch_of(**sizes, seed=seed))
    return model.encoder.embed(batch)


def test_batches_without_padding_take_turns_and_each_has_its_own_plan():
    model = small_model("fused")
    for _ in range(2):
        for seed, sizes in enumerate(WHOLE):
            batch = batch_of(**sizes, seed=seed)
            assert_close(with_gradients(model, batch), with_gradients(small_model("fused"), batch), 1e-12)
    assert len(model.encoder._plans) == len(WHOLE)


def test_a_plan_is_found_again_by_modalities_rows_and_lengths():
    model = small_model("fused")
    plans = [model.encoder.plan(tokens_of(model, **sizes)) for sizes in WHOLE]
    assert len(set(map(id, plans))) == len(WHOLE)
    for plan, sizes in zip(plans, WHOLE, strict=True):
        again = model.encoder.plan(tokens_of(model, seed=1, **sizes))
        assert again is plan
        fresh = model.encoder._new_plan(tokens_of(model, **sizes))
        for name, value in vars(fresh).items():
            kept = getattr(plan, name)
            assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value


def test_padding_hidden_tokens_and_many_tokens_have_plans_of_their_own(monkeypatch):
    model = small_model("fused")
    tokens = tokens_of(model, text=[5, 5])
    (text,) = tokens.values()
    ids = torch.arange(text.width).expand(text.valid.shape)
    others = [tokens_of(model, text=[5, 4]), {"text": text._replace(ids=ids)}]
    assert all(model.encoder.plan(one) is not model.encoder.plan(one) for one in others)
    turned = model.encoder.plan(tokens, {"text": [1, 0]})
    assert not torch.equal(turned.source, model.encoder.plan(tokens).source)
    monkeypatch.setattr(stack, "PAIRS_OF_A_KEPT_PLAN", 2 * 6**2 - 1)
    assert model.encoder.plan(tokens) is not model.encoder.plan(tokens)


def test_lengths_that_are_not_those_of_the_mask_are_refused_though_a_plan_is_kept():
    model = small_model("fused")
    tokens = tokens_of(model, text=[5, 5])
    model.encoder.plan(tokens)
    (text,) = tokens.values()
    wrong = {"text": text._replace(valid=text.valid & (torch.arange(6) < 5))}
    with pytest.raises(ValueError, match=r"lengths\['text'\]: expected its mask's list \[5, 5\], got list \[6, 6\]"):
        model.encoder.plan(wrong)


def test_another_adapter_or_a_copy_of_the_model_has_its_own_plans():
    model = small_model("fused")
    tokens = tokens_of(model, image=(2, 2))
    plan = model.encoder.plan(tokens)
    copied = copy.deepcopy(model)
    assert copied.encoder.plan(tokens).code is not plan.code
    model.encoder.image_adapter = copied.encoder.image_adapter
    assert model.encoder.plan(tokens) is not plan


def test_the_plans_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(stack, "PLANS_KEPT", 2)
    model = small_model("fused")
    one, other, third = (tokens_of(model, text=[length]) for length in (3, 4, 5))
    first, second = model.encoder.plan(one), model.encoder.plan(other)
    assert model.encoder.plan(one) is first
    model.encoder.plan(third)
    assert model.encoder.plan(one) is first
    assert model.encoder.plan(other) is not second
