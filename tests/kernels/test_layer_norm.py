"""The LayerNorm kernels: every option against the naive norm, hostile layouts, inert rows, repeats."""

import pytest
import torch
from ops.test_layer_norm import (  # noqa: F401  what holds of the reference as well
    test_a_head_scale_stands_in_front_of_the_norm,
    test_a_row_index_reads_these_rows_and_writes_them_one_after_another,
    test_compiled_equals_eager,
    test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros,
    test_parameters_may_have_another_dtype_than_x,
    test_registration,
    test_repeats_are_bitwise_equal,
    test_routed_norm_follows_the_naive_one_in_every_modality,
    test_rows_are_independent_and_nan_in_inert_rows_reaches_nothing,
    test_rows_of_one_element_have_nothing_left_but_the_bias,
    test_strides_of_inputs_and_gradients_do_not_matter,
    test_weight_and_bias_are_each_optional,
)
from support import contract
from support import layer_norm_cases as cases
from support.contract import normal
from support.kernels import (
    DEVICE,
    DTYPES,
    MANY_ROWS,
    WIDTHS,
    far_apart,
    int32,
    on_device,
)
from support.layer_norm_cases import GARBAGE, op, plain
from support.plans import ragged_offsets

from onepeace_fast import layer_norm


def shared_leaves(rows, width):
    return on_device(cases.shared_leaves(rows, width))


def routed_leaves(counts, width, rows=None, heads=None):
    return on_device(cases.routed_leaves(counts, width, rows, heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_shared_norm_follows_the_naive_one(width, dtype):
    for rows in (0, 1, 7):
        contract.check_against_naive(op(None), plain(None), shared_leaves(rows, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:2] if DEVICE == "cuda" else (64, 63))
def test_many_rows_follow_the_naive_norm(width, dtype):
    contract.check_against_naive(op(None), plain(None), shared_leaves(MANY_ROWS, width), dtype)


def test_rows_in_parts_take_a_row_index_and_a_head_scale():
    index, counts = [4, 0, 5, 2, 9, 1, 11, 7, 6], [6, 3]  # more than one row for each program
    leaves = routed_leaves(counts, 6144, rows=12, heads=8)
    contract.check_against_naive(op(counts, index), plain(counts, index), leaves, torch.float32)


def test_rows_read_by_an_index_have_the_bits_of_the_whole_norm():
    for dtype in DTYPES:
        index = [11, 0, 5, 4, 9, 2, 12]
        leaves = on_device(shared_leaves(13, 768), dtype)
        given = normal(13, 768, seed=8, dtype=dtype).to(DEVICE)
        whole, every = contract.run(op(None), leaves, [given])
        part, some = contract.run(op(None, index), leaves, [given[index]])
        assert torch.equal(part[0], whole[0][index])
        assert torch.equal(some["x"][index], every["x"][index])
        left_out = [row for row in range(13) if row not in index]
        assert not some["x"][left_out].any()


def test_strides_of_offsets_and_index_do_not_matter():
    leaves = on_device(routed_leaves([3, 0, 2], 16, 8), torch.float32)
    offsets, index = ragged_offsets([3, 0, 2]).to(DEVICE), int32([7, 1, 0, 4, 5, GARBAGE])
    weights, biases = ([leaves[f"{kind}{m}"] for m in range(3)] for kind in ("weight", "bias"))
    expected = layer_norm(leaves["x"], weights, biases, row_index=index, offsets=offsets)
    apart = [torch.stack([value, torch.full_like(value, 3)], dim=1)[:, 0] for value in (index, offsets)]
    assert torch.equal(layer_norm(leaves["x"], weights, biases, row_index=apart[0], offsets=apart[1]), expected)


def test_nan_in_rows_that_an_index_leaves_out_reaches_nothing():
    index, counts = [3, 0, 6, GARBAGE], [1, 2]
    leaves = on_device(routed_leaves(counts, 64, 8), torch.float32)
    given = [normal(4, 64, seed=9, dtype=torch.float32).to(DEVICE)]
    expected = contract.run(op(counts, index), leaves, given)
    leaves["x"][[1, 2, 4, 5, 7]] = torch.nan
    given[0][3] = torch.nan
    contract.assert_same(contract.run(op(counts, index), leaves, given), expected, "NaN in rows left out")


def test_offsets_are_read_on_the_device():
    leaves = on_device(shared_leaves(12, 64), torch.float32)
    offsets = int32([0, 5])
    before = layer_norm(leaves["x"], leaves["weight"], offsets=offsets)
    offsets.copy_(int32([0, 9]))
    after = layer_norm(leaves["x"], leaves["weight"], offsets=offsets)
    assert not before[5:].any() and after[5:9].any(1).all() and not after[9:].any()


def test_a_capacity_smaller_than_the_offsets_say_is_not_overrun():
    leaves = on_device(shared_leaves(6, 64), torch.float32)
    out = layer_norm(leaves["x"], leaves["weight"], offsets=int32([0, 9]))
    assert torch.equal(out, layer_norm(leaves["x"], leaves["weight"]))


def test_elements_past_2_to_the_31st_are_reached(tmp_path):
    rows = normal(3, 64, seed=1, dtype=torch.float16).to(DEVICE)
    x = far_apart(rows, tmp_path)
    given = [normal(3, 64, seed=2, dtype=torch.float16).to(DEVICE)]
    weight = normal(64, seed=3, dtype=torch.float16).to(DEVICE)
    expected = contract.run(op(None), {"x": rows, "weight": weight}, given)
    x.requires_grad_()
    out = layer_norm(x, weight)
    assert torch.equal(out, expected[0][0])
    (dx,) = torch.autograd.grad(out, x, given)
    assert torch.equal(dx, expected[1]["x"])
