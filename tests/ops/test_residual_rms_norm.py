"""``residual_rms_norm``: what RMSNorm behind the residual changes, by the reference and by the kernels."""

import pytest
import torch
import torch.nn.functional as F
from support import contract, naive
from support.contract import normal
from support.kernels import CHECKED, CONTRACT_DTYPES, DEVICE, HALF, REPEATS, first, int32, on_device

from onepeace_fast import residual_rms_norm, rms_norm
from onepeace_fast.ops.dropout import dropout_factor

pytestmark = pytest.mark.by_kernels
EVERY_DTYPE = tuple(dict.fromkeys((torch.float64, *CONTRACT_DTYPES)))  # the reference's wherever it runs, and more
GARBAGE = 2**31 - 1  # an entry of a row index that must not be read
DROP_PATH = torch.tensor([1.25, 0.0, 1.25, 1.25, 0.0], device=DEVICE)
SEED = torch.tensor(2**40 + 12345, device=DEVICE)


def sample_of(rows):
    """Samples in runs, as packed rows have them, twice over."""
    return (torch.arange(rows, device=DEVICE) * 10 // max(rows, 1) % 5).int()


def leaves_of(rows, width, gamma=True, branch_rows=None):
    branch_rows = rows if branch_rows is None else branch_rows
    leaves = {"x": 2 * normal(rows, width, seed=1) + normal(rows, 1, seed=2), "y": normal(branch_rows, width, seed=3)}
    leaves |= {"gamma": 0.5 + normal(width, seed=4)} if gamma else {}
    return on_device(leaves | {"norm_weight": 1 + 0.5 * normal(width, seed=5)})


def op(rows, drop_path=True, dropout=0.0, index=None, extent=None, eps=1e-5):
    """The op with a row index, and with offsets whose last entry is ``extent``."""
    extra = {"drop_path": DROP_PATH, "sample": sample_of(rows)} if drop_path else {}
    extra |= {"dropout": dropout, "seed": SEED} if dropout else {}
    extra |= {} if index is None else {"row_index": int32(index)}
    extra |= {} if extent is None else {"offsets": int32([0, extent // 2, extent // 2, extent])}

    def call(x, y, gamma=None, norm_weight=None):
        return residual_rms_norm(x, y, gamma, norm_weight, eps=eps, **extra)

    return call


def plain(rows, drop_path=True, dropout=0.0, index=None, extent=None, eps=1e-5):
    """The same, written the obvious way; the random numbers are those that tests/ops/test_dropout.py proves."""

    def call(x, y, gamma=None, norm_weight=None):
        at = (list(range(rows)) if index is None else index)[:extent]
        factor = dropout_factor(SEED, x.shape, dropout)[at] if dropout else None
        out = x.clone()
        scale = DROP_PATH if drop_path else None
        out[at] = naive.residual(x[at], y[: len(at)], gamma, scale, sample_of(rows)[at], factor)
        return out, F.rms_norm(out, out.shape[1:], norm_weight.to(out.dtype), eps).to(y.dtype)

    return call


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("width", first((63, 64)))
def test_values_and_gradients_follow_the_naive_ones(width, dtype):
    for rows in (0, 1, 65):
        contract.check_against_naive(op(rows), plain(rows), leaves_of(rows, width), dtype)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("dropout", first((0.4, 0.0)))
def test_every_combination_of_options_follows_the_naive_one(dropout, dtype):
    places = ({}, {"index": [11, 0, 5, GARBAGE, GARBAGE], "extent": 3}, {"extent": 7}, {"extent": 0})
    for place in places:
        for drop_path, gamma in ((True, False), (False, True)):
            options = {"drop_path": drop_path, "dropout": dropout, "eps": 0.1, **place}
            leaves = leaves_of(12, 16, gamma, branch_rows=5 if "index" in place else None)
            contract.check_against_naive(op(12, **options), plain(12, **options), leaves, dtype)


def test_rows_in_parts_follow_the_naive_ones():
    options = {"index": [5, 0, 6], "dropout": 0.4}
    contract.check_against_naive(
        op(7, **options), plain(7, **options), leaves_of(7, 4096, branch_rows=3), torch.float32
    )  # fmt: skip


def test_the_stream_may_be_float32_and_the_norm_is_that_of_the_stream_as_it_is_stored():
    leaves = leaves_of(65, 64)
    dtypes = {name: HALF if name == "y" else torch.float32 for name in leaves}
    contract.check_against_naive(op(65), plain(65), leaves, dtypes)
    for given in (dtypes, dict.fromkeys(dtypes, HALF)):
        out, normed = op(65)(**{name: leaf.to(given[name]) for name, leaf in leaves.items()})
        assert (out.dtype, normed.dtype) == (given["x"], HALF)
        expected = rms_norm(out, leaves["norm_weight"].to(given["norm_weight"])).to(HALF)
        assert (normed != expected).float().mean() < 0.01  # not before it is rounded


@pytest.mark.parametrize("which", (0, 1))
def test_an_output_without_a_gradient_counts_as_zero(which):
    def pick(function):
        return lambda **mine: function(**mine)[which]

    for options in ({}, {"index": [5, 0, 6]}):
        leaves = leaves_of(7, 64, branch_rows=3 if options else None)
        contract.check_against_naive(pick(op(7, **options)), pick(plain(7, **options)), leaves, CHECKED)


def test_finite_differences_agree():
    contract.check_gradcheck(op(4, dropout=0.3), leaves_of(4, 3))
    contract.check_gradcheck(op(5, index=[4, 0, GARBAGE], extent=2), leaves_of(5, 3, branch_rows=3))


def test_registration_and_compiled_graphs():
    for options in ({"dropout": 0.3}, {"index": [3, 0, GARBAGE], "extent": 2}):
        leaves = on_device(leaves_of(5, 8, branch_rows=3 if "index" in options else None), CHECKED)
        contract.check_registration(op(5, **options), leaves, "residual")
        contract.check_compiled(op(5, **options), leaves)


def test_strides_of_inputs_and_gradients_do_not_matter():
    leaves = on_device(leaves_of(7, 9), CHECKED)
    contract.check_input_layouts(op(7, dropout=0.3), leaves, ["x", "y"])
    contract.check_gradient_layouts(op(7, dropout=0.3), leaves)


def test_nan_stays_in_its_row():
    leaves = on_device(leaves_of(12, 64), CHECKED)
    expected, others = contract.run(op(12), leaves), torch.arange(12) != 4
    leaves["x"][4] = torch.nan
    actual = contract.run(op(12), leaves)
    for a, b in (*zip(actual[0], expected[0], strict=True), *((actual[1][key], expected[1][key]) for key in "xy")):
        assert torch.equal(a[others], b[others])


def test_frozen_parameters_get_no_gradient_and_no_rows_give_zeros():
    contract.check_frozen(op(7), on_device(leaves_of(7, 9), CHECKED))
    gradients = contract.run(op(0), on_device(leaves_of(0, 9), CHECKED))[1]
    assert not gradients["gamma"].any() and not gradients["norm_weight"].any()


def test_second_derivative_is_refused():
    contract.check_second_derivative(op(5), leaves_of(5, 8))


def test_repeats_are_bitwise_equal():
    contract.check_deterministic(op(17, dropout=0.3), on_device(leaves_of(17, 65), HALF), REPEATS)


def test_bad_input_is_refused():
    x = torch.zeros(4, 8)
    contract.refused("y", residual_rms_norm, x, torch.zeros(4, 7), None, torch.ones(8))
    contract.refused("norm_weight", residual_rms_norm, x, x, None, torch.ones(7))
    contract.refused("norm_weight", residual_rms_norm, x, x, None, None)
    contract.refused("eps", residual_rms_norm, x, x, None, torch.ones(8), eps=0.0)
