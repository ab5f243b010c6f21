"""``RoutedLinear``, ``RoutedNorm`` and ``RoutedFFN`` against each token through its expert in plain PyTorch."""

import copy
import warnings

import pytest
import torch
from layers._routed import (
    BATCHES,
    DIM,
    FORMS,
    HIDDEN,
    NAMES,
    ffn,
    gradients,
    modules,
    one_by_one,
    plan_of,
    randomised,
    tokens,
)
from support.contract import refused
from support.synchronization import DEVICE, SYNCHRONIZED, no_synchronization
from torch import nn

from onepeace_fast import RoutedFFN, RoutedLinear, RoutedNorm, RoutePlan
from onepeace_fast.layers import plain
from onepeace_fast.layers.routed import ffn as ffn_file

MODULES = pytest.mark.parametrize("name", modules())
# A module of each class, the networks by one op and by several; the others compile the same code.
QUICK = ("linear", "RMSNorm", "GeGLU by tanh, Sub-LayerNorm, output bias", "biases, RMSNorm before and behind")
COMPILED = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in modules()]


def check(module, ids, dim=DIM):
    """Values and every gradient, in the tokens' order and packed."""
    plan, x = plan_of(ids), tokens(len(ids), dim=dim).requires_grad_()
    experts = module.experts()
    out = module(x, plan)
    expected = one_by_one(experts, x, ids, out.shape[1])
    weight = tokens(len(ids), seed=6, dim=out.shape[1])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    wanted = gradients(module, x, expected, weight)
    torch.testing.assert_close(gradients(module, x, out, weight), wanted, rtol=1e-9, atol=1e-9)
    packed = plan.unpack_interleaved(module(plan.pack(x), plan, packed=True))
    assert torch.equal(packed, out)
    torch.testing.assert_close(gradients(module, x, packed, weight), wanted, rtol=1e-9, atol=1e-9)


@MODULES
@pytest.mark.parametrize("batch", BATCHES)
def test_values_and_gradients_are_those_of_each_token_alone(name, batch):
    check(modules()[name], BATCHES[batch])


@MODULES
def test_inert_tokens_come_out_as_zero_and_give_no_gradient(name):
    module, ids = modules()[name], torch.tensor([[0, 3, 2], [3, 1, 2]])
    plan = RoutePlan.from_token_masks({n: ids == m for m, n in enumerate(NAMES)}, inert=True)
    x = tokens(6).view(2, 3, DIM).requires_grad_()
    out = module(x, plan)
    assert out.shape[:2] == (2, 3) and not out[ids == 3].any()
    expected = one_by_one(module.experts(), x[ids != 3], ids[ids != 3].tolist(), out.shape[2])
    torch.testing.assert_close(out[ids != 3], expected, rtol=1e-10, atol=1e-10)
    given = gradients(module, x, out, torch.ones_like(out))
    torch.testing.assert_close(given, gradients(module, x, expected, torch.ones_like(expected)), rtol=1e-9, atol=1e-9)


@MODULES
def test_padded_batches_of_each_modality_come_out_padded(name):
    module, lengths = modules()[name], {"text": [2, 1], "image": [1, 3], "audio": [0, 2]}
    plan = RoutePlan.from_lengths(lengths)
    x = {n: tokens(2 * max(own), seed=m).view(2, -1, DIM) for m, (n, own) in enumerate(lengths.items())}
    out = module(x, plan)
    for m, (modality, own) in enumerate(lengths.items()):
        for row, length in enumerate(own):
            torch.testing.assert_close(out[modality][row, :length], module.experts()[m](x[modality][row, :length]))
            assert not out[modality][row, length:].any()


@pytest.mark.parametrize("form", FORMS)
def test_how_many_ops_compute_a_network(form, monkeypatch):
    calls = []
    for name in ("routed_ffn", "gated_sub_ln"):
        original = getattr(ffn_file, name)
        monkeypatch.setattr(ffn_file, name, lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k))
    ffn(form)(tokens(4), plan_of([0, 1, 2, 0]))
    assert calls == ["gated_sub_ln" if FORMS[form].get("hidden_bias") else "routed_ffn"]


@pytest.mark.filterwarnings("ignore:RoutedFFN")
def test_a_hook_or_a_module_of_another_class_inside_is_called():
    for form, part in (("GeGLU", "w1"), ("GeGLU by tanh, Sub-LayerNorm, output bias", "sub_norm")):
        module, seen = ffn(form), []
        x, plan = tokens(4), plan_of([0, 1, 2, 0])
        expected = module(x, plan)
        getattr(module, part).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        plain._warn.cache_clear()  # it is said once
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.testing.assert_close(module(x, plan), expected, rtol=1e-12, atol=1e-12)
        assert seen == [1] and str(said[0].message).startswith("RoutedFFN: expected a plain Routed")
        module = ffn(form)

        class Double(type(getattr(module, part))):
            def forward(self, *args, **how):
                return 2 * super().forward(*args, **how)

        getattr(module, part).__class__ = Double
        assert not torch.allclose(module(x, plan), expected)


@MODULES
def test_a_state_dict_and_a_copy_hold_all(name):
    module, other = modules()[name], randomised(modules()[name], seed=9)
    x, plan = tokens(8), plan_of(BATCHES["mixed"])
    out = module(x, plan)
    assert not torch.allclose(other(x, plan), out)
    assert other.load_state_dict(module.state_dict()) == ([], []) and torch.equal(other(x, plan), out)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x, plan), out)
    with torch.no_grad():
        next(twin.parameters()).mul_(2)
    assert torch.equal(module(x, plan), out) and not torch.equal(twin(x, plan), out)


@pytest.mark.parametrize("name", COMPILED)
def test_a_module_compiles_in_one_graph(name):
    module, plan = modules()[name], plan_of(BATCHES["mixed"])
    x = tokens(8).requires_grad_()
    torch._dynamo.reset()
    for packed in (False, True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        out, expected = compiled(x, plan, packed=packed), module(x, plan, packed=packed)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        given = gradients(module, x, out, torch.ones_like(out))
        torch.testing.assert_close(given, gradients(module, x, expected, torch.ones_like(expected)))


def plans_on_the_device():
    ids = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    masks = {name: torch.zeros(6, dtype=torch.bool, device=DEVICE) for name in NAMES}
    yield RoutePlan.from_modality_ids(ids, NAMES)
    yield RoutePlan.from_token_masks(masks, inert=True, last_wins=True)
    yield RoutePlan.from_indices({"text": [0, 5], "image": [], "audio": [1, 4, 3, 2]}, 6, device=DEVICE)


@MODULES
def test_nothing_waits_for_the_device_from_the_route_to_the_gradients(name):
    with no_synchronization():
        module = modules_on_the_device()[name]
        for plan in plans_on_the_device():  # one route for several layers
            x = torch.empty(2, 3, DIM, device=DEVICE, requires_grad=True)
            for packed in (False, True):
                given = plan.pack(x) if packed else x
                sum(module(given, plan, packed=packed).sum() for _layer in range(2)).backward()
            for leaf in (x, *module.parameters()):
                assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.device == DEVICE
        with pytest.raises(SYNCHRONIZED):
            plan.offsets.tolist()


def modules_on_the_device():
    with DEVICE:
        return {
            "linear": RoutedLinear(3, DIM, HIDDEN), "linear without bias": RoutedLinear(3, DIM, 5, bias=False),
            "LayerNorm": RoutedNorm(3, DIM), "LayerNorm without bias": RoutedNorm(3, DIM, bias=False),
            "RMSNorm": RoutedNorm(3, DIM, "rms_norm"),
        } | {form: RoutedFFN(3, DIM, HIDDEN, **how) for form, how in FORMS.items()}  # fmt: skip


def test_parameters_start_as_torch_s_own_do():
    torch.manual_seed(3)
    routed = RoutedLinear(2, DIM, HIDDEN)
    torch.manual_seed(3)
    for m in range(2):
        linear = nn.Linear(DIM, HIDDEN)
        assert torch.equal(routed.weight[m], linear.weight) and torch.equal(routed.bias[m], linear.bias)
    norm = RoutedNorm(2, DIM, dtype=torch.float64)
    assert all(w.dtype == torch.float64 and torch.equal(w, torch.ones_like(w)) for w in norm.weight)
    assert not any(b.any() for b in norm.bias) and RoutedNorm(2, DIM, "rms_norm").bias is None
    assert list(RoutedFFN(2, 4, 6).state_dict()) == [f"w{i}.weight.{m}" for i in range(3) for m in range(2)]


@MODULES
def test_a_plan_and_tokens_that_do_not_fit_are_refused(name):
    module, x = modules()[name], tokens(4)
    two = RoutePlan.from_modality_ids(torch.tensor([0, 1, 0, 1]), NAMES[:2])
    refused("plan: expected one of 3 modalities", module, x, two)
    plan = plan_of([0, 1, 2, 0])
    refused("padded", module, tokens(3), plan)
    refused("x", module, tokens(3), plan, packed=True)
    refused("x", module, {"text": x}, plan, packed=True)
    refused("x", module, x[0], plan)
    refused("plan", module, x, RoutePlan.from_lengths({"text": [1], "image": [2], "audio": [1]}))
    refused("modality_ids", RoutePlan.from_modality_ids, torch.tensor([0, 3]), NAMES)


def test_bad_settings_are_refused():
    for kind in (RoutedLinear, RoutedFFN):
        refused("modalities", kind, 0, 4, 4)
    refused("modalities", RoutedNorm, 0, 4)
    refused("kind", RoutedNorm, 2, 4, "batch_norm")
    refused("eps: expected a number with kind 'layer_norm'", RoutedNorm, 2, 4, eps=None)
    refused("kind", RoutedFFN, 2, 4, 4, sub_norm="ln")
    refused("activation", RoutedFFN, 2, 4, 4, activation="swish")
