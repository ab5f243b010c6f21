"""The LayerNorm kernels against the naive norm."""

import pytest
from support import contract, naive
from support.contract import normal
from support.kernels import DEVICE, DTYPES, MANY_ROWS, WIDTHS

from onepeace_fast import layer_norm


def shared_leaves(rows, width):
    x = 3 * normal(rows, width, seed=1) + 2 * normal(rows, 1, seed=2)
    return {"x": x, "weight": 1 + 0.5 * normal(width, seed=3), "bias": normal(width, seed=4)}


def naive_shared(x, weight, bias):
    return naive.layer_norm(x, [x.shape[0]], [weight], [bias], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_shared_norm_follows_the_naive_one(width, dtype):
    for rows in (0, 1, 7, MANY_ROWS if width == 64 else 40):
        leaves = {name: leaf.to(DEVICE) for name, leaf in shared_leaves(rows, width).items()}
        contract.check_against_naive(layer_norm, naive_shared, leaves, dtype)
