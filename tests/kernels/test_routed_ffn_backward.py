"""The backward pass of ``routed_ffn`` by grouped products: every gradient against the naive network, frozen ones too.

What forward and backward share, options and layouts, stands in ``test_routed_ffn.py``.
"""

import pytest
import torch
from support import contract
from support.contract import normal
from support.ffn_cases import ALL, leaves_of, op, plain, slices_of
from support.kernels import (
    DEVICE,
    DTYPES,
    HALF,
    PRODUCT_DTYPE,
    far_apart,
    int32,
    interpreter_only,
    on_device,
    product_size,
)
from support.tiles import small_tiles

from onepeace_fast.kernels.launch import launched

COUNTS = [5, 0, 40]
GROUPED = {"strategy": "grouped"}


@pytest.fixture(autouse=True)
def tiles():
    with small_tiles():
        yield


def check(counts, dtype, width, hidden, options=ALL, inert=0, leaves=None, **where):
    leaves = leaves or leaves_of(counts, width, hidden, options, inert)
    contract.check_against_naive(
        op(counts, options, inert=inert, **where, **GROUPED), plain(counts, options, inert=inert, **where),
        on_device(leaves), dtype, slices_of(counts),
    )  # fmt: skip


def backward_launches(leaves, counts, frozen=()):
    """How many kernels a backward pass launches."""
    mine = {name: leaf.detach().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    out = op(counts, **GROUPED)(**mine)
    before = launched()
    out.backward(torch.ones_like(out))
    return launched() - before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_wider_than_a_block_of_columns_follow_the_naive_ones(dtype):
    hidden = product_size(264, 72)[1]
    check([33, 0, 3], dtype, 264, hidden, inert=1)  # three blocks of the pass over rows, the last of 8 columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_tiles_of_rows_follow_the_naive_ones(dtype):
    check([1030, 1, 90], dtype, *product_size(8, 16))  # more tiles than a sum takes at a time, in several modalities


@pytest.mark.parametrize("factor", (0.0, 1.25))
def test_samples_may_all_be_dropped_or_all_be_kept(factor):
    check(COUNTS, PRODUCT_DTYPE, *product_size(32, 72), drop_path=torch.full((3,), factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", (4, 16))
def test_gradients_keep_the_rule_where_the_mean_of_h_is_far_above_its_deviation(ratio, dtype):
    counts, options = [60], frozenset({"bias", "norm"})
    leaves = leaves_of(counts, *product_size(64, 256), options)
    leaves["z"][:, 0] = 1  # so that u = 1, and v has a mean of ratio times its deviation, about 1.5
    leaves["w0_0"] = 0.02 * leaves["w0_0"]
    leaves["w0_0"][:, 0] = 1
    leaves["w1_0"][:, 0] = 1.5 * ratio
    check(counts, dtype, 64, 256, options, leaves=leaves)


def test_each_gradient_alone_has_the_bits_that_it_has_among_the_others():
    counts = [5, 0, 7]
    leaves = on_device(leaves_of(counts, *product_size(16, 24), inert=1), PRODUCT_DTYPE)
    expected = contract.run(op(counts, inert=1, **GROUPED), leaves)[1]
    for name in ("z", "w0_0", "w1_2", "w2_0", "w2_1", "b2_0", "norm_weight_2", "norm_bias_0", "gamma"):
        frozen = [other for other in leaves if other != name]
        actual = contract.run(op(counts, inert=1, **GROUPED), leaves, frozen=frozen)[1]
        contract.assert_same_gradients(actual, {**dict.fromkeys(frozen), name: expected[name]}, f"{name} alone")


def test_as_many_launches_for_any_number_of_modalities_and_fewer_for_what_is_frozen():
    found = set()
    for counts in ([45], COUNTS, [3, 0, 1, 20, 0, 20, 1])[DEVICE == "cuda" :]:
        found.add(backward_launches(on_device(leaves_of(counts, *product_size(16, 24)), PRODUCT_DTYPE), counts))
    assert found == {7}  # rows, their sums; dh; dW2, its sums; dW0 and dW1; dz
    leaves = on_device(leaves_of(COUNTS, *product_size(16, 24)), PRODUCT_DTYPE)
    experts = [name for name in leaves if name not in ("z", "residual", "gamma")]
    assert backward_launches(leaves, COUNTS, experts) == 4  # rows, the sum for gamma; dh; dz
    assert backward_launches(leaves, COUNTS, [*experts, "gamma"]) == 3


@pytest.mark.slow
@interpreter_only
def test_sixty_four_modalities_follow_the_naive_ones():
    check([5 * (m % 3) for m in range(64)], PRODUCT_DTYPE, 8, 16)


def test_norms_of_different_dtypes_get_gradients_of_their_own():
    counts = [5, 0, 7]
    leaves = on_device(leaves_of(counts, *product_size(16, 24)), HALF)
    wide = {name: leaf.float() if name.endswith("_2") and "norm" in name else leaf for name, leaf in leaves.items()}
    expected = contract.run(op(counts, **GROUPED), leaves)[1]
    actual = contract.run(op(counts, **GROUPED), wide)[1]
    for name, gradient in expected.items():
        assert torch.equal(actual[name].to(HALF), gradient), name


def test_the_gradient_s_rows_may_lie_past_2_to_the_31_elements(tmp_path):
    width, hidden = product_size(8, 16)
    leaves = on_device(leaves_of([2, 1], width, hidden), HALF)
    given = [normal(3, width, seed=9, dtype=HALF).to(DEVICE)]
    expected = contract.run(op([2, 1], **GROUPED), leaves, given)
    actual = contract.run(op([2, 1], **GROUPED), leaves, [far_apart(given[0], tmp_path)])
    contract.assert_same(actual, expected, "gradient far apart")


def test_rows_of_the_stream_that_the_index_leaves_out_give_nothing():
    counts, stream_rows = [9, 0, 24], 50
    order = torch.randperm(stream_rows, generator=torch.Generator().manual_seed(1))
    where = {"row_index": int32(order[: sum(counts)].tolist())}
    width, hidden = product_size(16, 24)
    leaves = leaves_of(counts, width, hidden)
    leaves["residual"] = 2 * normal(stream_rows, width, seed=2)
    leaves = on_device(leaves, PRODUCT_DTYPE)
    given = [normal(stream_rows, width, seed=9).to(DEVICE)]
    expected = contract.run(op(counts, **where, **GROUPED), leaves, given)[1]
    given[0][order[sum(counts) :]] = torch.nan
    actual = contract.run(op(counts, **where, **GROUPED), leaves, given)[1]
    del actual["residual"], expected["residual"]
    contract.assert_same_gradients(actual, expected, "NaN in rows that are left out")
