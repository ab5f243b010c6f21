"""An average of models: its values to the last bit, what it refuses, and the line between two models."""

import itertools

import numpy as np
import pytest
import torch
from models._small import small_model
from models._unival import refusal, unival
from torch import nn

from onepeace_fast import interpolate, merge
from onepeace_fast.merging import average

WEIGHTS = (0.1, 0.2, 0.7)


def states(count=3, dtype=torch.float32, size=(7, 5)):
    generator = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(size, generator=generator).to(dtype), "steps": torch.tensor([2**53 + 1, 3])}
        for _ in range(count)
    ]


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64).tolist()


def test_the_average_of_three_is_that_of_numpy_in_float64_to_the_last_place(monkeypatch):
    monkeypatch.setattr(average, "CHUNK", 16)  # several, and a shorter last one
    models = states()
    models[0]["a"][0] = torch.tensor([1e8, 3e38, 1.0, -1e-38, 5.0])
    models[1]["a"][0] = torch.tensor([-5e7, 3e38, 2.0, 1e-38, -9.0])
    merged = merge([*zip(models, WEIGHTS, strict=True)])
    exact = sum(weight * model["a"].numpy().astype(np.float64) for model, weight in zip(models, WEIGHTS, strict=True))
    apart = np.abs(merged["a"].numpy().astype(np.float64) - exact)
    assert merged["a"].dtype == torch.float32
    assert (apart <= np.spacing(np.abs(exact.astype(np.float32)))).all()


def test_the_order_of_the_models_changes_no_bit():
    models = [*zip(states(4), (0.1, 0.2, 0.3, 0.4), strict=True)]
    models[0][0]["a"][0], models[1][0]["a"][0] = 1e30, -5e29  # what is left depends on the order of the sums
    models[2][0]["a"][1], models[3][0]["a"][1] = 0.0, -0.0
    found = {str(bits(merge(order)["a"])) for order in itertools.permutations(models)}
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.1, 0.2, 0.7), (0.3333333,) * 3, (3.0, -2.0), (1.0000005,)])
def test_a_model_merged_with_itself_is_itself_to_the_bit(weights, dtype):
    (model,) = states(1, dtype)
    model["a"][0] = torch.tensor([-0.0, 0.0, float("inf"), float("nan"), 1e-40]).to(dtype)
    merged = merge([(model, weight) for weight in weights])
    assert merged["a"].dtype == dtype
    assert merged["a"].view(torch.uint8).tolist() == model["a"].view(torch.uint8).tolist()
    assert merged["steps"].tolist() == [2**53 + 1, 3]


def test_dtypes_meet_in_the_one_that_torch_promotes_them_to():
    one, two = ({"a": torch.full((2,), 1 / 3, dtype=dtype)} for dtype in (torch.bfloat16, torch.float16))
    merged = merge([(one, 0.5), (two, 0.5)])["a"]
    assert merged.dtype == torch.float32
    assert merged.tolist() == ((one["a"].double() + two["a"].double()) / 2).float().tolist()


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_halves_are_rounded_once(dtype, step):
    one, beside = 1 + step, 2**-12
    # Beside the middle of two numbers by less than float32 holds: (1 + one) / 2 -+ 2**-40.
    values = [[1.0, 1.0, -1.0], [one, one, -one], [-beside, beside, -beside]]
    models = [
        ({"a": torch.tensor(value, dtype=dtype)}, weight)
        for value, weight in zip(values, (0.5, 0.5, 2**-28), strict=True)
    ]
    assert merge(models)["a"].tolist() == [1.0, one, -one]


def test_a_model_of_weight_0_gives_nothing_not_even_nan():
    one, two = states(2)
    two["a"][:] = float("nan")
    assert bits(merge([(one, 1), (two, 0)])["a"]) == bits(one["a"])


def test_a_module_gives_its_own_names_and_a_shared_table_stays_one():
    models = [unival(dtype=torch.float32), unival(dtype=torch.float32)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(3)
    merged = merge([(models[0], 0.5), (models[1], 0.5)])
    models[1].load_upstream_state_dict(merged)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-6, atol=0)
    tables = [merged[f"{name}.weight"] for name in ("encoder.embed_tokens", "decoder.output_projection")]
    assert len({table.data_ptr() for table in tables}) == 1
    plain = nn.BatchNorm1d(3)
    assert [*merge([(plain, 0.4), (plain, 0.6)])] == [*plain.state_dict()]


@pytest.mark.parametrize(
    ("models", "line"),
    [
        ({}, "models: expected at least one, got none"),
        ([({}, 0.5), ({}, 0.6)], "weights: expected a sum of 1, got 1.1; divide each of them by it"),
        ([({}, 0.5), ({}, 0.500002)], "weights: expected a sum of 1, got 1.000002; divide each of them by it"),
        ([({}, True)], "dict: expected a finite number as its weight, got True"),
        ([({}, 10**400)], f"dict: expected a finite number as its weight, got {10**400}"),
        ({"a.pt": float("nan")}, "a.pt: expected a finite number as its weight, got nan"),
        ({"no.pt": 1}, "no.pt: expected a checkpoint, got nothing there"),
        ([(3, 1)], "model 1: expected a path, module or state dict, got 3"),
    ],
)
def test_weights_and_models_that_are_none_are_refused(models, line):
    assert refusal(lambda: merge(models)) == line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"steps": None},
            "model 2: expected all that model 1 has, got none of steps; merge models with the same parts",
        ),
        (
            {"b": torch.ones(1)},
            "model 1: expected all that model 2 has, got none of b; merge models with the same parts",
        ),
        (
            {"encoder.embed_tokens.weight": torch.ones(3, 2)},
            "encoder.embed_tokens.weight: expected one shape in all models, got [2, 2] in model 1 and [3, 2] in "
            "model 2; merge models of one vocabulary",
        ),
        ({"a": torch.ones(2)}, "a: expected one shape in all models, got [7, 5] in model 1 and [2] in model 2"),
        (
            {"steps": torch.tensor([2**53, 3])},
            "steps: expected the same torch.int64 numbers in all models, since they cannot be averaged, got others in "
            "model 1 and model 2",
        ),
        (
            {"steps": torch.tensor([2.0**53 + 1, 3])},
            "steps: expected the same torch.int64 numbers in all models, since they cannot be averaged, got others in "
            "model 1 and model 2",
        ),
        (
            {"a": torch.ones(7, 5).to(torch.float8_e5m2)},
            "a: expected dtypes that torch promotes to one, got torch.float32 and torch.float8_e5m2 in model 2; "
            "convert one of them",
        ),
        ({"a": torch.empty(7, 5, device="meta")}, "a: expected a dense tensor with data, got another in model 2"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(change, line):
    one, two = ({**state, "encoder.embed_tokens.weight": torch.ones(2, 2)} for state in states(2))
    two = {name: value for name, value in {**two, **change}.items() if value is not None}
    assert refusal(lambda: merge([(one, 0.5), (two, 0.5)])) == line


def test_of_the_batches_that_norms_counted_the_largest_number_is_kept():
    one, two, three = ({"bn.num_batches_tracked": torch.tensor(count)} for count in (3, 2**53 + 1, 0))
    found = merge([(one, 0.5), (two, 0.25), (three, 0.25)])["bn.num_batches_tracked"]
    assert (found.item(), found.dtype, found.shape) == (2**53 + 1, torch.int64, ())
    line = "bn.num_batches_tracked: expected the same torch.int64 numbers in all models, since they cannot be averaged"
    short = {"bn.num_batches_tracked": torch.tensor(3, dtype=torch.int32)}
    assert refusal(lambda: merge([(one, 0.5), (short, 0.5)])).startswith(line)


def test_many_missing_names_are_counted():
    one = {f"part{i}": torch.ones(1) for i in range(6)}
    assert refusal(lambda: merge([(one, 0.5), ({}, 0.5)])) == (
        "model 2: expected all that model 1 has, got none of part0, part1, part2 and 3 more; merge models with the "
        "same parts"
    )


def test_the_line_between_two_models_begins_at_the_first_and_ends_at_the_second():
    one, two = states(2)
    found = interpolate(one, two, [0, 0.25, 1, -0.5], lambda weights: weights["a"])
    assert [bits(found[0]), bits(found[2])] == [bits(one["a"]), bits(two["a"])]
    for point, value in zip((0.25, -0.5), (found[1], found[3]), strict=True):
        torch.testing.assert_close(value, torch.lerp(one["a"].double(), two["a"].double(), point).float())
    line = "points: expected finite numbers, got inf"
    assert refusal(lambda: interpolate(one, two, [float("inf")], len)) == line


def test_onepeace_models_are_merged_too():
    model = small_model("reference")
    state = model.to_upstream_state_dict()
    merged = merge([(model, 0.25), (state, 0.75)])
    assert all(torch.equal(merged[name], value) for name, value in state.items())
    assert merged.keys() == state.keys()
