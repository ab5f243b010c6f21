"""Which gradients of two models are compared: those of one tensor, those of one name, and what is left."""

import pytest
import torch
from test_comparison import QUICK, Weighted, batch
from torch import Tensor, nn

from onepeace_fast import RoutedFFN, RoutePlan
from onepeace_fast.comparison import compare
from onepeace_fast.differences import Difference


class Expert(nn.Module):
    """A feed-forward network without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    """Two experts and a linear layer, as a model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(3, 3), nn.ModuleList([Expert(), Expert()])

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        x = self.first(x)
        return torch.where(is_text[:, None], self.experts[0](x), self.experts[1](x))


class Port(nn.Module):
    """The same, by a routed network over the very parameters; with ``cut`` these get no gradient."""

    def __init__(self, plain: Plain, cut: bool) -> None:
        super().__init__()
        self.linear, self.cut = plain.first, cut
        self.ffn = RoutedFFN.from_experts(plain.experts, w0="up", w2="down", activation="relu")

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        plan = RoutePlan.from_token_masks({"text": is_text, "image": ~is_text})
        x = self.linear(x)
        out = self.ffn(x, plan)
        if self.cut:  # the same values, without the way to the weights
            out = self.ffn(x, plan).detach() + (x - x.detach())
        return out


@pytest.mark.parametrize("cut", [False, True])
def test_a_port_that_shares_its_parameters_is_compared_at_each_of_them(cut):
    torch.manual_seed(0)
    plain = Plain()
    found = compare(plain, Port(plain, cut), (torch.randn(6, 3), torch.arange(6) % 3 == 0), **QUICK)
    assert found.gradients.keys() == dict(plain.named_parameters()).keys() and found.not_compared == ()
    apart = {name for name in found.gradients if name.startswith("experts") and found.gradients[name].relative > 1e-5}
    assert apart == ({name for name in found.gradients if name.startswith("experts")} if cut else set())


def test_one_name_of_two_tensors_is_matched_by_the_tensor():
    class Swapped(nn.Module):
        def __init__(self, one: Weighted) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64)), one.weight
            self.bias = nn.Parameter(one.bias.detach() + 1)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x * self.scale + self.bias + self.weight.sum()

    one = Weighted()
    found = compare(one, Swapped(one), batch(), loss=torch.sum, **QUICK)
    assert found.gradients == {"weight": Difference(7.0, 14.0), "bias": Difference(0.0, 2.0)}
    assert found.not_compared == ("weight of b",) and "unnamed" not in str(found)


def test_functions_are_compared_at_tensors_that_both_reach_and_the_table_says_what_is_left():
    one, other = Weighted(), Weighted()
    advice = "unnamed: what a function closes over has no name to match; give modules, or methods of modules\n"
    found = compare(lambda x: one(x), lambda x: x * one.weight.abs() + other.bias, batch(), loss=torch.sum, **QUICK)
    assert set(found.gradients.values()) == {Difference(10.0, 7.0)} and len(found.not_compared) == 2
    assert all(name.startswith("unnamed ") and name.endswith(" [3]") for name in found.gradients)
    assert {name[-5:] for name in found.not_compared} == {" of a", " of b"} and advice in str(found)
    named = compare(one, lambda x: one(x) * one.weight.detach().sign(), batch(), loss=torch.sum, **QUICK)
    assert named.gradients["weight"] == Difference(10.0, 7.0) and named.gradients.keys() == {"weight", "bias"}
    assert named.not_compared == () and advice not in str(named)
    left = compare(lambda x: one(x), lambda x: other(x), batch(), **QUICK)
    said = "unnamed 1 [3] of a, unnamed 2 [3] of a, unnamed 1 [3] of b, unnamed 2 [3] of b"
    assert f"gradients compared: 0; not in both: {said}\n{advice}" in str(left)
