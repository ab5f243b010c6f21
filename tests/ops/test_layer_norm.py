"""``layer_norm``: shared by all rows, and per modality on packed rows.

The tests that take ``CHECKED`` or ``CONTRACT_DTYPES`` hold of the reference and of the kernels, which tests/kernels
runs them with.
"""

from itertools import pairwise

import pytest
import torch
from support import contract, naive
from support.contract import normal
from support.kernels import (
    CHECKED,
    CONTRACT_DTYPES,
    DEVICE,
    HALF,
    INTERPRETED,
    REFERENCE_ONLY,
    REPEATS,
    first,
    interpreter_only,
    on_device,
)
from support.layer_norm_cases import GARBAGE, op, plain, routed_leaves, shared_leaves
from support.plans import ragged_offsets

from onepeace_fast import layer_norm
from onepeace_fast.ops.arguments import MAX_WIDTH
from onepeace_fast.tolerance import DTYPES

ROWS, WIDTHS = (0, 1, 7, 65, 300), (63, 64, 200)
MODALITIES = first(([5, 0, 7], [30, 7, 0, 0, 90], [1], [0, 1, 65], [0, 0]), 2)
MODALITIES += [[300, 7]] if REFERENCE_ONLY else []


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_shared_norm_follows_the_naive_one_at_every_number_of_rows(width, dtype):
    for rows in ROWS:
        contract.check_against_naive(op(), plain(), shared_leaves(rows, width), dtype)


def test_rows_of_one_element_have_nothing_left_but_the_bias():
    for dtype in (CHECKED, torch.float32, HALF):
        leaves = on_device(shared_leaves(65, 1), dtype)
        outputs, gradients = contract.run(op(), leaves)
        assert torch.equal(outputs[0], leaves["bias"].expand(65, 1))
        given = contract.cotangents(outputs)[0]
        torch.testing.assert_close(gradients["bias"], given.double().sum(0).to(dtype), rtol=2e-2, atol=1e-5)
        for name in ("x", "weight"):  # exactly zero but for rounding: 1 / sqrt(eps) times the magnitude of x
            assert gradients[name].abs().max() < 1e-2


@interpreter_only
@pytest.mark.parametrize("weight, bias", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("eps", (1e-5, 0.5))
def test_weight_and_bias_are_each_optional(weight, bias, eps):
    leaves = on_device(shared_leaves(7, 63, weight, bias))
    leaves["x"][3] = 0.25  # a row without variance
    for counts in (None, [3, 0, 2]):
        for dtype in (CHECKED, HALF) if counts is None else (CHECKED,):
            contract.check_against_naive(op(counts, eps=eps), plain(counts, eps=eps), leaves, dtype)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("counts", [[3, 4], [2, 0, 5]], ids=str)
def test_every_modality_has_its_own_weight_without_bias_and_its_own_bias_without_weight(counts, kind):
    leaves = {n: leaf for n, leaf in routed_leaves(counts, 63, 9).items() if n == "x" or n.startswith(kind)}

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


@pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
@pytest.mark.parametrize("counts", MODALITIES, ids=str)
def test_routed_norm_follows_the_naive_one_in_every_modality(counts, dtype):
    bounds = ragged_offsets(counts).tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    for width, inert in ((63, 0), (64, 3)):
        leaves = on_device(routed_leaves(counts, width, sum(counts) + inert))
        contract.check_against_naive(
            op(counts, host=REFERENCE_ONLY), plain(counts), leaves, dtype, {"out0": parts, "x": parts}
        )


@pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
@pytest.mark.parametrize("width, heads", first([(768, 12), (63, 3), (64, 64), (8, 1)]))
def test_a_head_scale_stands_in_front_of_the_norm(width, heads, dtype):
    for counts in first(([3, 0, 4], [9], None)):
        leaves = routed_leaves(counts, width, 10) if counts else shared_leaves(9, width)
        leaves["head_scale"] = 1 + 0.5 * normal(heads, seed=7)
        contract.check_against_naive(op(counts), plain(counts), on_device(leaves), dtype)


@pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
@pytest.mark.parametrize("counts", (None, [4, 0, 3], [0, 0]), ids=str)
def test_a_row_index_reads_these_rows_and_writes_them_one_after_another(counts, dtype):
    index = [11, 0, 5, 4, 9, 2, 12] + ([GARBAGE] * 3 if counts else [])
    index = [GARBAGE if i >= sum(counts or [7]) else entry for i, entry in enumerate(index)]
    for width, heads in first(((64, 4), (63, None))):
        leaves = routed_leaves(counts, width, 13) if counts else shared_leaves(13, width)
        leaves |= {"head_scale": 1 + 0.5 * normal(heads, seed=7)} if heads else {}
        contract.check_against_naive(op(counts, index), plain(counts, index), on_device(leaves), dtype)
    leaves = on_device(shared_leaves(13, 64))
    contract.check_against_naive(op(counts, index), plain(counts, index), leaves, dtype)
    if counts:
        host = contract.run(op(counts, index, host=True), leaves)
        contract.assert_same(host, contract.run(op(counts, index), leaves), "host")


def test_parameters_may_be_shared_by_the_modalities_of_offsets():
    counts, leaves = [3, 0, 4], shared_leaves(9, 64)

    contract.check_against_naive(op(counts), plain(counts), leaves, torch.float64)
    one_list = lambda x, weight, bias: layer_norm(x, weight, [bias] * 3, offsets=ragged_offsets(counts))  # noqa: E731
    contract.check_against_naive(one_list, plain(counts), leaves, torch.float64)


def test_parameters_may_have_another_dtype_than_x():
    dtypes = {"x": HALF, "weight": torch.float32, "bias": torch.float32}

    def in_float32(x, weight, bias):
        return plain()(x.to(weight.dtype), weight, bias).to(x.dtype)

    contract.check_against_naive(op(), in_float32, on_device(shared_leaves(65, 64)), dtypes)


def test_offsets_alone_and_host_counts_give_the_same_bits():
    counts, leaves = [5, 0, 7], routed_leaves([5, 0, 7], 64, 14)
    contract.assert_same(contract.run(op(counts), leaves), contract.run(op(counts, host=True), leaves), "host")


INDEXED = (op([1, 2], [4, 0, 2, GARBAGE]), routed_leaves([1, 2], 8, 5, 2))
SHARED, ROUTED = (op(), shared_leaves(5, 8)), (op([3, 0, 2]), routed_leaves([3, 0, 2], 8, 6))


def test_finite_differences_agree():
    for call, leaves in (SHARED, ROUTED, INDEXED, (op(), shared_leaves(4, 7, weight=False, bias=False))):
        contract.check_gradcheck(call, leaves)


def test_registration():
    for call, leaves in (SHARED, ROUTED, INDEXED):
        contract.check_registration(call, on_device(leaves, CHECKED), "layer_norm")


def test_strides_of_inputs_and_gradients_do_not_matter():
    for call, leaves in ((op(), shared_leaves(7, 9)), (op([3, 0, 4]), routed_leaves([3, 0, 4], 9, 8, 3))):
        contract.check_input_layouts(call, on_device(leaves, CHECKED), ["x", *({"head_scale"} & leaves.keys())])
        for dtype in (CHECKED, HALF):
            contract.check_gradient_layouts(call, on_device(leaves, dtype))


def test_rows_are_independent_and_nan_in_inert_rows_reaches_nothing():
    counts, inert = [5, 0, 7], 3
    leaves = on_device(routed_leaves(counts, 64, 15, 4), CHECKED)
    given = [normal(15, 64, seed=9, dtype=CHECKED).to(DEVICE)]
    expected = contract.run(op(counts), leaves, given)
    assert not expected[0][0][-inert:].any() and not expected[1]["x"][-inert:].any()
    for tensor in (leaves["x"], given[0]):
        tensor[-inert:] = torch.nan
    contract.assert_same(contract.run(op(counts), leaves, given), expected, "NaN in inert rows")
    leaves["x"][7] = torch.nan
    actual = contract.run(op(counts), leaves, given)
    others = torch.arange(15) != 7
    assert torch.equal(actual[0][0][others], expected[0][0][others])
    assert torch.equal(actual[1]["x"][others], expected[1]["x"][others])
    for name in ("weight0", "bias0", "weight1", "bias1"):
        assert torch.equal(actual[1][name], expected[1][name])


def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros():
    contract.check_frozen(op(), on_device(shared_leaves(7, 9), CHECKED))
    counts, leaves = [5, 0, 2], on_device(routed_leaves([5, 0, 2], 9, heads=3), CHECKED)
    contract.check_frozen(op(counts), leaves)
    gradients = contract.run(op(counts), leaves)[1]
    for name in ("weight1", "bias1"):
        assert torch.equal(gradients[name], torch.zeros_like(gradients[name]))
    for name in ("weight0", "bias2", "head_scale"):
        assert gradients[name].all()


def test_second_derivative_is_refused():
    contract.check_second_derivative(*SHARED)
    contract.check_second_derivative(*ROUTED)


def test_repeats_are_bitwise_equal():
    counts = [9, 0, 5] if INTERPRETED else [65, 0, 131]
    leaves = routed_leaves(counts, 65, sum(counts) + 4, heads=5)
    for dtype in (torch.float32, HALF):
        contract.check_deterministic(op(counts), on_device(leaves, dtype), REPEATS)


def test_compiled_equals_eager():
    for call, leaves in (SHARED, ROUTED, INDEXED):
        contract.check_compiled(call, on_device(leaves, CHECKED))


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
