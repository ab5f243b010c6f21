"""``layer_norm``: shared by all rows, and per modality on packed rows."""

from itertools import pairwise

import pytest
import torch
from support import contract, naive
from support.contract import normal
from support.plans import ragged_offsets

from onepeace_fast import layer_norm
from onepeace_fast.ops.arguments import MAX_WIDTH
from onepeace_fast.tolerance import DTYPES

GARBAGE = 2**31 - 1  # an entry of a row index that must not be read
ROWS, WIDTHS = (0, 1, 7, 65, 300), (63, 64, 200)


def shared_leaves(rows: int, width: int, weight: bool = True, bias: bool = True) -> dict[str, torch.Tensor]:
    leaves = {"x": 3 * normal(rows, width, seed=1) + 2 * normal(rows, 1, seed=2)}
    leaves |= {"weight": 1 + 0.5 * normal(width, seed=3)} if weight else {}
    return leaves | ({"bias": normal(width, seed=4)} if bias else {})


def naive_shared(x, weight=None, bias=None, eps=1e-5):
    return naive.layer_norm(x, [x.shape[0]], [weight], [bias], eps)


def routed_leaves(counts: list[int], width: int, inert: int = 0) -> dict[str, torch.Tensor]:
    leaves = {"x": 2 * normal(sum(counts) + inert, width, seed=5) + normal(sum(counts) + inert, 1, seed=6)}
    for m in range(len(counts)):
        leaves |= {f"weight{m}": 1 + 0.5 * normal(width, seed=10 + m), f"bias{m}": normal(width, seed=20 + m)}
    return leaves


def routed(counts: list[int], host: bool = True, eps: float = 1e-5):
    def call(x, **parameters):
        weights, biases = ([parameters[f"{kind}{m}"] for m in range(len(counts))] for kind in ("weight", "bias"))
        rows = counts if host else ()
        return layer_norm(x, weights, biases, offsets=ragged_offsets(counts), row_counts=rows, eps=eps)

    return call


def naive_routed(counts: list[int], eps: float = 1e-5):
    def call(x, **parameters):
        weights, biases = ([parameters[f"{kind}{m}"] for m in range(len(counts))] for kind in ("weight", "bias"))
        return naive.layer_norm(x, counts, weights, biases, eps)

    return call


def indexed(index: list[int], counts: list[int] | None = None, host: bool = False):
    """Per-modality parameters, or shared ones where the leaves have a single weight."""
    extra = {"offsets": ragged_offsets(counts), "row_counts": counts if host else ()} if counts else {}

    def call(x, weight=None, bias=None, head_scale=None, **parameters):
        if parameters:
            weight, bias = ([parameters[f"{kind}{m}"] for m in range(len(counts))] for kind in ("weight", "bias"))
        return layer_norm(x, weight, bias, head_scale=head_scale, row_index=int32(index), **extra)

    return call


def naive_indexed(index: list[int], counts: list[int] | None = None):
    def call(x, weight=None, bias=None, head_scale=None, **parameters):
        groups = counts or [len(index)]
        weights, biases = [weight] * len(groups), [bias] * len(groups)
        if parameters:
            weights, biases = ([parameters[f"{kind}{m}"] for m in range(len(groups))] for kind in ("weight", "bias"))
        kept = scaled(x, head_scale)[index[: sum(groups)]]
        rows = torch.cat([kept, kept.new_zeros(len(index) - len(kept), x.shape[1])])
        return naive.layer_norm(rows, groups, weights, biases, 1e-5)

    return call


def scaled(x, head_scale):
    return x if head_scale is None else (x.unflatten(1, (head_scale.shape[0], -1)) * head_scale[:, None]).flatten(1)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_shared_norm_follows_the_naive_one_at_every_number_of_rows(width, dtype):
    for rows in ROWS:
        contract.check_against_naive(layer_norm, naive_shared, shared_leaves(rows, width), dtype)


def test_rows_of_one_element_have_nothing_left_but_the_bias():
    for dtype in (torch.float64, *DTYPES):
        outputs, gradients = contract.run(layer_norm, {k: v.to(dtype) for k, v in shared_leaves(65, 1).items()})
        assert torch.equal(outputs[0], gradients["bias"].new_ones(65, 1) * normal(1, seed=4, dtype=dtype))
        given = contract.cotangents(outputs)[0]
        torch.testing.assert_close(gradients["bias"], given.double().sum(0).to(dtype), rtol=2e-2, atol=1e-5)
        for name in ("x", "weight"):  # exactly zero but for rounding: 1 / sqrt(eps) times the magnitude of x
            assert gradients[name].abs().max() < 1e-2


@pytest.mark.parametrize("weight, bias", [(False, False), (True, False), (False, True)])
def test_weight_and_bias_are_each_optional(weight, bias):
    for dtype in (torch.float64, torch.bfloat16):
        contract.check_against_naive(layer_norm, naive_shared, shared_leaves(7, 64, weight, bias), dtype)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("counts", [[3, 4], [2, 0, 5]], ids=str)
def test_every_modality_has_its_own_weight_without_bias_and_its_own_bias_without_weight(counts, kind):
    leaves = {n: leaf for n, leaf in routed_leaves(counts, 63, inert=2).items() if n == "x" or n.startswith(kind)}

    def parameters(given):
        values = [given[f"{kind}{m}"] for m in range(len(counts))]
        return (values, None) if kind == "weight" else (None, values)

    def call(x, **given):
        return layer_norm(x, *parameters(given), offsets=ragged_offsets(counts), row_counts=counts)

    def plain(x, **given):
        absent = [None] * len(counts)
        return naive.layer_norm(x, counts, *(values or absent for values in parameters(given)), 1e-5)

    for dtype in (torch.float64, torch.bfloat16):
        contract.check_against_naive(call, plain, leaves, dtype)


@pytest.mark.parametrize("eps", (1e-5, 0.5))
def test_eps_is_added_to_the_variance(eps):
    leaves = shared_leaves(7, 63)
    leaves["x"][3] = 0.25  # a row without variance
    contract.check_against_naive(
        lambda **mine: layer_norm(**mine, eps=eps), lambda **mine: naive_shared(**mine, eps=eps), leaves, torch.float64
    )
    counts = [3, 4]
    contract.check_against_naive(
        routed(counts, eps=eps), naive_routed(counts, eps=eps), routed_leaves(counts, 63), torch.float64
    )


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("counts", ([5, 0, 7], [1], [0, 1, 65], [300, 7], [0, 0]), ids=str)
def test_routed_norm_follows_the_naive_one_in_every_modality(counts, dtype):
    bounds = ragged_offsets(counts).tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    for width, inert in ((63, 0), (64, 3)):
        leaves = routed_leaves(counts, width, inert)
        slices = {"out0": parts, "x": parts}
        contract.check_against_naive(routed(counts), naive_routed(counts), leaves, dtype, slices)


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("width, heads", [(64, 4), (63, 3), (64, 64), (8, 1)])
def test_a_head_scale_stands_in_front_of_the_norm(width, heads, dtype):
    leaves = shared_leaves(9, width) | {"head_scale": 1 + 0.5 * normal(heads, seed=7)}

    def plain(x, weight, bias, head_scale):
        return naive_shared(scaled(x, head_scale), weight, bias)

    contract.check_against_naive(layer_norm, plain, leaves, dtype)


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("counts", (None, [4, 0, 1], [0, 0]), ids=str)
def test_a_row_index_reads_these_rows_and_writes_them_one_after_another(counts, dtype):
    index = [11, 0, 5, 4, 9]
    index = [GARBAGE if i >= sum(counts or [5]) else row for i, row in enumerate(index)]
    leaves = routed_leaves(counts, 64, inert=12 - sum(counts)) if counts else shared_leaves(12, 64)
    leaves["head_scale"] = 1 + 0.5 * normal(4, seed=7)
    contract.check_against_naive(indexed(index, counts), naive_indexed(index, counts), leaves, dtype)
    if counts:
        host = contract.run(indexed(index, counts, host=True), leaves)
        contract.assert_same(host, contract.run(indexed(index, counts), leaves), "host")


def test_parameters_may_be_shared_by_the_modalities_of_offsets():
    counts, leaves = [3, 0, 4], shared_leaves(9, 64)

    def plain(x, weight, bias):
        return naive.layer_norm(x, counts, [weight] * 3, [bias] * 3, 1e-5)

    def call(x, weight, bias):
        return layer_norm(x, weight, bias, offsets=ragged_offsets(counts))

    contract.check_against_naive(call, plain, leaves, torch.float64)
    one_list = lambda x, weight, bias: layer_norm(x, weight, [bias] * 3, offsets=ragged_offsets(counts))  # noqa: E731
    contract.check_against_naive(one_list, plain, leaves, torch.float64)


def test_parameters_may_have_another_dtype_than_x():
    dtypes = {"x": torch.bfloat16, "weight": torch.float32, "bias": torch.float32}

    def plain(x, weight, bias):
        return naive_shared(x.to(weight.dtype), weight, bias).to(x.dtype)

    contract.check_against_naive(layer_norm, plain, shared_leaves(65, 64), dtypes)


def test_offsets_alone_and_host_counts_give_the_same_bits():
    counts, leaves = [5, 0, 7], routed_leaves([5, 0, 7], 64, 2)
    contract.assert_same(contract.run(routed(counts, host=False), leaves), contract.run(routed(counts), leaves), "host")


def test_finite_differences_agree():
    contract.check_gradcheck(layer_norm, shared_leaves(4, 7))
    contract.check_gradcheck(layer_norm, shared_leaves(4, 7, weight=False, bias=False))
    contract.check_gradcheck(routed([3, 0, 2]), routed_leaves([3, 0, 2], 5, 1))
    leaves = routed_leaves([1, 2], 6, 2) | {"head_scale": normal(2, seed=7)}
    contract.check_gradcheck(indexed([4, 0, 2, GARBAGE], [1, 2]), leaves)


def test_registration():
    contract.check_registration(layer_norm, shared_leaves(5, 8), "layer_norm")
    contract.check_registration(routed([3, 0, 2]), routed_leaves([3, 0, 2], 8, 1), "layer_norm")
    leaves = routed_leaves([1, 2], 8, 2) | {"head_scale": normal(2, seed=7)}
    contract.check_registration(indexed([4, 0, 2, GARBAGE], [1, 2]), leaves, "layer_norm")


@pytest.mark.parametrize("kind", ("shared", "routed"))
def test_strides_of_inputs_and_gradients_do_not_matter(kind):
    call, leaves = (layer_norm, shared_leaves(7, 9)) if kind == "shared" else (routed([3, 4]), routed_leaves([3, 4], 9))
    contract.check_input_layouts(call, leaves, ["x"])
    contract.check_gradient_layouts(call, leaves)
    contract.check_gradient_layouts(call, {name: leaf.bfloat16() for name, leaf in leaves.items()})


def test_rows_are_independent():
    leaves = shared_leaves(8, 64)
    expected = contract.run(layer_norm, leaves)
    leaves["x"] = leaves["x"].clone()
    leaves["x"][3] = torch.nan
    actual = contract.run(layer_norm, leaves)
    others = torch.arange(8) != 3
    assert torch.equal(actual[0][0][others], expected[0][0][others])
    assert torch.equal(actual[1]["x"][others], expected[1]["x"][others])


def test_nan_in_inert_rows_reaches_nothing():
    counts, width, inert = [5, 0, 7], 64, 3
    leaves = routed_leaves(counts, width, inert)
    given = [normal(sum(counts) + inert, width, seed=9)]
    expected = contract.run(routed(counts), leaves, given)
    for tensor in (leaves["x"], given[0]):
        tensor[-inert:] = torch.nan
    contract.assert_same(contract.run(routed(counts), leaves, given), expected, "NaN in inert rows")
    assert not expected[0][0][-inert:].any()


def test_nan_in_one_modality_leaves_the_others_alone():
    counts, leaves = [5, 4, 7], routed_leaves([5, 4, 7], 64)
    expected = contract.run(routed(counts), leaves)
    leaves["x"][5:9] = torch.nan
    actual = contract.run(routed(counts), leaves)
    real = [*range(5), *range(9, 16)]
    assert torch.equal(actual[0][0][real], expected[0][0][real])
    for name in ("weight0", "bias0", "weight2", "bias2"):
        assert torch.equal(actual[1][name], expected[1][name])
    assert torch.equal(actual[1]["x"][real], expected[1]["x"][real])


def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros():
    contract.check_frozen(layer_norm, shared_leaves(7, 9))
    counts, leaves = [5, 0, 2], routed_leaves([5, 0, 2], 9)
    contract.check_frozen(routed(counts), leaves)
    gradients = contract.run(routed(counts), leaves)[1]
    for name in ("weight1", "bias1"):
        assert torch.equal(gradients[name], torch.zeros(9, dtype=torch.float64))
    for name in ("weight0", "bias2"):
        assert gradients[name].all()


def test_second_derivative_is_refused():
    contract.check_second_derivative(layer_norm, shared_leaves(5, 8))
    contract.check_second_derivative(routed([3, 2]), routed_leaves([3, 2], 8))


def test_repeats_are_bitwise_equal():
    leaves = {name: leaf.float() for name, leaf in routed_leaves([65, 0, 131], 200, 4).items()}
    contract.check_deterministic(routed([65, 0, 131]), leaves)
    contract.check_deterministic(layer_norm, {k: v.bfloat16() for k, v in shared_leaves(300, 200).items()})


def test_compiled_equals_eager():
    contract.check_compiled(layer_norm, shared_leaves(7, 16))
    contract.check_compiled(routed([3, 0, 4]), routed_leaves([3, 0, 4], 16, 2))
    leaves = routed_leaves([1, 2], 8, 2) | {"head_scale": normal(2, seed=7)}
    contract.check_compiled(indexed([4, 0, 2, GARBAGE], [1, 2]), leaves)


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(x, weight0, weight1, bias0, bias1, offsets, first, second):
        return layer_norm(x, [weight0, weight1], [bias0, bias1], offsets=offsets, row_counts=[first, second])

    cases = [
        (routed_leaves(counts, 16), {"offsets": ragged_offsets(counts), "first": counts[0], "second": counts[1]})
        for counts in ([6, 4], [2, 9], [7, 5])
    ]
    contract.check_compiled_once(cases, call)


def test_bad_input_is_refused():
    x, w, offsets = torch.zeros(4, 8), torch.ones(8), ragged_offsets([1, 3])
    contract.refused("x", layer_norm, torch.zeros(2, 2, 8))
    contract.refused("x", layer_norm, torch.zeros(4, 8, dtype=torch.int32))
    contract.refused("x", layer_norm, [[1.0, 2.0]])
    contract.refused("weight", layer_norm, x, torch.ones(7))
    contract.refused("weight", layer_norm, x, torch.ones(8, dtype=torch.int64))
    contract.refused("weight", layer_norm, x, torch.ones(8, device="meta"))
    contract.refused("bias", layer_norm, x, w, torch.ones(1, 8))
    contract.refused("weight", layer_norm, x, [w, w])
    contract.refused("weight", layer_norm, x, [w], offsets=offsets)
    contract.refused("bias", layer_norm, x, [w, w], [w, w, w], offsets=offsets)
    contract.refused("eps", layer_norm, x, w, eps=0.0)
    contract.refused("x", layer_norm, torch.zeros(1, MAX_WIDTH + 1))
    for bad in (torch.ones(3), torch.ones(2, 4), torch.ones(2, dtype=torch.int64), torch.ones(2, device="meta")):
        contract.refused("head_scale", layer_norm, x, w, head_scale=bad)
    for bad in (int32([0]).long(), int32([[0]]), int32([0]).to("meta"), int32([4]), int32([-1]), int32([1, 1])):
        contract.refused("row_index", layer_norm, x, w, row_index=bad)
    contract.refused("row_counts", layer_norm, x, [w, w], row_index=int32([0, 1]), offsets=offsets, row_counts=[1, 3])


def test_bad_offsets_and_counts_are_refused():
    x, w, offsets = torch.zeros(4, 8), torch.ones(8), ragged_offsets([1, 3])
    contract.refused("offsets", layer_norm, x, [w, w], offsets=offsets.long())
    contract.refused("offsets", layer_norm, x, [w, w], offsets=offsets[None])
    contract.refused("offsets", layer_norm, x, [w, w], offsets=offsets.to("meta"), row_counts=[1, 3])
    contract.refused("row_counts", layer_norm, x, [w, w], offsets=offsets, row_counts=[1])
    contract.refused("row_counts", layer_norm, x, [w, w], offsets=offsets, row_counts=[1, 1, 2])
    contract.refused("row_counts", layer_norm, x, [w, w], offsets=offsets, row_counts=[1, 4])
