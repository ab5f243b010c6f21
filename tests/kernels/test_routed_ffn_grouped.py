"""``routed_ffn`` by grouped products, against the naive network: ragged and empty modalities, every gradient.

What holds of every strategy stands in ``tests/kernels/test_routed_ffn.py``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import test_ffn_memory as memory
from support import contract
from support.ffn_cases import (
    ALL,
    NO_GATE,
    check_each_gradient_alone,
    check_norms_of_different_dtypes,
    leaves_far_from_zero,
    leaves_of,
    op,
    plain,
    slices_of,
)
from support.kernels import (
    DEVICE,
    DTYPES,
    HALF,
    INTERPRETED,
    PRODUCT_DTYPE,
    far_apart,
    int32,
    interpreter_only,
    on_device,
    product_size,
)
from support.plans import ragged_offsets
from support.tiles import small_tiles

from onepeace_fast import layer_norm
from onepeace_fast.kernels import routed_ffn
from onepeace_fast.kernels.launch import launched
from onepeace_fast.tolerance import assert_within_rule, errors

WIDTH, HIDDEN = 96, 200  # neither is a multiple of a tile
COUNTS = [5, 0, 40]
MANY = [1, 0, 64, 3, 0, 33, 2]
RAGGED = ([64, 1, 63], MANY) if DEVICE == "cuda" else ([300], [65, 0], [64, 1, 63])
CASES = [(counts, PRODUCT_DTYPE) for counts in RAGGED] + ([] if DEVICE == "cuda" else [(MANY, HALF)])
GROUPED = {"strategy": "grouped"}


@pytest.fixture(autouse=True)
def tiles():
    with small_tiles():
        yield


def check(counts, dtype, options=ALL, inert=0, width=WIDTH, hidden=HIDDEN, leaves=None, where=None, **how):
    where, (width, hidden) = where or {}, product_size(width, hidden)
    leaves = on_device(leaves or leaves_of(counts, width, hidden, options, inert))
    activation = {"activation": how["activation"]} if "activation" in how else {}
    contract.check_against_naive(
        op(counts, options, inert=inert, **where, **GROUPED, **how),
        plain(counts, options, inert=inert, **where, **activation), leaves, dtype, slices_of(counts),
    )  # fmt: skip


@pytest.mark.parametrize("counts, dtype", CASES, ids=str)
def test_values_and_gradients_follow_the_naive_ones(counts, dtype):
    check(counts, dtype, inert=7)


def test_the_ffn_without_a_gate_a_norm_and_a_residual_follows_the_naive_one():
    check(COUNTS, PRODUCT_DTYPE, frozenset({NO_GATE, "bias"}), 1, 32, 72, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop_path", ([0.0, 0.0, 0.0], [1.25, 0.0, 1.25]), ids=str)
def test_rows_come_back_where_the_index_says(drop_path, dtype):
    counts, stream_rows = [17, 0, 30], 60
    order = torch.randperm(stream_rows, generator=torch.Generator().manual_seed(0))
    index = int32(order[: sum(counts) + 2].tolist())  # the last two are inert
    width, hidden = product_size(WIDTH, 72)
    leaves = leaves_of(counts, width, hidden, inert=2)
    leaves["residual"] = 2 * contract.normal(stream_rows, width, seed=2)
    where = {"drop_path": torch.tensor(drop_path), "row_index": index}
    call = op(counts, **where, **GROUPED)
    contract.check_against_naive(call, plain(counts, **where), on_device(leaves), dtype)
    rounded = on_device(leaves, dtype)
    others = order[sum(counts) :].to(DEVICE)
    assert torch.equal(call(**rounded)[others], rounded["residual"][others])


def test_interleaved_tokens_need_no_permutation_of_their_own():
    """The pre-LN reads by the index, the last product writes by it: the bits are those of packed tokens."""
    width, hidden = product_size(32, 72)
    leaves = on_device(leaves_of(COUNTS, width, hidden, ALL - {"drop_path"}), PRODUCT_DTYPE)
    norm = [contract.normal(width, seed=s).to(DEVICE, PRODUCT_DTYPE) for s in (70, 71)]
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    packed, index = leaves.pop("residual"), order.int()
    del leaves["z"]
    stream = torch.empty_like(packed)
    stream[order] = packed
    before = launched()
    with torch.no_grad():
        z = layer_norm(stream, *norm, row_index=index, offsets=ragged_offsets(COUNTS).to(DEVICE))
        out = op(COUNTS, ALL - {"drop_path"}, row_index=index, **GROUPED)(z, stream, **leaves)
    assert launched() - before == 6  # the norm, the four of the FFN, and the inverse of the index
    assert torch.equal(
        out[order], op(COUNTS, ALL - {"drop_path"}, **GROUPED)(layer_norm(packed, *norm), packed, **leaves)
    )


def test_the_branch_keeps_little_of_what_plain_pytorch_keeps():
    leaves = on_device(memory.branch_leaves(PRODUCT_DTYPE))
    kept, recomputing = (memory.saved_bytes(memory.branch(recompute=r, **GROUPED), leaves) for r in (False, True))
    assert kept <= memory.MOST * memory.saved_bytes(memory.plain, leaves)
    assert recomputing <= 0.3 * kept


def test_what_is_recomputed_has_the_bits_of_what_is_kept():
    leaves = on_device(leaves_of(COUNTS, WIDTH, HIDDEN, inert=2), HALF)
    contract.assert_same(
        contract.run(op(COUNTS, inert=2, recompute=True, **GROUPED), leaves),
        contract.run(op(COUNTS, inert=2, **GROUPED), leaves), "recompute",
    )  # fmt: skip


def test_without_gradients_the_result_is_the_same():
    leaves = on_device(leaves_of(COUNTS, *product_size(16, 72)), HALF)
    expected = contract.run(op(COUNTS, **GROUPED), leaves)[0][0]
    with torch.no_grad():
        assert torch.equal(op(COUNTS, **GROUPED)(**leaves), expected)


def test_as_many_launches_for_any_number_of_modalities():
    found = set()
    for counts in ([45], COUNTS, [3, 0, 1, 20, 0, 20, 1])[DEVICE == "cuda" :]:
        leaves = on_device(leaves_of(counts, *product_size(16, 24)), PRODUCT_DTYPE)
        before = launched()
        with torch.no_grad():
            op(counts, **GROUPED)(**leaves)
        found.add(launched() - before)
    assert found == {4}  # both products, the statistics between them, Sub-LayerNorm folded into the second


def test_strides_do_not_matter():
    leaves = on_device(leaves_of([5, 0, 7], *product_size(16, 24)), PRODUCT_DTYPE)
    expected = contract.run(op([5, 0, 7], **GROUPED), leaves)
    for layout in contract.LAYOUTS:
        moved = {name: layout(leaf) for name, leaf in leaves.items()}
        contract.assert_same(contract.run(op([5, 0, 7], **GROUPED), moved), expected, layout.__name__)
    contract.check_gradient_layouts(op([5, 0, 7], **GROUPED), leaves)


def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros():
    counts = [5, 0, 7]
    leaves = on_device(leaves_of(counts, *product_size(16, 24)), PRODUCT_DTYPE)
    outputs, gradients = contract.run(op(counts, **GROUPED), leaves)
    idle = [name for name in leaves if name.endswith("_1")]
    assert len(idle) == 6 and not any(gradients[name].any() for name in idle)
    for kind in ("z", "w0", "w1", "w2", "b2", "norm_weight", "norm_bias", "gamma", "residual"):
        frozen = [name for name in leaves if name.startswith(kind) and not name.endswith("_2")]
        left = {name: None if name in frozen else gradient for name, gradient in gradients.items()}
        contract.assert_same(contract.run(op(counts, **GROUPED), leaves, frozen=frozen), (outputs, left), kind)


@pytest.mark.parametrize("by_tile", (0.0, 0.25))
def test_the_folded_norm_keeps_the_digits_of_one_of_its_own_however_far_the_mean_is(by_tile, monkeypatch, capsys):
    """u and v are exact in half precision, so that what differs is rounded behind them."""
    counts, options, ratios = [60], frozenset({"bias", "norm"}), (0, 4, 16)
    width, hidden = product_size(64, 256)
    generator = torch.Generator().manual_seed(0)
    rms = {}
    for ratio in ratios:
        leaves = leaves_of(counts, width, hidden, options)
        leaves["z"] = torch.randint(0, 2, (60, width), generator=generator) * 2.0 - 1
        leaves["z"][:, 0] = 1  # so that u = 1, and v has a mean of ratio times what it deviates by in a tile
        leaves["w0_0"] = torch.zeros(hidden, width)
        leaves["w0_0"][:, 0] = 1
        leaves["w1_0"] = torch.randint(-1, 2, (hidden, width), generator=generator) / 4
        leaves["w1_0"][:, 0] = 1.5 * ratio * (1 + by_tile * (torch.arange(hidden) // 64 % 2 * 2 - 1))
        half = {name: leaf.to(DEVICE, HALF) for name, leaf in leaves.items()}
        v = half["z"].double() @ half["w1_0"].double().t()
        assert torch.equal(v, v.to(HALF).double())
        exact = plain(counts, options)(**{name: leaf.double() for name, leaf in half.items()})
        eager = plain(counts, options)(**half)
        scale = exact.square().mean().sqrt().item()
        for folds in (True, False):
            monkeypatch.setattr(routed_ffn, "norm_is_folded", lambda dtype, folds=folds: folds)
            out = op(counts, options, **GROUPED)(**half)
            assert_within_rule(f"ratio {ratio}, folded {folds}", out, eager, exact)
            rms[ratio, folds] = errors(out, exact)[1] / scale
        with capsys.disabled():
            both = f"folded {rms[ratio, True]:.1e}, before the product {rms[ratio, False]:.1e}"
            print(f"\n|mean| / deviation {ratio}: RMS error {both}, eager {errors(eager, exact)[1] / scale:.1e}")
    assert all(rms[ratio, True] < 1.4 * rms[ratio, False] for ratio in ratios), rms


def test_float16_stays_finite_where_the_hidden_rows_are_beyond_its_range():
    counts, options = [20], frozenset({"norm"})
    leaves = leaves_of(counts, 32, 64, options)
    for name in ("w0_0", "w1_0"):
        leaves[name] = leaves[name] * 200
    half = on_device(leaves, torch.float16)
    exact = plain(counts, options)(**{name: leaf.double() for name, leaf in half.items()})
    u, v = (half["z"].double() @ half[name].double().t() for name in ("w0_0", "w1_0"))
    assert (u * v).abs().max() > 65504 > u.abs().max()
    (out,), gradients = contract.run(op(counts, options, **GROUPED), half)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows the descriptors")
def test_no_descriptor_is_of_no_rows(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    extents, original = [], InterpreterBuilder.create_make_tensor_descriptor

    def noting(self, base, shape, *rest, **more):
        extents.extend(int(extent.data.item()) for extent in shape)
        return original(self, base, shape, *rest, **more)

    monkeypatch.setattr(InterpreterBuilder, "create_make_tensor_descriptor", noting)
    for counts in ([0, 0], [0, 3], [3, 0], [0, 0, 3], [0, 3, 0]):
        contract.run(op(counts, **GROUPED), on_device(leaves_of(counts, 8, 8), torch.float32))
        assert extents and min(extents) > 0, counts


@interpreter_only
@pytest.mark.slow
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=5, deadline=None)
def test_any_ragged_plan(counts, inert):
    check(counts, PRODUCT_DTYPE, inert=inert, width=8, hidden=24)


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
    leaves = leaves_of([33, 0, 3], 264, hidden, inert=1)
    check([33, 0, 3], dtype, inert=1, leaves=leaves)  # three blocks of the pass over rows, the last of 8 columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_tiles_of_rows_follow_the_naive_ones(dtype):
    check([1030, 1, 90], dtype, width=8, hidden=16)  # more tiles than a sum takes at a time, in several modalities


@pytest.mark.parametrize("factor", (0.0, 1.25))
def test_samples_may_all_be_dropped_or_all_be_kept(factor):
    check(COUNTS, PRODUCT_DTYPE, width=32, hidden=72, where={"drop_path": torch.full((3,), factor)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", (4, 16))
def test_gradients_keep_the_rule_where_the_mean_of_h_is_far_above_its_deviation(ratio, dtype):
    options, leaves = leaves_far_from_zero(ratio)
    check([60], dtype, options, leaves=leaves)


def test_each_gradient_alone_has_the_bits_that_it_has_among_the_others():
    check_each_gradient_alone(**GROUPED)


def test_as_many_backward_launches_for_any_number_of_modalities_and_fewer_for_what_is_frozen():
    found = set()
    for counts in ([45], COUNTS, [3, 0, 1, 20, 0, 20, 1])[DEVICE == "cuda" :]:
        found.add(backward_launches(on_device(leaves_of(counts, *product_size(16, 24)), PRODUCT_DTYPE), counts))
    assert found == {5}  # rows, their sums; dh; dz and all dW, sums for the norm
    leaves = on_device(leaves_of(COUNTS, *product_size(16, 24)), PRODUCT_DTYPE)
    experts = [name for name in leaves if name not in ("z", "residual", "gamma")]
    assert backward_launches(leaves, COUNTS, experts) == 4  # rows, the sum for gamma; dh; dz
    assert backward_launches(leaves, COUNTS, [*experts, "gamma"]) == 3


@pytest.mark.slow
@interpreter_only
def test_sixty_four_modalities_follow_the_naive_ones():
    check([5 * (m % 3) for m in range(64)], PRODUCT_DTYPE, width=8, hidden=16)


def test_norms_of_different_dtypes_get_gradients_of_their_own():
    check_norms_of_different_dtypes(**GROUPED)


def test_the_gradient_s_rows_may_lie_past_2_to_the_31_elements(tmp_path):
    width, hidden = product_size(8, 16)
    leaves = on_device(leaves_of([2, 1], width, hidden), HALF)
    given = [contract.normal(3, width, seed=9, dtype=HALF).to(DEVICE)]
    expected = contract.run(op([2, 1], **GROUPED), leaves, given)
    actual = contract.run(op([2, 1], **GROUPED), leaves, [far_apart(given[0], tmp_path)])
    contract.assert_same(actual, expected, "gradient far apart")


def test_rows_of_the_stream_that_the_index_leaves_out_give_nothing():
    counts, stream_rows = [9, 0, 24], 50
    order = torch.randperm(stream_rows, generator=torch.Generator().manual_seed(1))
    where = {"row_index": int32(order[: sum(counts)].tolist())}
    width, hidden = product_size(16, 24)
    leaves = leaves_of(counts, width, hidden)
    leaves["residual"] = 2 * contract.normal(stream_rows, width, seed=2)
    leaves = on_device(leaves, PRODUCT_DTYPE)
    given = [contract.normal(stream_rows, width, seed=9).to(DEVICE)]
    expected = contract.run(op(counts, **where, **GROUPED), leaves, given)[1]
    given[0][order[sum(counts) :]] = torch.nan
    actual = contract.run(op(counts, **where, **GROUPED), leaves, given)[1]
    del actual["residual"], expected["residual"]
    contract.assert_same_gradients(actual, expected, "NaN in rows that are left out")
