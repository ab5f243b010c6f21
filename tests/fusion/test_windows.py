"""``fuse`` on attention like Swin's and BEiT's; ``test_in_transformers.py`` has transformers' own."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from fusion import _checks as checks
from fusion import _windows
from torch import nn
from torch.utils.checkpoint import checkpoint

from onepeace_fast import fuse, use_backend
from onepeace_fast.fusion.families.windows import ON_A_CPU


@pytest.fixture(params=_windows.CASES)
def kind(request):
    return request.param


@pytest.fixture
def case(kind):
    return _windows.CASES[kind]


def run_both(case, given, change=lambda model: None):
    """A model's outputs and gradients in float64, and those of a fused one, both changed alike; the fused parts."""
    given = {name: value.double() if checks.is_float(value) else value for name, value in given.items()}
    plain, model = case.make().double(), case.make().double()
    handle = fuse(model)
    change(plain), change(model)
    wanted = checks.run(case, plain, given)
    with use_backend("fused"):
        found = checks.run(case, model, given)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=name)
    return handle.report().parts


def test_values_gradients_and_the_way_back(case):
    checks.check_values_and_undo(case)


def test_fusing_draws_no_random_numbers_of_the_program_s(case):
    model, before = case.make(), torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_have_parameters_of_their_own(case):
    checks.check_copies(case)


def test_training_is_the_same(case):
    checks.check_training(case)


@pytest.mark.parametrize("kind, path, settings", [
    ("swin", "layers.0.attention.relative_position_bias", {"shifts": (1,)}),
    ("beit", "layers.0.attention.v_proj", {"count": 1}),
])  # fmt: skip
def test_a_hook_runs_with_the_model_s_own_code(kind, path, settings):
    case = checks.Case(lambda: _windows.model(kind, **settings), _windows.CASES[kind].batch, ())
    checks.check_changed_part(case, path)


@pytest.mark.parametrize("settings", [
    {"size": (4, 6), "window": (2, 3), "shifts": (1,)}, {"size": (3, 3), "shifts": (1, 0)}, {"shifts": (2, 1)},
])  # fmt: skip
def test_shifted_windows(settings):
    made = checks.Case(lambda: _windows.model("swin", **settings), None, ())
    height, width = settings.get("size", (6, 9))
    for part in run_both(made, _windows.tokens(0, 2, height * width)):
        assert part.fused_calls == 1 and not part.own_calls


@pytest.mark.parametrize("window, resolution", [((3, 4), (12, 16)), ((5, 5), (12, 12)), ((5, 5), (20, 12))])
def test_images_of_the_layer_s_resolution(window, resolution):
    made = checks.Case(lambda: _windows.model("beit", window=window), None, ())
    given = _windows.tokens(0, 2, resolution[0] * resolution[1] // 16 + 1)
    for part in run_both(made, {**given, "resolution": resolution}):
        assert part.fused_calls == 1 and not part.own_calls


class LowRank(nn.Module):
    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(1)
        self.base, self.up = inner, nn.Linear(inner.in_features, inner.out_features, dtype=inner.weight.dtype)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(x)


def test_what_is_put_around_projections_is_called(case):
    def change(model):
        for layer in model.layers:
            attention = layer.attention
            attention.q_proj, attention.o_proj = LowRank(attention.q_proj), LowRank(attention.o_proj)

    assert all(part.fused_calls == 1 for part in run_both(case, case.batch(0), change))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(case, reentrant):
    def change(model):
        for layer in model.layers:
            of = type(layer)

            class Checkpointed(of):
                def forward(self, *arguments, _of=of, **keywords):
                    run = functools.partial(_of.forward, self, **keywords)
                    return checkpoint(run, *arguments, use_reentrant=reentrant)

            layer.__class__ = Checkpointed

    parts = run_both(case, case.batch(0), change)
    assert all(part.fused_calls >= 1 and not part.own_calls for part in parts)


def test_autocast(case):
    model, given = case.make(), case.batch(0)
    exact = copy.deepcopy(model).double()(**{name: value.double() for name, value in given.items()})
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**given)
    fuse(model)
    with use_backend("fused"), torch.autocast("cpu", torch.bfloat16):
        found = model(**given)
    assert found.dtype == plain.dtype
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(case):
    torch._dynamo.reset()
    model, given = case.make(), case.batch(0)
    want = model(**given)
    fuse(model)
    with use_backend("fused"):
        found = torch.compile(model, backend="eager")(**given)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def own_calls(case, given, prepare=lambda model: None, backend="fused"):
    """Why the parts kept the model's own code, whose very bits must come out."""
    model = case.make()
    prepare(model)
    torch.manual_seed(5)
    want = model(**given)
    handle = fuse(model)
    torch.manual_seed(5)
    with use_backend(backend):
        assert torch.equal(model(**given), want)
    return [part.own_calls for part in handle.report().parts]


def test_a_cpu_keeps_the_model_s_own_code(case):
    model, given = case.make(), case.batch(0)
    want = model(**given)
    handle = fuse(model)
    assert torch.equal(model(**given), want)
    assert all(part.own_calls == {ON_A_CPU: 1} for part in handle.report().parts)


def test_what_is_asked_for_beside(case):
    given = case.batch(0)
    reason = "output_attentions: attention's probabilities are not kept"
    assert own_calls(case, {**given, "output_attentions": True}) == [{reason: 1}] * 2

    def configure(model):
        for layer in model.layers:
            layer.attention.config.output_attentions = True

    assert own_calls(case, given, configure) == [{reason: 1}] * 2
    reason = "position_ids: it is not known to fused attention"
    assert own_calls(case, {**given, "position_ids": torch.zeros(1)}) == [{reason: 1}] * 2
    assert own_calls(case, {**given, "output_hidden_states": False, "position_ids": None}, backend="reference")


def test_dropout_in_training_keeps_the_model_s_own_code(case):
    def prepare(model):
        model.layers[1].attention.attention_dropout = 0.1
        model.train()

    model, given = case.make(), case.batch(0)
    prepare(model)
    handle = fuse(model)
    with use_backend("fused"):
        model(**given)
        model.eval()(**given)
    first, second = handle.report().parts
    assert (first.fused_calls, first.own_calls) == (2, {})
    assert (second.fused_calls, second.own_calls) == (1, {"dropout in training": 1})


def test_masks_that_are_not_of_shifted_windows():
    attention = _windows.model("swin").layers[0].attention
    x = _windows.tokens(0, 4, 9)["x"]
    handle = fuse(attention)
    shifted = torch.zeros(2, 9, 9)
    shifted[1, :3, 3:] = shifted[1, 3:, :3] = -100.0
    softer, alone = shifted / 2, shifted.clone()
    alone[1, 0, 3] = 0
    with use_backend("fused"):
        for mask in (shifted, softer, alone):
            found = attention(x, mask)[0]
            torch.testing.assert_close(found, type(attention).forward(attention, x, mask)[0])
    (part,) = handle.report().parts
    assert (part.fused_calls, part.own_calls) == (1, {"attention_mask: it is not that of shifted windows": 2})


def test_a_mask_of_images_keeps_the_model_s_own_code():
    case = _windows.CASES["beit"]
    mask = torch.zeros(1, 1, 1, 13)
    mask[..., 9:] = -1e9
    reason = "attention_mask: a mask or a bias of all layers is not known to a layer"
    assert own_calls(case, {**case.batch(0), "attention_mask": mask}) == [{reason: 1}] * 2


class Swapped(_windows.WindowBias):
    """The bias of key - query."""

    def forward(self):
        return super().forward().transpose(-1, -2)


class Absolute(_windows.ImageBias):
    def forward(self, *arguments, **keywords):
        bias = super().forward(*arguments, **keywords)
        return bias + torch.arange(bias.shape[-1])


def setting(name, value):
    return lambda model: setattr(model.layers[0].attention, name, value)


REFUSED = {
    "another bias of windows": (
        "swin", lambda model: setattr(model.layers[0].attention.relative_position_bias, "__class__", Swapped),
        "relative_position_bias: expected the table's row of each distance, got another bias",
    ),
    "another bias of images": (
        "beit", lambda model: setattr(model.layers[0].relative_position_bias, "__class__", Absolute),
        "relative_position_bias: expected numbers by the distance in the window, got others",
    ),
    "no keys": (
        "beit", lambda model: delattr(model.layers[0].attention, "k_proj"),
        "attention.k_proj: expected a projection, got none",
    ),
    "no scale": ("swin", setting("scaling", None), "scaling: expected a number, got None"),
    "causal": ("beit", setting("is_causal", True), "attention.is_causal: expected False, got True"),
    "a hook": (
        "swin", lambda model: model.layers[0].attention.q_proj.register_forward_hook(lambda *_: None),
        "q_proj: expected no hooks, got some",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes_are_refused_in_one_line_and_the_others_fused(name):
    kind, change, message = REFUSED[name]
    model = _windows.model(kind)
    change(model)
    handle = fuse(model)
    assert [refused.reason for refused in handle.refused] == [message]
    assert all(refused.path.startswith("layers.0") for refused in handle.refused)
    assert [path.split(".")[1] for path in handle.parts] == ["1"]
