"""``projections``: linear layers of the same rows, and attention behind them."""

import pytest
import torch
import torch.nn.functional as F
from support import contract
from support.contract import normal
from torch.utils._python_dispatch import TorchDispatchMode

from onepeace_fast import RoutePlan
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers import transformer
from onepeace_fast.layers.transformer import SelfAttention
from onepeace_fast.ops.projections import projections
from onepeace_fast.tolerance import DTYPES

BIASED = (0, 2)


def leaves_of(rows: int = 7, width: int = 16, columns: int = 24) -> dict[str, torch.Tensor]:
    leaves = {"x": normal(rows, width, seed=1)}
    leaves |= {f"weight{i}": normal(columns, width, seed=10 + i) * width**-0.5 for i in range(3)}
    return leaves | {f"bias{i}": normal(columns, seed=20 + i) for i in BIASED}


def lists_of(parameters):
    return [parameters[f"weight{i}"] for i in range(3)], [parameters.get(f"bias{i}") for i in range(3)]


def op(x, **parameters):
    return projections(x, *lists_of(parameters))


def side_by_side(x, **parameters):
    """As attention's backward pass gives them, the gradients of a row's layers lie one after another."""
    return op(x, **parameters).transpose(0, 1)


def plain(x, **parameters):
    return torch.stack([F.linear(x, weight, bias) for weight, bias in zip(*lists_of(parameters), strict=True)])


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("rows", (0, 1, 65))
def test_values_and_gradients_follow_the_naive_ones(rows, dtype):
    contract.check_against_naive(op, plain, leaves_of(rows), dtype)
    contract.check_against_naive(
        side_by_side, lambda **mine: plain(**mine).transpose(0, 1), leaves_of(rows, 64, 48), dtype
    )


def test_layouts_frozen_parameters_and_repeats():
    for call in (op, side_by_side):
        contract.check_gradient_layouts(call, leaves_of())
        contract.check_input_layouts(call, leaves_of(), ["x", "weight1"])
        contract.check_frozen(call, leaves_of())
        contract.check_deterministic(call, leaves_of())


def test_registration_second_derivative_and_compiling():
    for call in (op, side_by_side):
        contract.check_registration(call, leaves_of(), "projections")
        contract.check_second_derivative(call, leaves_of())
        contract.check_compiled(call, leaves_of())


def test_products_run_in_autocast_s_dtype():
    leaves = {name: leaf.float() for name, leaf in leaves_of().items()}
    half = {name: leaf.bfloat16() for name, leaf in leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, gradients = contract.run(op, leaves)
    expected, of_half = contract.run(op, half)
    assert torch.equal(under[0], expected[0])
    assert all(torch.equal(gradient, of_half[name].float()) for name, gradient in gradients.items())


class Names(TorchDispatchMode):
    """The names of the ops inside that give at least so many numbers."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.seen = numbers, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.numbers:
            self.seen.add(function._schema.name.partition("::")[2])
        return result


def test_attention_s_kernels_take_projections_and_give_gradients_without_a_copy(kernel, monkeypatch):
    monkeypatch.setattr(transformer, "projects_together", lambda z: True)
    plan = RoutePlan.from_lengths({"text": [3, 2], "image": [4, 1]})
    config = TransformerConfig(embed_dim=64, attention_heads=2, layers=1, sub_layer_norm=False)
    attention, z = SelfAttention(config).half(), normal(plan.capacity, 64, seed=1, dtype=torch.float16)
    gradient = torch.ones_like(z)
    with Names(z.numel()) as names:
        attention(z.requires_grad_(), plan, ()).backward(gradient)
    assert {"mm", "addmm"} <= names.seen
    copying = names.seen & {"copy_", "clone", "cat", "stack", "fill_", "zero_", "zeros", "new_zeros", "add"}
    assert not copying
