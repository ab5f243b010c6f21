"""The residual kernels, alone and with LayerNorm: every option against the naive one, hostile layouts, repeats."""

import pytest
import torch
import torch.nn.functional as F
from support import contract, naive
from support.contract import normal
from support.kernels import (
    DEVICE,
    DTYPES,
    MANY_ROWS,
    REPEATS,
    WIDTHS,
    far_apart,
    first,
    int32,
    interpreter_only,
    on_device,
)

from onepeace_fast import layer_norm, residual, residual_layer_norm
from onepeace_fast.kernels.launch_heuristic import Parameters
from onepeace_fast.kernels.launch_parameters import use_launch_parameters
from onepeace_fast.ops.dropout import dropout_factor

GARBAGE = 2**31 - 1  # an entry of a row index that must not be read
DROP_PATH = torch.tensor([1.25, 0.0, 1.25, 1.25, 0.0], device=DEVICE)
SEED = torch.tensor(2**40 + 12345, device=DEVICE)
NORM = pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))


def sample_of(rows):
    """Samples in runs, as packed rows have them, twice over."""
    return (torch.arange(rows, device=DEVICE) * 10 // max(rows, 1) % 5).int()


def leaves_of(rows, width, norm=False, gamma=True, bias=True, branch_rows=None):
    branch_rows = rows if branch_rows is None else branch_rows
    leaves = {"x": 2 * normal(rows, width, seed=1) + normal(rows, 1, seed=2)}
    leaves |= {"y": 3 * normal(branch_rows, width, seed=3)}
    leaves |= {"gamma": 0.5 + normal(width, seed=4)} if gamma else {}
    leaves |= {"norm_weight": 1 + 0.5 * normal(width, seed=5)} if norm else {}
    return on_device(leaves | ({"norm_bias": normal(width, seed=6)} if norm and bias else {}))


def op(rows, drop_path=True, dropout=0.0, index=None, extent=None, eps=1e-5):
    """The op with a row index, and with offsets whose last entry is ``extent``."""
    extra = {"drop_path": DROP_PATH, "sample": sample_of(rows)} if drop_path else {}
    extra |= {"dropout": dropout, "seed": SEED} if dropout else {}
    extra |= {} if index is None else {"row_index": int32(index)}
    extra |= {} if extent is None else {"offsets": int32([0, extent // 2, extent // 2, extent])}

    def call(x, y, gamma=None, norm_weight=None, norm_bias=None):
        if norm_weight is None:
            return residual(x, y, gamma, **extra)
        return residual_layer_norm(x, y, gamma, norm_weight, norm_bias, eps=eps, **extra)

    return call


def plain(rows, drop_path=True, dropout=0.0, index=None, extent=None, eps=1e-5):
    """The same, written the obvious way; the random numbers are those that tests/ops/test_dropout.py proves."""

    def call(x, y, gamma=None, norm_weight=None, norm_bias=None):
        places = list(range(rows)) if index is None else index
        places = places if extent is None else places[:extent]
        factor = dropout_factor(SEED, x.shape, dropout)[places] if dropout else None
        sample = sample_of(rows)[places]
        added = naive.residual(x[places], y[: len(places)], gamma, DROP_PATH if drop_path else None, sample, factor)
        out = x.clone()
        out[places] = added
        if norm_weight is None:
            return out
        weight, bias = (None if p is None else p.to(out.dtype) for p in (norm_weight, norm_bias))
        return out, F.layer_norm(out, out.shape[1:], weight, bias, eps).to(y.dtype)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NORM
@pytest.mark.parametrize("width", WIDTHS[1:2] if DEVICE == "cuda" else (1, *WIDTHS[:-1]))
def test_values_and_gradients_follow_the_naive_ones(width, norm, dtype):
    for rows in (0, 1, 7):
        leaves = leaves_of(rows, width, norm and width > 1)
        contract.check_against_naive(op(rows), plain(rows), leaves, dtype)


@NORM
def test_many_rows_follow_the_naive_ones_in_every_sample(norm):
    width = 1536 if DEVICE == "cuda" else 64
    parts = [torch.nonzero(sample_of(MANY_ROWS) == s).flatten() for s in range(5)]
    slices = {name: parts for name in ("x", "y", "out0", "out1")}
    for dtype in DTYPES:
        contract.check_against_naive(op(MANY_ROWS), plain(MANY_ROWS), leaves_of(MANY_ROWS, width, norm), dtype, slices)


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NORM
def test_every_combination_of_options_follows_the_naive_one(norm, dtype):
    rows, width = 7, 16
    for gamma in (False, True):
        for drop_path in (False, True):
            for dropout in (0.0, 0.4):
                options = {"drop_path": drop_path, "dropout": dropout, "eps": 0.1}
                leaves = leaves_of(rows, width, norm, gamma, bias=gamma)
                contract.check_against_naive(op(rows, **options), plain(rows, **options), leaves, dtype)


@NORM
def test_the_stream_may_be_float32_over_a_half_precision_branch(norm):
    for half in DTYPES[-1:]:
        leaves = leaves_of(65, 64, norm)
        dtypes = {name: half if name == "y" else torch.float32 for name in leaves}
        contract.check_against_naive(op(65), plain(65), leaves, dtypes)
        outputs = contract.run(op(65), {name: leaf.to(dtypes[name]) for name, leaf in leaves.items()})[0]
        assert [output.dtype for output in outputs] == [torch.float32, half][: len(outputs)]


def test_the_norm_is_that_of_the_stream_as_it_is_stored():
    leaves = on_device(leaves_of(30, 64, True), DTYPES[-1])
    out, normed = op(30)(**leaves)
    expected = layer_norm(out, leaves["norm_weight"], leaves["norm_bias"])
    assert (normed != expected).float().mean() < 0.01  # not before it is rounded


@NORM
def test_rows_in_parts_take_a_row_index_and_dropout(norm):
    options, entry = {"index": [5, 0, 6], "dropout": 0.4}, "residual_layer_norm" if norm else "residual"
    in_parts = Parameters(4096, 1, 8, 1, parts=2)  # the heuristic holds these rows whole
    with use_launch_parameters(entry, in_parts), use_launch_parameters(f"{entry}_backward", in_parts):
        leaves = leaves_of(7, 3000, norm, branch_rows=3)
        contract.check_against_naive(op(7, **options), plain(7, **options), leaves, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NORM
@pytest.mark.parametrize("extent", first((4, None, 0), 2))
@pytest.mark.parametrize("dropout", first((0.4, 0.0)))
def test_a_row_index_adds_the_branch_to_these_rows(dropout, extent, norm, dtype):
    index = [11, 0, 5, 4, 9, 2, 12]
    index = [GARBAGE if i >= (7 if extent is None else extent) else entry for i, entry in enumerate(index)]
    options = {"index": index, "extent": extent, "dropout": dropout}
    for width in first((63, 64)):
        leaves = leaves_of(13, width, norm, branch_rows=7)
        contract.check_against_naive(op(13, **options), plain(13, **options), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NORM
@pytest.mark.parametrize("extent", (0, 5, 7))
def test_rows_past_the_extent_are_x(extent, norm, dtype):
    leaves = leaves_of(7, 64, norm)
    contract.check_against_naive(op(7, extent=extent), plain(7, extent=extent), leaves, dtype)


@NORM
def test_skipped_rows_are_x_and_the_others_have_the_bits_of_the_whole(norm):
    rows = 30
    dropped = DROP_PATH[sample_of(rows).long()] == 0
    index = torch.nonzero(~dropped).flatten().tolist()
    assert 0 < len(index) < rows
    for dtype in DTYPES:
        for dropout in first((0.3, 0.0)):
            leaves = on_device(leaves_of(rows, 64, norm), dtype)
            leaves["x"][3] = -0.0
            given = [normal(rows, 64, seed=8 + i, dtype=dtype).to(DEVICE) for i in range(1 + norm)]
            whole, every = contract.run(op(rows, dropout=dropout), leaves, given)
            some_leaves = {**leaves, "y": leaves["y"][index]}
            part, some = contract.run(op(rows, dropout=dropout, index=index), some_leaves, given)
            for a, b in zip(part, whole, strict=True):
                assert torch.equal(a, b)
            assert torch.equal(some["x"], every["x"]) and torch.equal(some["y"], every["y"][index])
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(part[0][dropped].view(bits), leaves["x"][dropped].view(bits))


@pytest.mark.parametrize("which", (0, 1))
def test_an_output_without_a_gradient_counts_as_zero(which):
    for options in ({}, {"index": [5, 0, 6]}):

        def pick(function):
            return lambda **mine: function(**mine)[which]

        leaves = leaves_of(7, 64, True, branch_rows=3 if options else None)
        contract.check_against_naive(pick(op(7, **options)), pick(plain(7, **options)), leaves, torch.float32)


@NORM
def test_strides_of_inputs_and_gradients_do_not_matter(norm):
    for options in first(({"dropout": 0.3}, {"drop_path": False}, {"index": [5, 0, 6]})):
        leaves = leaves_of(7, 9, norm, branch_rows=3 if "index" in options else None)
        leaves = on_device(leaves, torch.float32)
        contract.check_input_layouts(op(7, **options), leaves, ["x", "y", "gamma"])
        contract.check_gradient_layouts(op(7, **options), leaves)


@NORM
def test_nan_stays_in_its_row(norm):
    leaves = on_device(leaves_of(12, 64, norm), torch.float32)
    given = [normal(12, 64, seed=8 + i, dtype=torch.float32).to(DEVICE) for i in range(1 + norm)]
    options = {"extent": 9}
    expected = contract.run(op(12, **options), leaves, given)
    assert not expected[1]["y"][9:].any()
    leaves["y"][9:] = torch.nan  # rows that are not read
    contract.assert_same(contract.run(op(12, **options), leaves, given), expected, "NaN in inert rows")
    if not norm:  # the norm is over all rows of the stream
        given[0][9:] = torch.nan
        assert torch.equal(contract.run(op(12, **options), leaves, given)[1]["gamma"], expected[1]["gamma"])
    others = torch.arange(12) != 4
    for name in ("x", "y"):
        poisoned = {**leaves, name: leaves[name].clone()}
        poisoned[name][4] = torch.nan
        actual = contract.run(op(12, **options), poisoned, given)
        for a, b in zip(actual[0], expected[0], strict=True):
            assert torch.equal(a[others], b[others])
        for key in ("x", "y"):
            assert torch.equal(actual[1][key][:9][others[:9]], expected[1][key][:9][others[:9]])


def test_the_gradient_of_rows_that_an_index_leaves_out_is_not_read_for_gamma():
    index = [5, 0, 6]
    leaves = on_device(leaves_of(7, 64, True, branch_rows=3), torch.float32)
    given = [normal(7, 64, seed=seed, dtype=torch.float32).to(DEVICE) for seed in (8, 9)]
    expected = contract.run(op(7, index=index), leaves, given)[1]
    given[0][[1, 2, 3, 4]] = torch.nan
    actual = contract.run(op(7, index=index), leaves, given)[1]
    assert torch.equal(actual["gamma"], expected["gamma"]) and torch.equal(actual["y"], expected["y"])


def test_offsets_are_read_on_the_device():
    x, y, offsets = torch.zeros(12, 64, device=DEVICE), torch.ones(12, 64, device=DEVICE), int32([0, 5])
    assert residual(x, y, offsets=offsets).sum() == 5 * 64
    offsets.copy_(int32([0, 9]))
    assert residual(x, y, offsets=offsets).sum() == 9 * 64


def test_elements_past_2_to_the_31st_are_reached(tmp_path):
    rows = normal(3, 64, seed=1, dtype=torch.float16).to(DEVICE)
    y = far_apart(normal(3, 64, seed=2, dtype=torch.float16).to(DEVICE), tmp_path)
    assert torch.equal(residual(rows, y), residual(rows, y.contiguous()))
    assert torch.equal(residual(y, rows), residual(y.contiguous(), rows))


def test_dropout_s_random_numbers_are_those_of_the_reference():
    rows, width, seeds = 5, 70, (0, -1, 2**63 - 1, 2**32)
    for seed in (torch.tensor(value, device=DEVICE) for value in seeds):
        out = residual(torch.zeros(rows, width, device=DEVICE), torch.ones(rows, width, device=DEVICE),
                       dropout=0.3, seed=seed)  # fmt: skip
        torch.testing.assert_close(out, dropout_factor(seed, out.shape, 0.3), rtol=1e-6, atol=0)


@NORM
def test_frozen_parameters_get_no_gradient_and_no_rows_give_zeros(norm):
    contract.check_frozen(op(7), on_device(leaves_of(7, 9, norm), torch.float32))
    gradients = contract.run(op(0), on_device(leaves_of(0, 9, norm), torch.float32))[1]
    for name in ("gamma", "norm_weight", "norm_bias")[: 3 if norm else 1]:
        assert torch.equal(gradients[name], torch.zeros_like(gradients[name]))


def test_repeats_are_bitwise_equal():
    leaves = on_device(leaves_of(17, 65, True), DTYPES[-1])
    contract.check_deterministic(op(17, dropout=0.3), leaves, REPEATS)
    leaves = on_device(leaves_of(17, 65, branch_rows=12), DTYPES[-1])
    contract.check_deterministic(op(17, index=[*range(16, 4, -1)]), leaves, REPEATS)


@NORM
def test_registration_and_compiled_graphs(norm):
    for options in ({"dropout": 0.3}, {"index": [3, 0, GARBAGE], "extent": 2}):
        leaves = on_device(leaves_of(5, 8, norm, branch_rows=3 if "index" in options else None), torch.float32)
        contract.check_registration(op(5, **options), leaves, "residual")
        contract.check_compiled(op(5, **options), leaves)
