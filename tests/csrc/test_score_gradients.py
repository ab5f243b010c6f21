"""The gradient of vectors, sums of scores' gradients in fixed point, on a CPU under AddressSanitizer."""

import math
from functools import partial

import pytest
import torch
from support import naive
from support.attention_cases import Batch, Table, any_cls, kept_grid, lengths, mixed, text_only, windowed_grid
from support.kernel_attention import (
    WALKS,
    assert_same,
    check,
    coded,
    gradient_of,
    walks,
    wide,
)
from support.plans import naive_layout, whole_rows

CODES = {
    "equal": [5] * 20,
    "in reverse": [*range(40, 0, -1)],
    "in steps of two": [*range(0, 80, 2)],
    "runs of any length": [17, 18, 19, 3, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 7, 8, 9, 10, 60, 61, 62, 18],
    "runs and others": [
        *range(32),
        40,
        *range(33, 48),
        *range(16),
        *range(64, 80),
    ],  # the third and fourth have no place
    "runs 20 apart": [20 * block + i for block in range(4) for i in range(16)],
    "runs 5 apart": [5 * block + i for block in range(5) for i in range(16)],
    "runs in reverse": [16 * block + i for block in (3, 2, 1, 0) for i in range(16)],
    "runs that repeat": [*range(16)] * 4,
    "every pair's own": [62 * i + i * i % 31 for i in range(31)],  # Erdős and Turán's: all differences differ
}


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_any_codes(attend, codes):
    batch = coded(codes)
    check(attend, batch, wide(batch, 1, 32))


@walks
def test_samples_whose_runs_are_differently_far_apart(attend, walk):
    """One thread block has them all; what it holds for the first's differences is not the second's."""
    codes = [*range(48), *(20 * block + i for block in (3, 4, 5) for i in range(16))]
    starts = [(1, 48), (49, 40), (1, 16), (17, 25)]  # the last two are of one row block, and of two
    positions = {"text": [[0, *range(first, first + count)] for first, count in starts]}
    kept = whole_rows({"text": [count + 1 for _, count in starts]})
    layout = naive_layout(kept, positions=positions, codes={"text": [0, *codes]})
    span = max(codes)
    batch = Batch(
        layout, (Table(2 * span + 4, naive.vector_row(span, 2 * span + 4), torch.arange(2 * span + 4), span),)
    )
    check(attend, batch, wide(batch, 1, 32), **walk)


def rounding(batch, leaves, grad, sample):
    """How far the score gradients of a sample may be from adding up to zero, row by row, in one head without rounding.

    A row has n of them, p (d - r), r being the sum of p d, and d is at most ``largest``. In float32 the sum of p misses
    1 by what rounds the exponents, and n terms are rounded when they are added up. The fixed point rounds each to its
    unit, up or down: six standard deviations. Its integers have room for 2 ``largest`` of each row, blocks filled up,
    in at least 29 bits, and to be powers of two largest, head scale and the number of rows may each be doubled.
    """
    rows = batch.layout.rows_of(sample)
    q, k, v = leaves["qkv"][rows, :, 0].double().unbind(1)
    n, epsilon = len(rows), 2.0**-24
    scores = (q @ k.t()).abs().max().item() * q.shape[1] ** -0.5
    scores += max(table[:, 0].abs().max().item() for name, table in leaves.items() if name.startswith("table"))
    largest = (grad[rows, 0].double() @ v.t()).abs().max().item() * leaves["head_scale"][0].abs().item()
    unit = 2.0**-29 * 2**3 * 2 * largest * (n + 16 * (batch.layout.modalities + 1))
    return 6 * n * unit / 12**0.5 + n * 2 * largest * epsilon * (2 * n + 8 * (scores + math.log(n)) / math.log(2))


@walks
def test_the_score_gradients_of_a_row_add_up_to_zero(attend, walk):
    """Each modality has a sample of its own: of one body row or one of CLS, all score gradients are in two sums."""
    counts = [(1, 1), (1, 15), (1, 40), (60, 1), (17, 1)]
    batch = any_cls([[count if m == s else (0, 0) for s in range(len(counts))] for m, count in enumerate(counts)])
    leaves = wide(batch, 1, 32)
    gradients = check(attend, batch, leaves, **walk)
    for m, vector in enumerate(gradients.bias):
        as_query, as_key, as_both = vector[0, -3:].double()
        bound = rounding(batch, leaves, gradient_of(leaves["qkv"]), m)
        assert abs(as_query + as_both) < bound and abs(vector[0, :-3].double().sum() + as_key) < bound
        assert bound < 0.05 * vector.abs().max()


NOT_FINITE = [(name, *how) for name in ("grad", "q", "k", "v") for how in ((torch.nan, "whole"), (torch.inf, "split"))]


@pytest.mark.parametrize("name, value, walk", [*NOT_FINITE, ("grad", torch.nan, "large")])
def test_what_is_not_finite_reaches_its_sample_and_all_vectors_of_its_head_alone(attend, name, value, walk):
    batch = windowed_grid(64, "rows") if walk == "large" else mixed()
    leaves = batch.leaves(2, 32, dtype=torch.bfloat16)
    qkv, given, rows = leaves["qkv"], batch.given(leaves) | WALKS.get(walk, {}), batch.layout.rows_of(0)
    grad = gradient_of(qkv)
    (clean,) = attend(qkv, grad, **given)
    (grad if name == "grad" else qkv[:, "qkv".index(name)])[rows[3], 1, 5] = value
    (actual,) = attend(qkv, grad, **given)
    assert actual.qkv[rows, :, 1].isnan().any() and actual.head_scale[1].isnan()
    assert all(vector[1].isnan().all() for vector in actual.bias)
    for results in (actual, clean):
        results.out[rows, 1] = results.log_sum_exp[rows, 1] = results.qkv[rows, :, 1] = 0
        for gradient in (results.head_scale, *results.bias):
            gradient[1] = 0
    assert_same(actual, clean)


@pytest.mark.parametrize("head_scale", (torch.nan, torch.inf, 1e37))
def test_a_head_scale_that_makes_gradients_infinite_makes_all_vectors_of_its_head_nan(attend, head_scale):
    batch = text_only()
    leaves = wide(batch, 2, 32)
    grad = 100 * gradient_of(leaves["qkv"])
    (clean,) = attend(leaves["qkv"], grad, **batch.given(leaves))
    leaves["head_scale"][1] = head_scale
    (actual,) = attend(leaves["qkv"], grad, **batch.given(leaves))
    assert actual.bias[0][1].isnan().all() and torch.equal(actual.bias[0][0], clean.bias[0][0])


def outlier(rows):
    """One row ten thousand times larger."""
    return torch.ones(rows).index_fill(0, torch.tensor([40]), 1e4)


def growing(by):
    """Rows that grow or shrink from tile to tile."""
    return lambda rows: torch.exp2(torch.arange(rows) / by)


# A batch, its leaves, and the factors of the rows of the gradient.
FACTORS = {
    "one row larger": (lambda: lengths([70]), wide, outlier),
    "one row larger, vectors in bfloat16": (
        lambda: lengths([70]),
        partial(Batch.leaves, dtype=torch.bfloat16),
        outlier,
    ),
    "tiny": (kept_grid, wide, lambda rows: torch.full((rows,), 1e-30)),
    "huge": (kept_grid, wide, lambda rows: torch.full((rows,), 1e30)),
    "growing": (lambda: lengths([130]), wide, growing(8)),
    "shrinking": (lambda: lengths([130]), wide, growing(-8)),
    "growing, large": (lambda: windowed_grid(64, "corners"), wide, growing(8)),
    "shrinking, large": (lambda: windowed_grid(64, "corners"), wide, growing(-8)),
}


@walks
@pytest.mark.parametrize("name", FACTORS)
def test_gradients_of_any_size(attend, name, walk):
    make, leaves, factors = FACTORS[name]
    batch = make()
    leaves = leaves(batch, heads=1, dim=32)
    grad = gradient_of(leaves["qkv"]) * factors(len(leaves["qkv"])).bfloat16()[:, None, None]
    results = check(attend, batch, leaves, grad, **walk)
    assert results.bias[0].count_nonzero() > 20


@pytest.mark.parametrize("size", (0, 1e-6))
def test_keys_whose_values_are_nothing_beside_those_of_another_part(attend, size):
    """Their score gradients are the mean, which only the other keys have made large."""
    batch = lengths([150])
    leaves = wide(batch, 1, 128)
    leaves["qkv"][:80, 2] *= size
    for walk in WALKS.values():
        check(attend, batch, leaves, **walk)


@walks
@pytest.mark.parametrize("order", ("alternating", "half"))
def test_an_entry_that_half_of_all_pairs_add_to_with_one_sign_does_not_overflow(attend, order, walk):
    """All pairs of equal codes have the largest score gradient there can be, all others its negative."""
    count = 224  # with CLS 15 blocks: as little room below a power of two as there is
    codes = [0, 1] * (count // 2) if order == "alternating" else [0] * (count // 2) + [1] * (count // 2)
    batch = coded(codes)
    leaves = wide(batch, 1, 32)
    sign = torch.tensor([*(2 * code - 1 for code in codes), 0]).bfloat16()
    almost_one = 1 - 2.0**-8
    leaves["head_scale"].fill_(almost_one)
    leaves["qkv"].zero_()
    leaves["table0"].zero_()
    leaves["qkv"][:, 2, 0, 0] = sign * almost_one
    grad = torch.zeros_like(leaves["qkv"][:, 0])
    grad[:, 0, 0] = sign
    gradients = check(attend, batch, leaves, grad, **walk)
    expected = almost_one**2 * count / 2 * count / (count + 1)
    assert abs(gradients.bias[0][0, 1].item() - expected) < 1e-5 * expected
