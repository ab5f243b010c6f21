"""Grouped products of gradients against float64: ragged and empty modalities, neighbours full of NaN, any strides."""

from itertools import pairwise

import pytest
import torch
from support import contract
from support.contract import normal
from support.kernels import DEVICE, DTYPES, PRODUCT_DTYPE
from support.plans import ragged_offsets
from support.tiles import small_tiles

from onepeace_fast.kernels.grouped_gemm import for_descriptors
from onepeace_fast.kernels.grouped_gradients import WeightGradient, gradients
from onepeace_fast.kernels.launch import launched
from onepeace_fast.tolerance import assert_within_rule

MANY = [1, 0, 64, 3, 0, 17, 2]
COUNTS = ([0, 130, 63], MANY) if DEVICE == "cuda" else ([5], [65, 0], [0, 130, 63, 1], MANY)
WIDTH, HIDDEN = 96, 200


@pytest.fixture(autouse=True)
def tiles():
    with small_tiles():
        yield


def rows_of(counts, columns, dtype, seed, inert=0):
    return normal(sum(counts) + inert, columns, seed=seed).to(DEVICE, dtype)


def weights_of(counts, dtype, seed):
    return [normal(HIDDEN, WIDTH, seed=seed + m).to(DEVICE, dtype) for m in range(len(counts))]


def empty_weight():
    return torch.empty(HIDDEN, WIDTH, dtype=PRODUCT_DTYPE, device=DEVICE)


def input_gradient(pairs, offsets):
    """The sum of x W over one or two pairs."""
    nothing, like = (
        [None] * len(pairs[0][1]),
        torch.empty(len(pairs[0][0]), WIDTH, dtype=pairs[0][0].dtype, device=DEVICE),
    )
    return gradients([WeightGradient(x, like, nothing) for x, _ in pairs], [w for _, w in pairs], None, offsets)


def weight_gradient(xs, y, offsets, outs):
    """Store x^T y of each x."""
    assert (
        gradients([WeightGradient(x, y, mine) for x, mine in zip(xs, outs, strict=True)], None, None, offsets) is None
    )


def check_product(out, x, y):
    """x^T y by the tolerance rule."""
    assert_within_rule("product", out, x.t() @ y, x.double().t() @ y.double())


def by_modality(counts):
    return [(m, slice(*bounds)) for m, bounds in enumerate(pairwise(ragged_offsets(counts).tolist()))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_input_gradient_is_the_sum_of_both_products(counts, dtype):
    pairs = [(rows_of(counts, HIDDEN, dtype, s, inert=7), weights_of(counts, dtype, 10 * s)) for s in (1, 2)]
    for x, _ in pairs:
        x[-7:] = torch.nan
    for given in (pairs, pairs[:1]):
        out = input_gradient(given, ragged_offsets(counts).to(DEVICE))
        assert not out[-7:].any()
        for m, rows in by_modality(counts):
            plain = sum(x[rows] @ w[m] for x, w in given)
            exact = sum(x[rows].double() @ w[m].double() for x, w in given)
            assert_within_rule(f"modality {m}", out[rows], plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_weight_gradient_sums_over_the_rows_of_its_modality_alone(counts, dtype):
    x, y = rows_of(counts, HIDDEN, dtype, 1, inert=7), rows_of(counts, WIDTH, dtype, 2, inert=7)
    for m, rows in by_modality(counts):
        alone = [torch.full_like(t, torch.nan) for t in (x, y)]
        for mine, all_rows in zip(alone, (x, y), strict=True):
            mine[rows] = all_rows[rows]
        outs = [torch.full((HIDDEN, WIDTH), torch.nan, dtype=dtype, device=DEVICE) if m == g else None
                for g in range(len(counts))]  # fmt: skip
        weight_gradient([alone[0]], alone[1], ragged_offsets(counts).to(DEVICE), [outs])
        assert_within_rule(f"modality {m}", outs[m], x[rows].t() @ y[rows], x[rows].double().t() @ y[rows].double())


def test_weight_gradients_of_several_modalities_come_from_one_launch():
    counts = [3, 0, 70, 1]
    x, y = rows_of(counts, HIDDEN, PRODUCT_DTYPE, 1), rows_of(counts, WIDTH, PRODUCT_DTYPE, 2)
    needed = (0, 1, 3)
    outs = [empty_weight() if m in needed else None for m in range(4)]
    weight_gradient([x], y, ragged_offsets(counts).to(DEVICE), [outs])
    for m, rows in by_modality(counts):
        if m in needed:
            check_product(outs[m], x[rows], y[rows])


def test_weight_gradients_of_two_products_come_from_one_launch():
    counts = [3, 0, 70]
    xs, y = [rows_of(counts, HIDDEN, PRODUCT_DTYPE, s) for s in (1, 3)], rows_of(counts, WIDTH, PRODUCT_DTYPE, 2)
    outs = [[empty_weight() if m != frozen else None for m in range(3)] for frozen in (0, 2)]
    weight_gradient(xs, y, ragged_offsets(counts).to(DEVICE), outs)
    for x, mine in zip(xs, outs, strict=True):
        for m, rows in by_modality(counts):
            if mine[m] is not None:
                check_product(mine[m], x[rows], y[rows])


def test_all_gradients_of_a_feed_forward_network_come_from_one_launch():
    counts = [3, 0, 70]
    offsets = ragged_offsets(counts).to(DEVICE)
    dys, weights = (
        [rows_of(counts, HIDDEN, PRODUCT_DTYPE, s) for s in (1, 3)],
        [weights_of(counts, PRODUCT_DTYPE, s) for s in (4, 9)],
    )
    x, dy, h = (rows_of(counts, columns, PRODUCT_DTYPE, s) for s, columns in ((2, WIDTH), (5, WIDTH), (6, HIDDEN)))
    outs = [[None, empty_weight(), empty_weight()], [None, None, empty_weight()]]
    output = [torch.full((WIDTH, HIDDEN), torch.nan, dtype=PRODUCT_DTYPE, device=DEVICE) for _ in range(2)] + [None]
    before = launched()
    dx = gradients(
        [WeightGradient(left, x, mine) for left, mine in zip(dys, outs, strict=True)], weights,
        WeightGradient(dy, h, output), offsets,
    )  # fmt: skip
    assert launched() == before + 1
    assert torch.equal(dx, input_gradient(list(zip(dys, weights, strict=True)), offsets))
    pairs = [*((left, x, mine) for left, mine in zip(dys, outs, strict=True)), (dy, h, output)]
    for left, right, mine in pairs:
        for m, rows in by_modality(counts):
            if mine[m] is not None:
                check_product(mine[m], left[rows], right[rows])


def test_nothing_is_launched_where_nothing_is_needed():
    counts = [3, 5]
    before, x = launched(), rows_of(counts, WIDTH, PRODUCT_DTYPE, 1)
    layer = WeightGradient(rows_of(counts, HIDDEN, PRODUCT_DTYPE, 2), x, [None, None])
    assert gradients([layer], None, None, ragged_offsets(counts).to(DEVICE)) is None and launched() == before


def test_rows_may_lie_anyhow():
    counts = [5, 34]
    x, w, offsets = (
        rows_of(counts, HIDDEN, PRODUCT_DTYPE, 1),
        weights_of(counts, PRODUCT_DTYPE, 3),
        ragged_offsets(counts),
    )
    expected = input_gradient([(x, w)], offsets.to(DEVICE))
    for layout in contract.LAYOUTS:
        assert torch.equal(input_gradient([(layout(x), [layout(v) for v in w])], offsets.to(DEVICE)), expected)


def test_an_expanded_row_is_copied_for_a_descriptor():
    row = torch.randn(1, 16, device=DEVICE)
    rows = for_descriptors(row.expand(5, 16))
    assert rows.stride() == (16, 1) and torch.equal(rows, row.expand(5, 16))
