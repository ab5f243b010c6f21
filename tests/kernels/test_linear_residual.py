"""``linear_residual``, by the reference and by the kernels."""

import pytest
import torch
import torch.nn.functional as F
from support import contract
from support.contract import normal
from support.kernels import (
    CHECKED,
    CONTRACT_DTYPES,
    DEVICE,
    EVERY_DTYPE,
    HALF,
    MANY_ROWS,
    REFERENCE_ONLY,
    REPEATS,
    first,
    int32,
    on_device,
)
from support.residual_cases import DROP_PATH, GARBAGE, LAYER_NORM, NO_NORM, sample_of
from support.residual_cases import plain as plain_residual
from torch.autograd.graph import saved_tensors_hooks

from onepeace_fast import layer_norm
from onepeace_fast.ops.linear_residual import linear_residual

NORM = pytest.mark.parametrize("norm", (NO_NORM, LAYER_NORM))
INDEXED = {"index": [5, 0, 6, GARBAGE], "extent": 3}


def leaves_of(rows, width, columns, norm=NO_NORM, gamma=1.0, bias=True, branch_rows=None):
    """``gamma`` is the scale of LayerScale's vector, None for no LayerScale."""
    leaves = {"x": 2 * normal(rows, width, seed=1) + normal(rows, 1, seed=2)}
    leaves |= {"z": 1 + normal(rows if branch_rows is None else branch_rows, columns, seed=3)}
    leaves |= {"weight": columns**-0.5 * normal(width, columns, seed=4)}
    leaves |= {"bias": normal(width, seed=5)} if bias else {}
    leaves |= {} if gamma is None else {"gamma": gamma * (0.5 + normal(width, seed=6))}
    if norm == LAYER_NORM:
        leaves |= {"norm_weight": 1 + 0.5 * normal(width, seed=7), "norm_bias": normal(width, seed=8)}
    return on_device(leaves)


def op(rows, drop_path=True, index=None, extent=None):
    extra = {"drop_path": DROP_PATH, "sample": sample_of(rows)} if drop_path else {}
    extra |= {} if index is None else {"row_index": int32(index)}
    extra |= {} if extent is None else {"offsets": int32([0, extent])}

    def call(**leaves):
        return [output for output in linear_residual(**leaves, **extra) if output is not None]

    return call


def plain(rows, norm=NO_NORM, **options):
    def call(x, z, weight, bias=None, gamma=None, **parameters):
        return plain_residual(rows, norm, **options)(x, F.linear(z, weight, bias), gamma, **parameters)

    return call


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@NORM
@pytest.mark.parametrize("gamma", (1.0, 1e-6, 0.0, None))
def test_values_and_gradients_follow_the_naive_ones(gamma, norm, dtype):
    for rows, bias, options in ((0, True, {}), (1, True, {}), (65, False, {}), (7, True, {"drop_path": False})):
        leaves = leaves_of(rows, 64, 96, norm, gamma, bias)
        contract.check_against_naive(op(rows, **options), plain(rows, norm, **options), leaves, dtype)


@NORM
def test_many_rows_follow_the_naive_ones_in_every_sample(norm):
    parts = [torch.nonzero(sample_of(MANY_ROWS) == s).flatten() for s in range(5)]
    for gamma in (1.0, 1e-6):
        for dtype in CONTRACT_DTYPES:
            leaves = leaves_of(MANY_ROWS, 64, 64, norm, gamma)
            slices = {name: parts for name in ("x", "z", "out0", "out1")}
            contract.check_against_naive(op(MANY_ROWS), plain(MANY_ROWS, norm), leaves, dtype, slices)


@NORM
def test_the_stream_and_gamma_may_be_float32(norm):
    leaves = leaves_of(65, 64, 64, norm)
    dtypes = {name: HALF if name in ("z", "weight", "bias") else torch.float32 for name in leaves}
    for drop_path in (False, True):
        contract.check_against_naive(op(65, drop_path), plain(65, norm, drop_path=drop_path), leaves, dtypes)


@pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
@NORM
def test_a_row_index_adds_the_branch_to_these_rows(norm, dtype):
    for gamma in (1.0, None):
        leaves = leaves_of(9, 64, 48, norm, gamma, branch_rows=4)
        leaves["z"][3:] = 0.0  # what no row of the stream gets has no gradient, however large
        contract.check_against_naive(op(9, **INDEXED), plain_of_some(norm), leaves, dtype)


def plain_of_some(norm):
    """The naive code takes the rows of the index alone."""

    def call(x, z, **rest):
        return plain(9, norm, index=INDEXED["index"][:3])(x, z[:3], **rest)

    return call


def test_the_gradient_of_rows_that_an_index_leaves_out_is_not_read_for_a_parameter():
    call, leaves = op(7, index=[5, 0, 6]), on_device(leaves_of(7, 64, 64, LAYER_NORM, branch_rows=3), CHECKED)
    given = [normal(7, 64, seed=seed, dtype=CHECKED).to(DEVICE) for seed in (8, 9)]
    expected = contract.run(call, leaves, given)[1]
    given[0][[1, 2, 3, 4]] = torch.nan
    actual = contract.run(call, leaves, given)[1]
    for name in ("z", "weight", "bias", "gamma"):
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("which", (0, 1))
def test_an_output_without_a_gradient_counts_as_zero(which):
    def pick(function):
        return lambda **mine: function(**mine)[which]

    leaves = leaves_of(7, 64, 64, LAYER_NORM)
    for options in ({}, {"drop_path": False}):
        mine, theirs = op(7, **options), plain(7, LAYER_NORM, **options)
        contract.check_against_naive(pick(mine), pick(theirs), leaves, CHECKED)


@NORM
def test_strides_of_inputs_and_gradients_do_not_matter(norm):
    for options in first(({}, {"drop_path": False}, {"index": [5, 0, 6]})):
        leaves = leaves_of(7, 9, 12, norm, branch_rows=3 if "index" in options else None)
        leaves = on_device(leaves, CHECKED)
        contract.check_gradient_layouts(op(7, **options), leaves)
        expected = contract.run(op(7, **options), leaves)[1]
        for layout in contract.LAYOUTS:
            for name in ("x", "z", "weight", "gamma"):
                actual = contract.run(op(7, **options), {**leaves, name: layout(leaves[name])})[1]
                contract.assert_close_gradients(actual, expected, f"{layout.__name__} {name}")


@NORM
def test_each_gradient_is_there_whatever_else_is_frozen(norm):
    """Each other pass: y is kept for gamma alone, and without gamma's gradient nothing is."""
    for options in ({}, {"drop_path": False}):
        leaves = on_device(leaves_of(7, 64, 64, norm), CHECKED)
        expected = contract.run(op(7, **options), leaves)[1]
        for name in leaves:
            for frozen in ([name], [other for other in leaves if other != name]):
                actual = contract.run(op(7, **options), leaves, frozen=frozen)[1]
                assert {key for key, gradient in actual.items() if gradient is None} == set(frozen)
                kept = {key: expected[key] for key in leaves if key not in frozen}
                contract.assert_close_gradients(actual, kept, f"{frozen} frozen")


@NORM
def test_repeats_are_bitwise_equal(norm):
    for dtype in (torch.float32, HALF)[not REFERENCE_ONLY :]:
        leaves = on_device(leaves_of(17, 65, 33, norm), dtype)
        contract.check_deterministic(op(17), leaves, REPEATS)


@NORM
def test_registration_and_compiled_graphs(norm):
    for dtype, options in ((CHECKED, {}), (torch.float16, {"drop_path": False}), (CHECKED, {"index": [3, 0]})):
        branch_rows = 2 if "index" in options else None
        leaves = on_device(leaves_of(5, 8, 12, norm, branch_rows=branch_rows), dtype)
        contract.check_registration(op(5, **options), leaves, "linear_residual")
        contract.check_compiled(op(5, **options), leaves)


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(sample, **leaves):
        return linear_residual(**leaves, drop_path=DROP_PATH, sample=sample)

    cases = [(leaves_of(rows, 16, 24, LAYER_NORM), {"sample": sample_of(rows)}) for rows in (7, 12, 9)]
    contract.check_compiled_once(cases, call)


@NORM
def test_finite_differences_agree_and_a_second_derivative_is_refused(norm):
    contract.check_gradcheck(op(4), leaves_of(4, 3, 2, norm))
    contract.check_second_derivative(op(4), leaves_of(4, 3, 2, norm))


@NORM
def test_the_gradients_stay_right_where_a_product_in_the_gradient_s_dtype_would_not(norm):
    """A branch of one sign: what the sums over rows cancel is far above what they leave."""
    leaves = leaves_of(MANY_ROWS, 64, 64, norm)
    leaves["z"] += 16
    for dtype in CONTRACT_DTYPES:
        contract.check_against_naive(op(MANY_ROWS), plain(MANY_ROWS, norm), leaves, dtype)


def kept(dtype, frozen=(), gamma=1.0):
    """Shapes of the matrices that a forward pass keeps, parameters excluded."""
    leaves = {name: leaf.to(dtype) for name, leaf in leaves_of(5, 8, 12, gamma=gamma).items()}
    found = []
    with saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        mine = {name: leaf.requires_grad_(name not in frozen) for name, leaf in leaves.items()}
        op(5)(**mine)
    return sorted(tuple(tensor.shape) for tensor in found if tensor.dim() == 2 and tensor is not mine["weight"])


def test_the_layer_s_result_is_kept_only_where_no_formula_does_without_it():
    z, y = (5, 12), (5, 8)
    for dtype in first((torch.float32, torch.bfloat16), 1):
        assert kept(dtype) == [z]
        assert kept(dtype, gamma=None) == [z]
        assert kept(dtype, ["gamma"]) == [z]
        assert kept(dtype, ["weight"]) == [y]
        assert kept(dtype, ["weight", "gamma"]) == []
    assert kept(torch.float16) == [z, y][::-1]


def test_a_weight_that_is_used_twice_has_both_gradients():
    def twice(function):
        def call(x, z, **parameters):
            return function(x=function(x=x, z=z, **parameters)[1], z=z, **parameters)

        return call

    leaves = leaves_of(7, 64, 64, LAYER_NORM)
    contract.check_against_naive(twice(op(7)), twice(plain(7, LAYER_NORM)), leaves, CHECKED)


def test_bad_input_is_refused():
    x, z, weight = torch.zeros(4, 8), torch.zeros(4, 6), torch.zeros(8, 6)
    contract.refused("x", linear_residual, x.int(), z, weight)
    contract.refused("z", linear_residual, x, torch.zeros(3, 6), weight)
    contract.refused("z", linear_residual, x.half(), z, weight)
    contract.refused("weight", linear_residual, x, z, weight.t())
    contract.refused("weight", linear_residual, x, z, weight.half())
    contract.refused("weight", linear_residual, x, z, weight.to("meta"))
    contract.refused("bias", linear_residual, x, z, weight, torch.zeros(6))
    contract.refused("bias", linear_residual, x, z, weight, torch.zeros(8).half())
    contract.refused("gamma", linear_residual, x, z, weight, None, torch.ones(6))
    contract.refused("norm_weight", linear_residual, x, z, weight, None, None, torch.ones(6))
    contract.refused("eps", linear_residual, x, z, weight, None, None, torch.ones(8), eps=0.0)


def test_the_norm_is_that_of_the_op():
    leaves = {name: leaf.to(HALF) for name, leaf in leaves_of(65, 64, 64, LAYER_NORM).items()}
    out, normed = contract.run(op(65), leaves)[0]
    expected = layer_norm(out, leaves["norm_weight"], leaves["norm_bias"])
    assert normed.dtype == HALF and (normed != expected).float().mean() < 0.01


@pytest.mark.skipif(DEVICE != "cpu", reason="autocast's dtype is that of the device")
def test_products_run_in_autocast_s_dtype():
    leaves = {name: leaf.float() for name, leaf in leaves_of(7, 16, 24, LAYER_NORM).items()}
    half = {name: leaf.to(HALF if name in ("z", "weight", "bias") else leaf.dtype) for name, leaf in leaves.items()}
    with torch.autocast("cpu", dtype=HALF):
        under, gradients = contract.run(op(7), leaves)
    expected, of_half = contract.run(op(7), half)
    contract.assert_same((under, gradients), (expected, {k: g.float() for k, g in of_half.items()}), "under autocast")
