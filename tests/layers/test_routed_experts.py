"""Routed modules that adopt existing modules: the very parameters, and what does not fit."""

import pytest
import torch
from layers._routed import DIM, HIDDEN, one_by_one, plan_of, randomised, tokens
from support.contract import message_of, refused
from torch import nn

from onepeace_fast import RoutedFFN, RoutedLinear, RoutedNorm

IDS = [0, 1, 1, 0, 1]


class GELUActivation(nn.Module):
    """An activation of some other library's own class, as transformers has."""

    def forward(self, x):
        return nn.functional.gelu(x)


class Gated(nn.Module):
    """A network of some other model, with names of its own."""

    def __init__(self, hidden: int = HIDDEN, p: float = 0.0, bias: bool = False):
        super().__init__()
        self.net = nn.ModuleDict({"gate": nn.Linear(DIM, hidden, bias), "up": nn.Linear(DIM, hidden, bias)})
        self.norm, self.down = nn.LayerNorm(hidden, eps=1e-3), nn.Linear(hidden, DIM)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.down(self.norm(nn.functional.silu(self.net["gate"](x)) * self.dropout(self.net["up"](x))))


GATED = {"w0": "net.gate", "w1": "net.up", "w2": "down", "sub_norm": "norm", "activation": "silu"}


class Ungated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.ffn_layernorm = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return self.fc2(self.ffn_layernorm(nn.functional.gelu(self.fc1(x))))


class OwnNorm(nn.Module):
    """An RMSNorm of some other model's own class."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 0.25).rsqrt() * self.weight


def check(routed, experts, x=None):
    """It computes what they do, holds their very parameters, and gives them back."""
    x = tokens(len(IDS)) if x is None else x
    expected = one_by_one(experts, x, IDS, routed(x, plan_of(IDS)).shape[1])
    torch.testing.assert_close(routed(x, plan_of(IDS)), expected, rtol=1e-10, atol=1e-10)
    theirs = {id(parameter) for expert in experts for parameter in expert.parameters()}
    back = [{id(parameter) for parameter in expert.parameters()} for expert in routed.experts()]
    assert {id(parameter) for parameter in routed.parameters()} == theirs == set().union(*back)
    for mine, expert in zip(back, experts, strict=True):
        assert mine == {id(parameter) for parameter in expert.parameters()}
    torch.testing.assert_close(
        one_by_one(routed.experts(), x, IDS, expected.shape[1]), expected, rtol=1e-12, atol=1e-12
    )
    torch.optim.SGD(routed.parameters(), 0.1).zero_grad()
    before = [parameter.detach().clone() for expert in experts for parameter in expert.parameters()]
    routed(x, plan_of(IDS)).square().sum().backward()
    torch.optim.SGD(routed.parameters(), 0.1).step()
    after = [parameter for expert in experts for parameter in expert.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), "training it trains the experts"
    torch.testing.assert_close(
        routed(x, plan_of(IDS)), one_by_one(experts, x, IDS, expected.shape[1]), rtol=1e-9, atol=1e-9
    )


@pytest.fixture(autouse=True)
def two_modalities(monkeypatch):
    """Two experts, and plans of two modalities."""
    monkeypatch.setattr("layers._routed.NAMES", ("text", "image"))


def several(build, count=2):
    return [randomised(build(), seed) for seed in range(count)]


@pytest.mark.parametrize("bias", (True, False))
def test_linear_layers(bias):
    experts = several(lambda: nn.Linear(DIM, HIDDEN, bias))
    routed = RoutedLinear.from_experts(experts)
    check(routed, experts)
    assert all((linear.bias is not None) == bias for linear in routed.experts())
    assert [(e.in_features, e.out_features) for e in routed.experts()] == [(DIM, HIDDEN)] * 2


@pytest.mark.parametrize("build", (
    lambda: nn.LayerNorm(DIM, eps=0.1), lambda: nn.LayerNorm(DIM, bias=False), lambda: nn.RMSNorm(DIM, eps=0.1),
))  # fmt: skip
def test_norms(build):
    experts = several(build)
    check(RoutedNorm.from_experts(experts), experts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_rms_norm_s_own_eps_is_that_of_the_dtype_it_computes_in(dtype):
    experts = several(lambda: nn.RMSNorm(DIM))
    routed = RoutedNorm.from_experts(experts)
    assert routed.eps is None and [norm.eps for norm in routed.experts()] == [None, None]
    network = RoutedFFN.from_experts(several(Ungated), w0="fc1", w2="fc2", activation="gelu", sub_norm="ffn_layernorm",
                                     output_norm=experts)  # fmt: skip
    assert network.output_norm.eps is None
    x = (tokens(len(IDS)) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps ** 0.5).to(dtype)
    expected = one_by_one([norm.to(dtype) for norm in experts], x, IDS, DIM)
    torch.testing.assert_close(routed(x, plan_of(IDS)), expected)


def test_norms_of_a_class_of_one_s_own_whose_kind_is_said():
    experts = several(OwnNorm)
    check(RoutedNorm.from_experts(experts, "rms_norm", eps=0.25), experts)
    assert message_of(RoutedNorm.from_experts, experts) == (
        "experts: expected nn.LayerNorm or nn.RMSNorm of each modality, got a OwnNorm as expert 0; if it computes "
        "such a norm, say which by kind= (in RoutedFFN norm_kind=), 'layer_norm' or 'rms_norm', and by eps="
    )
    refused("experts: expected an eps", RoutedNorm.from_experts, experts, "rms_norm")


@pytest.mark.parametrize("bias", (True, False))
def test_gated_networks(bias):
    experts = several(lambda: Gated(bias=bias))
    check(RoutedFFN.from_experts(experts, **GATED), experts)


def test_networks_without_a_gate_and_with_biases():
    experts = several(Ungated)
    names = {"w0": "fc1", "w2": "fc2", "sub_norm": "ffn_layernorm", "activation": "gelu"}
    check(RoutedFFN.from_experts(experts, **names), experts)


def test_norms_that_stand_beside_the_networks():
    experts, norms = several(Ungated), several(OwnNorm)
    names = {"w0": "fc1", "w2": "fc2", "sub_norm": "ffn_layernorm", "activation": "gelu"}
    inside = RoutedFFN.from_experts(experts, **names)
    norm = RoutedNorm.from_experts(norms, "rms_norm", eps=0.25)
    plain = [nn.RMSNorm(DIM, eps=0.25).double() for _ in norms]
    for mine, own in zip(plain, norms, strict=True):
        mine.weight = own.weight
    routed = RoutedFFN.from_experts(experts, **names, output_norm=plain)
    plan, x = plan_of(IDS), tokens(len(IDS))
    assert torch.equal(routed(x, plan), norm(inside(x, plan), plan))
    check(routed, [nn.Sequential(expert, own) for expert, own in zip(experts, norms, strict=True)])
    refused("experts, output_norm: expected one of each of 2", RoutedFFN.from_experts, experts, **names,
            output_norm=norms[:1])  # fmt: skip


def test_what_routed_experts_give_can_be_adopted_again():
    routed = randomised(RoutedFFN(2, DIM, HIDDEN, hidden_bias=True, sub_norm="rms_norm", output_norm="layer_norm"))
    names = {name: name for name in ("w0", "w1", "w2", "sub_norm", "output_norm")}
    again = RoutedFFN.from_experts(routed.experts(), **names, activation="gelu")
    assert [*map(id, again.parameters())] == [*map(id, routed.parameters())]
    assert again.state_dict().keys() == routed.state_dict().keys()
    x, plan = tokens(len(IDS)), plan_of(IDS)
    assert torch.equal(again(x, plan), routed(x, plan))


@pytest.mark.parametrize("given, got", [
    (nn.RMSNorm(DIM), "a RMSNorm"), (nn.ModuleDict({"a": nn.LayerNorm(DIM)}), "a ModuleDict"),
    ({"a": nn.LayerNorm(DIM)}, "a dict"), ("norm", "a str"), (iter(()), "a tuple_iterator"),
])  # fmt: skip
def test_what_is_no_list_of_experts_is_refused(given, got):
    said = f"expected a list with one module for each modality, got {got}"
    assert message_of(RoutedNorm.from_experts, given) == f"experts: {said}"
    assert message_of(RoutedNorm.from_experts, given, "rms_norm", eps=0.25) == f"experts: {said}"
    assert message_of(RoutedLinear.from_experts, given) == f"experts: {said}"
    assert message_of(RoutedFFN.from_experts, given, **GATED) == f"experts: {said}"
    if not isinstance(given, str):  # which is a name
        names = {**GATED, "output_norm": given}
        assert message_of(RoutedFFN.from_experts, several(Gated), **names) == f"experts, output_norm: {said}"
    assert message_of(RoutedLinear.from_experts, ["fc1"]) == "experts: expected modules, got str 'fc1' as expert 0"


def test_experts_that_differ_are_refused():
    wide, narrow = several(lambda: nn.Linear(DIM, 4), 1), several(lambda: nn.Linear(DIM, 6), 1)
    assert message_of(RoutedLinear.from_experts, wide + narrow) == (
        "experts: expected experts of one width, dtype and device, got a weight float64 [4, 8] on cpu in expert 0 and "
        "float64 [6, 8] on cpu in expert 1"
    )
    refused("experts", RoutedLinear.from_experts, [nn.Linear(4, 4), nn.Linear(4, 4).double()])
    refused("experts", RoutedLinear.from_experts, [nn.Linear(4, 4), nn.Linear(4, 4, device="meta")])
    refused("experts", RoutedLinear.from_experts, [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
    refused("experts", RoutedLinear.from_experts, [])
    refused("experts", RoutedNorm.from_experts, [nn.LayerNorm(4), nn.LayerNorm(4, eps=1e-6)])
    refused("experts", RoutedNorm.from_experts, [nn.LayerNorm(4), nn.RMSNorm(4, eps=1e-5)])
    refused("experts", RoutedNorm.from_experts, [nn.RMSNorm(4), nn.RMSNorm(4, eps=1e-5)])
    refused("experts", RoutedNorm.from_experts, [nn.LayerNorm(4, elementwise_affine=False)])
    refused("experts", RoutedNorm.from_experts, [nn.LayerNorm((2, 4))])
    refused("experts", RoutedNorm.from_experts, [nn.LayerNorm(4)], "rms_norm", eps=1e-5)
    refused("kind", RoutedNorm.from_experts, [nn.LayerNorm(4)], "norm", eps=1e-5)
    refused("experts, w0", RoutedFFN.from_experts, [*several(Gated, 1), Gated(HIDDEN + 1).double()], **GATED)


def test_modules_that_compute_something_else_are_refused():
    class Other(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(print)
    for bad in (Other(4, 4), nn.Identity(), hooked, nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))):
        refused("experts: expected a plain nn.Linear", RoutedLinear.from_experts, [nn.Linear(4, 4), bad])
    watched = Gated()
    watched.register_forward_hook(print)
    refused("experts: expected none with hooks", RoutedFFN.from_experts, [watched], **GATED)
    assert message_of(RoutedFFN.from_experts, [Gated(p=0.1)], **GATED) == (
        "experts: expected none with dropout, which is not computed here, got 'dropout' of expert 0 with 0.1; set its "
        "p to 0 and apply dropout to the result"
    )


@pytest.mark.parametrize("left", (
    nn.LayerNorm(HIDDEN, elementwise_affine=False), nn.RMSNorm(HIDDEN, elementwise_affine=False), nn.Softmax(-1),
    nn.BatchNorm1d(HIDDEN, affine=False), nn.Tanh(), nn.GELU(), nn.ReLU(),
))  # fmt: skip
def test_modules_without_parameters_that_no_name_covers_are_refused(left):
    experts = several(Gated)
    experts[1].net["after"] = nn.Sequential(nn.Identity(), left)
    assert message_of(RoutedFFN.from_experts, experts, **GATED) == (
        "experts: expected nothing but what is named and the activation 'silu' to be computed, got 'net.after.1' of "
        f"expert 1, a {left!r}; take it out if nothing calls it"
    )


@pytest.mark.parametrize("activation, module", (
    ("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("silu", nn.SiLU()), ("relu", nn.ReLU(inplace=True)),
    ("gelu", GELUActivation()),
))  # fmt: skip
def test_the_activation_and_what_computes_nothing_need_no_name(activation, module):
    def build():
        parts = nn.Linear(DIM, HIDDEN), module, nn.Dropout(0.0), nn.Identity(), nn.Linear(HIDDEN, DIM)
        return nn.Sequential(nn.ModuleDict({"all": nn.ModuleList([nn.Sequential(*parts)])})["all"][0])

    experts = several(build)
    if isinstance(module, nn.GELU):
        other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}[activation]
        said = message_of(RoutedFFN.from_experts, experts, w0="0.0", w2="0.4", activation=other)
        assert said.endswith(f"got '0.1' of expert 0, a {module!r}; take it out if nothing calls it")
    check(RoutedFFN.from_experts(experts, w0="0.0", w2="0.4", activation=activation), experts)


def test_hooks_inside_an_expert_are_refused():
    watched = Gated()
    watched.net.register_forward_hook(print)
    said = "experts: expected none with hooks, which are not called, got 'net' of expert 0 with"
    assert message_of(RoutedFFN.from_experts, [watched], **GATED) == said


def test_norms_that_compute_more_than_is_said_are_refused():
    gained, watched, inner = OwnNorm(), OwnNorm(), OwnNorm()
    gained.gain, inner.drop = nn.Parameter(torch.ones(1)), nn.Dropout(0.5)
    watched.register_forward_hook(print)
    said = {
        gained: "expected no parameters but weight and bias, got ['gain'] of expert 1",
        watched: "expected none with hooks, which are not called, got expert 1 with",
        inner: "expected none with dropout, which is not computed here, got 'drop' of expert 1 with 0.5; set its p to "
        "0 and apply dropout to the result",
        nn.BatchNorm1d(DIM): "expected norms of the kind 'rms_norm', got a BatchNorm1d as expert 1",
        nn.LayerNorm(DIM, bias=False): "expected norms of the kind 'rms_norm', got a LayerNorm as expert 1",
    }
    for norm, message in said.items():
        assert message_of(RoutedNorm.from_experts, [OwnNorm(), norm], "rms_norm", eps=0.25) == f"experts: {message}"
    same = RoutedNorm.from_experts([OwnNorm(), nn.RMSNorm(DIM, eps=0.25)], "rms_norm", eps=0.25)
    assert same.kind == "rms_norm"


def test_names_that_do_not_fit_are_refused():
    refused("experts, w1: expected one of", RoutedFFN.from_experts, several(Gated), **{**GATED, "w1": "net.value"})
    without = {name: value for name, value in GATED.items() if name != "sub_norm"}
    said = "experts: expected names for all parameters of expert 0, got none for ['norm.weight', 'norm.bias']"
    assert message_of(RoutedFFN.from_experts, several(Gated), **without) == said
    square = several(lambda: nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, HIDDEN)))
    refused("experts, w2: expected a weight [8, 12]", RoutedFFN.from_experts, square, w0="0", w2="1", activation="relu")
    refused("activation", RoutedFFN.from_experts, several(Gated), **{**GATED, "activation": "mish"})
    refused("experts", RoutedFFN.from_experts, [], **GATED)
