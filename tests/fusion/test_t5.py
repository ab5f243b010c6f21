"""``fuse`` on encoders like T5, mT5 and UMT5; ``test_t5_of_transformers.py`` has transformers' own."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from fusion import _checks as checks
from fusion import _t5
from support.synchronization import DEVICE, no_synchronization
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from onepeace_fast import fuse, use_backend

KINDS = ("t5", "gated", "umt5")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def report_of(handle):
    (part,) = handle.report().parts
    return part


def assert_same(case, batch, change=lambda model: None, backend="fused"):
    """A fused model computes what the model does, both changed alike; gradients too."""
    plain, model = case.make().double(), case.make().double()
    handle = fuse(model)
    change(plain), change(model)
    wanted = checks.run(case, plain, batch)
    with use_backend(backend):
        found = checks.run(case, model, batch)
    assert report_of(handle).fused_calls == 1, str(handle.report())
    assert found.keys() == wanted.keys() and len(wanted) > 10
    for name, value in found.items():
        assert (value is None) == (wanted[name] is None), name
        if value is not None:
            torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7, msg=name)
    return handle


def test_values_gradients_and_the_way_back(kind):
    checks.check_values_and_undo(_t5.case(kind))


def test_copies_have_parameters_of_their_own(kind):
    checks.check_copies(_t5.case(kind))


def test_training_is_the_same(kind):
    checks.check_training(_t5.case(kind))


def test_a_hook_runs_with_the_model_s_own_code():
    checks.check_changed_part(_t5.case(), "encoder.block.1.layer.0.SelfAttention.q")


MASKS = {
    "left": _t5.mask_of([5, 12, 9]).flip(1),
    "with holes": torch.rand(3, 12, generator=torch.Generator().manual_seed(3)) < 0.5,
    "floating point": _t5.mask_of([5, 12, 9]).float(),
    "no padding": torch.ones(3, 12, dtype=torch.bool),
    "none": None,
    "a token": _t5.mask_of([1]),
    "longer than every text": _t5.mask_of([5, 3, 4], 30),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, kind):
    mask = MASKS[name]
    ids = torch.randint(_t5.WORDS, (3, 12) if mask is None else mask.shape)
    handle = assert_same(_t5.case(kind), {"input_ids": ids, "attention_mask": mask})
    part = report_of(handle)
    real = ids.numel() if mask is None else int(mask.sum())
    assert (part.padded_tokens, part.computed_tokens) == (ids.numel(), real)


def test_embedded_tokens_get_their_gradient(kind):
    mask = MASKS["left"]
    assert_same(_t5.case(kind), {"inputs_embeds": torch.randn(3, 12, _t5.WIDTH).double(), "attention_mask": mask})


def test_outputs_keep_their_form():
    model, given = _t5.model().encoder, _t5.batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    handle = fuse(model)
    with use_backend("fused"):
        out = model(ids, mask, None, None, None, None, False, output_hidden_states=True)
        parts = model(ids, mask, return_dict=False)
    assert type(out) is _t5.Output and [*out] == ["last_hidden_state", "hidden_states"]
    assert out["hidden_states"][-1] is out["last_hidden_state"] and len(out["hidden_states"]) == _t5.LAYERS + 1
    assert all(x.shape == (4, 12, _t5.WIDTH) and not x[mask == 0].any() for x in out["hidden_states"])
    assert type(parts) is tuple and torch.equal(parts[0], out["last_hidden_state"])
    assert report_of(handle).fused_calls == 2


class LowRank(nn.Module):
    """A linear layer and a trained change of it."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(1)
        options = {"bias": False, "dtype": inner.weight.dtype}
        self.base = inner
        self.down, self.up = nn.Linear(inner.in_features, 2, **options), nn.Linear(2, inner.out_features, **options)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def with_low_rank(model):
    for block in model.encoder.block:
        attention, dense = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        attention.q, attention.o, dense.wo = map(LowRank, (attention.q, attention.o, dense.wo))


def test_what_is_put_around_projections_after_fuse_is_called(kind):
    assert_same(_t5.case(kind), _t5.batch(), with_low_rank)


def test_what_was_put_around_projections_before_is_called():
    model = _t5.model()
    with_low_rank(model)
    assert_same(checks.Case(lambda: copy.deepcopy(model), _t5.batch, ("encoder",)), _t5.batch())


def test_hooks_of_transformers_see_packed_tokens():
    model, given, seen = _t5.model(), _t5.batch(), []

    def hook(module, arguments, output):
        seen.append(output[0].shape)

    hook.__module__ = "transformers.utils.output_capturing"
    handle = fuse(model)
    model.encoder.block[0].register_forward_hook(hook)
    with use_backend("fused"):
        model(**given)
    assert seen == [(1, 27, _t5.WIDTH)] and report_of(handle).fused_calls == 1


def changed_attention(model):
    layer = model.encoder.block[1].layer[0]
    layer.SelfAttention = copy.deepcopy(layer.SelfAttention)


CHANGES = {
    "another attention": (changed_attention, "block.1.layer.0.SelfAttention: expected the SharedBiasAttention that *"),
    "a forward": (
        lambda model: setattr(model.encoder.block[0], "forward", model.encoder.block[0].forward),
        "block.0: expected the class's forward, got one of its own",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_frame_keeps_the_model_s_own_code(name):
    change, message = CHANGES[name]
    model, given = _t5.model(), _t5.batch()
    want = model(**given)
    handle = fuse(model)
    change(model)
    with use_backend("fused"):
        found = model(**given)
    assert all(map(torch.equal, found, want))
    (reason,) = report_of(handle).own_calls
    assert re.fullmatch(re.escape(message).replace(r"\*", ".*"), reason)


def checkpointed(reentrant, model):
    for block in model.encoder.block:
        kind = type(block)

        class Checkpointed(kind):
            def forward(self, *arguments, _kind=kind, **keywords):
                run = functools.partial(_kind.forward, self, **keywords)
                return checkpoint(run, *arguments, use_reentrant=reentrant)

        block.__class__ = Checkpointed


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(kind, reentrant):
    embedded = torch.randn(3, 12, _t5.WIDTH).double()
    assert_same(
        _t5.case(kind),
        {"inputs_embeds": embedded, "attention_mask": MASKS["left"]},
        functools.partial(checkpointed, reentrant),
    )


def test_a_checkpoint_wrapper_around_blocks():
    def wrap(model):
        model.encoder.block[1] = checkpoint_wrapper(model.encoder.block[1])

    model, plain, given = _t5.model().double(), _t5.model().double(), _t5.batch()
    want = plain(**given)[-1]
    handle = fuse(model)
    wrap(model)
    with use_backend("fused"):
        found = model(**given)[-1]
    assert report_of(handle).fused_calls == 1
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)
    (a,) = torch.autograd.grad(found.square().sum(), model.encoder.embed_tokens.weight)
    (b,) = torch.autograd.grad(want.square().sum(), plain.encoder.embed_tokens.weight)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_autocast(kind):
    model, given = _t5.model(kind), _t5.batch()
    exact = copy.deepcopy(model).double()(**given)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**given)[-1]
    fuse(model)
    with use_backend("fused"), torch.autocast("cpu", torch.bfloat16):
        found = model(**given)[-1]
    found.square().mean().backward()
    assert found.dtype == plain.dtype
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()


def test_infinity_of_float16_is_clamped():
    model, given = _t5.model().half(), _t5.batch()
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1e5)
    plain = model(**given)[1]
    handle = fuse(model)
    with use_backend("fused"):
        found = model(**given)[1]
    assert report_of(handle).fused_calls == 1
    most = torch.finfo(torch.float16).max - 1000
    assert found.abs().max() == plain.abs().max() == torch.tensor(most).half()
    assert (found - plain).abs().max() < 1e-2 * most


@pytest.mark.parametrize("kind, backend", [
    ("umt5", "eager"), pytest.param("t5", "aot_eager", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_compiled_block_is_not_compiled_again_for_other_batches(kind, backend):
    torch._dynamo.reset()
    case, model, plain = _t5.case(kind), _t5.model(kind), _t5.model(kind)
    fuse(model)
    for block in model.encoder.block:
        block.compile(backend=backend)
    batches = [_t5.batch(i, lengths) for i, lengths in enumerate([(5, 12, 9), (8, 11, 13, 4), (3, 7), (9, 14, 2)])]
    with use_backend("fused"):
        for i, given in enumerate(batches):
            with torch._dynamo.config.patch(error_on_recompile=i > 1):
                found = checks.run(case, model, given)
            for name, value in checks.run(case, plain, given).items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_whole_compiled_model_computes_the_same():
    torch._dynamo.reset()
    model, given = _t5.model().double(), _t5.batch()
    want = model(**given)[-1]
    fuse(model)
    with use_backend("fused"):
        found = torch.compile(model, backend="eager")(**given)[-1]
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


def test_nothing_waits_for_the_device_but_the_lengths_of_a_padded_batch_once(monkeypatch):
    reads = []
    monkeypatch.setattr("onepeace_fast.routing.read_values", lambda tensor: reads.append(tensor) or [5, 12, 9, 1])
    model, given = _t5.model(), {name: value.to(DEVICE) for name, value in _t5.batch().items()}
    handle = fuse(model)
    model.to(DEVICE)
    with no_synchronization():
        model(**given)[-1].sum().backward()
    assert len(reads) == 1 and report_of(handle).fused_calls == 1


def test_the_scale_is_read_at_each_call():
    def change(model):
        model.encoder.block[1].layer[0].SelfAttention.scaling = 0.25

    assert_same(_t5.case(), _t5.batch(), change)
