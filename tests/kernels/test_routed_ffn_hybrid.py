"""``routed_ffn`` by vendor products and one of our own, that of the hidden gradient: what is special to it.

What holds of every strategy stands in ``tests/kernels/test_routed_ffn.py``.
"""

import pytest
import torch
from support import contract
from support.ffn_cases import (
    ALL,
    check_each_gradient_alone,
    check_norms_of_different_dtypes,
    leaves_far_from_zero,
    leaves_of,
    op,
    plain,
    slices_of,
)
from support.kernels import DEVICE, HALF, PRODUCT_DTYPE, int32, on_device, product_size
from support.tiles import small_tiles

from onepeace_fast.kernels.launch import recording

COUNTS = [5, 0, 40]
HYBRID = {"strategy": "hybrid"}


@pytest.fixture(autouse=True)
def tiles():
    with small_tiles():
        yield


def check(counts, options=ALL, width=32, hidden=72, leaves=None, **where):
    leaves = on_device(leaves or leaves_of(counts, *product_size(width, hidden), options))
    contract.check_against_naive(
        op(counts, options, **where, **HYBRID), plain(counts, options, **where), leaves, PRODUCT_DTYPE,
        {} if where else slices_of(counts),
    )  # fmt: skip


MANY_TILES = pytest.param([1030, 1, 90], marks=pytest.mark.slow)  # more than a sum takes at a time


@pytest.mark.parametrize("counts", (MANY_TILES, [1, 0, 64, 3, 0, 33, 2]), ids=str)
def test_norm_gradients_of_many_tiles_and_modalities_follow_the_naive_ones(counts):
    check(counts, width=8, hidden=16)


def test_rows_come_back_where_the_index_says():
    counts, stream_rows = [17, 0, 30], 60
    order = torch.randperm(stream_rows, generator=torch.Generator().manual_seed(0))
    width, hidden = product_size(32, 72)
    leaves = leaves_of(counts, width, hidden)
    leaves["residual"] = 2 * contract.normal(stream_rows, width, seed=2)
    check(counts, leaves=leaves, row_index=int32(order[: sum(counts)].tolist()))


@pytest.mark.parametrize("ratio", (4, 16))
def test_gradients_keep_the_rule_where_the_mean_of_h_is_far_above_its_deviation(ratio):
    options, leaves = leaves_far_from_zero(ratio)
    check([60], options, leaves=leaves)


def test_what_is_recomputed_has_the_bits_of_what_is_kept():
    leaves = on_device(leaves_of(COUNTS, *product_size(32, 72), inert=2), HALF)
    contract.assert_same(
        contract.run(op(COUNTS, inert=2, recompute=True, **HYBRID), leaves),
        contract.run(op(COUNTS, inert=2, **HYBRID), leaves), "recompute",
    )  # fmt: skip


def test_strides_do_not_matter():
    leaves = on_device(leaves_of([5, 0, 7], *product_size(16, 24)), PRODUCT_DTYPE)
    expected = contract.run(op([5, 0, 7], **HYBRID), leaves)
    for layout in contract.LAYOUTS:
        moved = {name: layout(leaf) for name, leaf in leaves.items()}
        (out,), gradients = contract.run(op([5, 0, 7], **HYBRID), moved)
        torch.testing.assert_close(out, expected[0][0])  # the vendor may sum in another order
        contract.assert_close_gradients(gradients, expected[1], layout.__name__)
    contract.check_gradient_layouts(op([5, 0, 7], **HYBRID), leaves)


def test_each_gradient_alone_has_the_bits_that_it_has_among_the_others():
    check_each_gradient_alone(**HYBRID)


def backward_launches(frozen=()):
    """The kernels of a backward pass, by name, and whether the product of the hidden gradient stores hhat."""
    leaves = on_device(leaves_of(COUNTS, *product_size(16, 24)), PRODUCT_DTYPE)
    mine = {name: leaf.requires_grad_(not name.startswith(frozen)) for name, leaf in leaves.items()}
    with recording("sm_90", 132) as configurations:
        out = op(COUNTS, **HYBRID)(**mine)
        configurations.clear()
        out.backward(torch.ones_like(out))
    (product,) = [one for one in configurations if one.kernel.__name__ == "routed_ffn_hidden_gradient_kernel"]
    names = [one.kernel.__name__.removeprefix("routed_ffn_").removesuffix("_kernel") for one in configurations]
    return names, product.arguments["hhat"] is not None


@pytest.mark.skipif(DEVICE == "cuda", reason="what would be launched is the same on a CPU")
def test_what_is_frozen_costs_neither_a_launch_nor_a_store():
    rows, of_norm = ["fold", "scale_gradient"], ["norm_gradient"] * len(COUNTS)
    every = [*rows, "sum_row_tiles", "hidden_gradient", *of_norm, "sum_norm_tiles"]
    assert backward_launches() == backward_launches(("w2",)) == (every, True)
    assert backward_launches(("norm",)) == (every[:-1], True)
    one = ("w2_0", "w2_1", "norm_weight_0", "norm_weight_1", "norm_bias_0", "norm_bias_1")
    assert backward_launches(one)[0].count("norm_gradient") == 1
    assert backward_launches(("w", "norm", "b2", "gamma")) == ([*rows, "hidden_gradient"], False)


def test_norms_of_different_dtypes_get_gradients_of_their_own():
    check_norms_of_different_dtypes(**HYBRID)
