"""``fuse`` on Mixture-of-Transformers' feed-forward networks and attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from onepeace_fast import fuse, use_backend
from onepeace_fast.fusion.families import mixture_of_transformers as family
from onepeace_fast.fusion.family import BACKEND, ON_A_CPU
from onepeace_fast.tolerance import assert_within_rule
from tests.fusion import _checks as checks
from tests.fusion._mixture_of_transformers import (
    ATTENTION,
    CASE,
    FEED_FORWARD,
    HEAD_DIM,
    MODALITIES,
    WIDTH,
    Network,
    Norm,
    batch,
    feed_forward,
    make,
)


def own_calls(model: nn.Module, *arguments, backend: str = "fused") -> dict[str, int]:
    """The reasons after a call of a fused model."""
    handle = fuse(model)
    with use_backend(backend):
        model(*arguments)
    return handle.report().parts[0].own_calls


def test_values_and_undo():
    checks.check_values_and_undo(CASE)


def test_without_norms_of_queries_and_keys():
    checks.check_values_and_undo(checks.Case(lambda: make(False), batch, CASE.parts))


def test_copies():
    checks.check_copies(CASE)


def test_training():
    checks.check_training(CASE)


@pytest.mark.parametrize(
    "case, path",
    (
        (FEED_FORWARD, "local_experts.2"), (FEED_FORWARD, "local_experts_ffn_norm.0"),
        (ATTENTION, "local_experts_wv.1"), (ATTENTION, "local_experts_q_normalization.1"),
    ),
)  # fmt: skip
def test_a_hook_on_an_expert_runs(case, path):
    checks.check_changed_part(case, path)


def test_a_modality_without_tokens_gets_the_same_gradients():
    given, model = dict(batch(0)), make()
    first, second, third = given["masks"]
    given["masks"] = [first | second, torch.zeros_like(second), third]
    plain = checks.run(CASE, model, given)
    fuse(model)
    with use_backend("fused"):
        fused = checks.run(CASE, model, given)
    for name, value in plain.items():
        assert value is not None and fused[name] is not None, name
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert not fused["gradient of feed_forward.0.local_experts.1.w2.weight"].any()


@pytest.mark.parametrize("as_tensor", (False, True))
def test_tokens_of_several_rows_and_masks_in_one_tensor(as_tensor):
    torch.manual_seed(1)
    x, kinds = torch.randn(3, 5, WIDTH), torch.randint(MODALITIES, (3, 5))
    masks = [kinds == m for m in range(MODALITIES)]
    masks = torch.stack(masks) if as_tensor else masks
    model = feed_forward()
    plain = model(x, masks)
    handle = fuse(model)
    with use_backend("fused"):
        fused = model(x, modality_masks=masks)
    assert handle.report().parts[0].fused_calls == 1
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_a_token_in_no_mask_is_not_computed_and_comes_out_as_zero():
    given, model = dict(batch(0)), feed_forward()
    given["masks"][0] = given["masks"][0] & (torch.arange(len(given["x"])) > 9)
    rest = ~torch.stack(given["masks"]).any(0)
    plain = model(*given.values())
    handle = fuse(model)
    with use_backend("fused"):
        fused = model(*given.values())
    torch.testing.assert_close(fused[~rest], plain[~rest], rtol=1e-5, atol=1e-5)
    assert rest.sum() > 2 and not fused[rest].any() and plain[rest].any()
    part = handle.report().parts[0]
    assert (part.padded_tokens, part.computed_tokens) == (21, 21 - rest.sum())


def test_layers_share_the_route_of_their_masks(monkeypatch):
    made = []
    original = family.Kept.__init__
    monkeypatch.setattr(family.Kept, "__init__", lambda *arguments: (made.append(1), original(*arguments))[1])
    model = make()
    fuse(model)
    with use_backend("fused"):
        model(**batch(0))
        assert len(made) == 1
        model(**batch(0))
    assert len(made) == 2


@pytest.mark.parametrize("shared", (False, True))
def test_masks_that_change_in_place_are_routed_again(shared):
    array = np.stack([mask.numpy() for mask in batch(0)["masks"]])
    masks = [torch.from_numpy(row) for row in array]
    x, model = batch(0)["x"], feed_forward()
    fuse(model)
    with use_backend("fused"):
        before = model(x, masks)
        if shared:
            array[:] = np.roll(array, 1, 0)  # which no version of a tensor counts
        else:
            for mask, new in zip(masks, [masks[2].clone(), masks[0].clone(), masks[1].clone()], strict=True):
                mask.copy_(new)
        fused = model(x, masks)
    with use_backend("reference"):
        torch.testing.assert_close(fused, model(x, masks), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, fused)


def test_versions_tell_of_changes_where_values_are_not_compared():
    masks = batch(0)["masks"]
    kept = family.Kept(masks, masks)
    kept.values = None  # as on a GPU
    assert kept.holds(masks, masks) and not kept.holds(masks[:2], masks[:2])
    masks[1].logical_not_()
    assert not kept.holds(masks, masks)
    with torch.inference_mode():
        masks = [mask.clone() for mask in masks]
        kept = family.Kept(masks, masks)
        kept.values = None
        assert not kept.holds(masks, masks)


def test_inference_mode():
    model = make()
    plain = model(**batch(0))
    fuse(model)
    with use_backend("fused"), torch.inference_mode():
        torch.testing.assert_close(model(**batch(0)), plain, rtol=1e-4, atol=1e-4)


def test_a_route_of_inference_mode_serves_training():
    model, given = make(), batch(0)
    fuse(model)
    with use_backend("fused"):
        with torch.inference_mode():
            expected = model(**given)
        found = model(**given)
        found.sum().backward()
    assert torch.equal(found, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_gets_its_mask_and_gives_its_weights():
    given, model = batch(0), make().attention[0]
    handle = fuse(model)
    with use_backend("fused"):
        alone, weights = model(given["x"], torch.eye(21, dtype=torch.bool), modality_masks=given["masks"])
        every, _ = model(given["x"], None, given["masks"])
    assert weights == "weights" and handle.report().parts[0].fused_calls == 2
    handle.undo()
    torch.testing.assert_close(alone, model(given["x"], torch.eye(21, dtype=torch.bool), given["masks"])[0])
    assert not torch.allclose(alone, every)


def test_calls_that_are_not_fused_say_why():
    x, masks = batch(0).values()
    both = [masks[0] | masks[1], *masks[1:]]
    assert own_calls(feed_forward(), x, both) == {family.OVERLAP: 1}
    assert own_calls(feed_forward(), x, masks, backend="reference") == {BACKEND: 1}
    handle = fuse(model := feed_forward())
    model(x, masks)
    model.local_experts_ffn_norm[1].eps = 0.1
    model(x, masks)
    with pytest.raises(TypeError):
        model(x)
    with pytest.raises(RuntimeError):
        model(x.double(), masks)
    with pytest.raises(ValueError):
        model(x, masks[:2])
    assert handle.report().parts[0].own_calls == {ON_A_CPU: 1, family.CHANGED_EPS: 3, family.UNKNOWN: 1}


def test_other_tokens_and_masks_are_the_model_s_own():
    x, masks = batch(0).values()
    handle = fuse(model := feed_forward())
    for arguments in ((x.double(), masks), (x, masks[:2]), (x, [mask[:-1] for mask in masks])):
        with use_backend("fused"), pytest.raises((RuntimeError, ValueError, IndexError)):
            model(*arguments)
    with use_backend("fused"):
        indices = [mask.nonzero()[:, 0] for mask in masks]
        assert torch.isfinite(model(x, indices)).all()
    assert handle.report().parts[0].own_calls == {family.KINDS: 4}


class GeLUNetwork(Network):
    def forward(self, x):
        return self.w2(nn.functional.gelu(self.w1(x)) * self.w3(x))


class WithDropout(Network):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()


def other_eps() -> Norm:
    norm = Norm(HEAD_DIM)
    norm.eps = 0.5
    return norm


@pytest.mark.parametrize(
    "path, module, reason",
    (
        ("feed_forward.1.local_experts.2", GeLUNetwork(),
         "local_experts.2: expected a SwiGLU's values, got others from a GeLUNetwork"),
        ("feed_forward.1.local_experts.2", WithDropout(),
         "local_experts.2: expected w1, w2 and w3 alone, got a WithDropout with ['w1', 'w3', 'w2', 'dropout']"),
        ("feed_forward.1.local_experts.2.w3", nn.Linear(WIDTH, 40, bias=False),
         "local_experts.2.w3: expected a weight [48, 32], as the first expert has, got [40, 32]"),
        ("feed_forward.1.local_experts_ffn_norm.0", nn.LayerNorm(WIDTH),
         "local_experts_ffn_norm.0: expected an RMSNorm with eps, got a LayerNorm"),
        ("feed_forward.1.local_experts", nn.ModuleList([Network()]),
         "local_experts: expected 3 experts, as there are norms, got 1"),
        ("attention.0.local_experts_wo.1", nn.Linear(WIDTH, WIDTH),
         "local_experts_wo.1: expected a Linear without a bias, got the other"),
        ("attention.0.local_experts_k_normalization.1", other_eps(),
         "local_experts_k_normalization.1: expected eps 1e-05, as the first expert has, got 0.5"),
        ("attention.0.local_experts_k_normalization", None, "local_experts_k_normalization: expected norms, got none"),
        ("attention.0.attention_comp", None, "attention_comp: expected a module, got none"),
    ),
)  # fmt: skip
def test_look_alikes_are_refused(path, module, reason):
    model = make()
    parent, name = path.rsplit(".", 1)
    setattr(model.get_submodule(parent), name, module)
    handle = fuse(model)
    assert [refused.reason for refused in handle.refused] == [reason]
    assert len(handle.parts) == 3


def test_autocast():
    given, model = batch(0), feed_forward()
    truth = model(given["x"], given["masks"])
    model.bfloat16()
    fuse(model)
    x = given["x"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x, given["masks"])
        with use_backend("fused"):
            fused = model(x, given["masks"])
    assert fused.dtype == plain.dtype
    assert_within_rule("output", fused, plain, truth)
