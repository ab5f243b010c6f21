"""The kernels of both passes of attention, run on a CPU under AddressSanitizer, against float64 by the tolerance rule.

Results, the workspace and the shared memory of every thread block are full of NaN before. The host shim fails launches
beyond what the device gives of shared memory, as CUDA does; the compact shape of the backward kernel is that of devices
that give 99 KiB, as 8.6, 8.9 and 12.0 do.
"""

import pytest
import torch
from support import host_shim
from support.attention_cases import (
    BATCHES,
    Batch,
    any_cls,
    kept_grid,
    lengths,
    mixed,
    runs,
    series,
    shuffled_grid,
    text_only,
    windowed_grid,
)
from support.host_shim import SHARED_LIMITS
from support.kernel_attention import (
    HEAD_SIZES,
    WALKS,
    assert_same,
    check,
    coded,
    gradient_of,
    walks,
    wide,
)
from support.plans import naive_layout, whole_rows

from onepeace_fast.tolerance import HALF

COMPACT = {"shared_limit": SHARED_LIMITS["99 KiB"]}
# A head size, and the shape of the backward kernel: of the smallest heads there is one.
SHAPES = {str(dim): (dim, {}) for dim in HEAD_SIZES} | {f"{dim} compact": (dim, COMPACT) for dim in HEAD_SIZES[1:]}
shapes = pytest.mark.parametrize("dim, limit", SHAPES.values(), ids=SHAPES)


@walks
@shapes
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients_follow_the_dense_bias(attend, name, dtype, dim, limit, walk):
    batch = BATCHES[name]()
    check(attend, batch, batch.leaves(2, dim, dtype=dtype), **walk, **limit)


@pytest.mark.parametrize("limit", SHARED_LIMITS)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_both_passes_run_with_what_each_device_gives(attend, dim, limit):
    """With vectors that the forward pass holds whole on all of them."""
    batch = windowed_grid(42, "rows")
    check(attend, batch, batch.leaves(1, dim, dtype=torch.bfloat16), shared_limit=SHARED_LIMITS[limit])


@walks
@pytest.mark.parametrize("dtype, dim", list(zip(2 * HALF[::-1], HEAD_SIZES, strict=True)), ids=str)
def test_lengths_around_the_edges_of_blocks_and_tiles(attend, dtype, dim, walk):
    batch = lengths([1, 2, 15, 16, 17, 18, 31, 32, 33, 34, 63, 64, 65, 127, 129])
    check(attend, batch, batch.leaves(1, dim, dtype=dtype), **walk)


@pytest.mark.parametrize(
    "dim, limit, counts",
    [
        (32, {}, [258]),
        (64, {}, [257, 258]),
        (96, {}, [129, 130, 3]),
        (128, {}, [129, 130, 3]),
        (64, COMPACT, [144, 145, 146, 3]),
        (96, COMPACT, [112, 113, 114, 3]),
        (128, COMPACT, [80, 81, 82, 3]),
    ],
    ids=SHAPES,
)
def test_lengths_around_what_one_thread_block_walks(attend, dim, limit, counts):
    batch = lengths(counts)
    check(attend, batch, batch.leaves(1, dim, dtype=torch.bfloat16), **limit)


@walks
@pytest.mark.parametrize("modalities", (2, 3))
def test_lengths_around_the_edges_in_several_modalities(attend, modalities, walk):
    batch = lengths([64, 1, 17, 0, 66, 16], modalities)
    check(attend, batch, batch.leaves(1, 64, dtype=torch.bfloat16), **walk)


@walks
@pytest.mark.parametrize("dim, limit", list(SHAPES.values())[1:], ids=list(SHAPES)[1:])
@pytest.mark.parametrize("batch", [lambda: kept_grid(16, 16), lambda: shuffled_grid(16)], ids=["in order", "shuffled"])
def test_a_whole_image_of_257_tokens(attend, batch, dim, limit, walk):
    batch = batch()
    check(attend, batch, batch.leaves(1, dim, dtype=torch.bfloat16), **walk, **limit)


@walks
@pytest.mark.parametrize("dtype, dim", list(zip(2 * HALF[::-1], HEAD_SIZES, strict=True)), ids=str)
def test_blocks_whose_codes_are_runs_beside_others(attend, dtype, dim, walk):
    batch = runs()
    check(attend, batch, batch.leaves(1, dim, dtype=dtype), **walk)


GRIDS = {f"{side} in order": (kept_grid, side, side) for side in (*range(3, 9), 14)}
GRIDS |= {f"{side} shuffled": (shuffled_grid, side, [1, 5]) for side in range(3, 8)}


@pytest.mark.parametrize("make, side, rest", GRIDS.values(), ids=GRIDS)
def test_grids_whose_rows_end_inside_blocks_or_are_in_random_order(attend, make, side, rest):
    batch = make(side, rest)
    check(attend, batch, batch.leaves(1, 32, dtype=torch.float16))


@walks
def test_long_samples_of_several_modalities_beside_short_ones(attend, walk):
    batch = mixed(long=True)
    check(attend, batch, batch.leaves(1, 64, dtype=torch.bfloat16), **walk)


CLS_COUNTS = {
    "none": [[(20, 0), (3, 1), (65, 0)]],
    "some": [[(5, 2), (0, 3), (1, 0)], [(16, 0), (0, 0), (9, 1)]],
    "more than a block": [[(18, 9), (2, 1)], [(40, 20), (1, 17)], [(0, 6), (3, 0)]],
    "in the last block of a walk": [[(129, 0), (80, 18), (0, 136)], [(0, 0), (20, 3), (0, 1)]],
    "in the last block of a compact walk of 64": [[(128, 9), (80, 18), (0, 131)], [(0, 0), (20, 3), (0, 1)]],
    "in the last block of a compact walk of 96": [[(96, 9), (80, 18), (0, 99)], [(0, 0), (20, 3), (0, 1)]],
    "in the last block of a compact walk of 128": [[(64, 9), (80, 18), (0, 67)], [(0, 0), (20, 3), (0, 1)]],
}


@walks
@shapes
@pytest.mark.parametrize("name", CLS_COUNTS)
def test_any_number_of_cls_tokens(attend, name, dim, limit, walk):
    batch = any_cls(CLS_COUNTS[name])
    check(attend, batch, batch.leaves(1, dim, dtype=torch.bfloat16), **walk, **limit)


@walks
@pytest.mark.parametrize("bias, head_scale", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("make", [mixed, lambda: lengths([33, 17], 2)], ids=["kept", "whole row blocks"])
def test_bias_and_head_scale_are_each_optional(attend, make, bias, head_scale, walk):
    batch = make()
    check(attend, batch, batch.leaves(2, 32, bias=bias, head_scale=head_scale, dtype=torch.float16), **walk)


@walks
def test_a_head_scale_of_zero_stops_all_gradients_but_its_own(attend, walk):
    batch = text_only()
    leaves = batch.leaves(2, 32, dtype=torch.bfloat16)
    leaves["head_scale"][0] = 0
    results = check(attend, batch, leaves, **walk)
    assert not results.qkv[:, :, 0].any() and not results.bias[0][0].any() and results.head_scale[0] != 0


@pytest.mark.parametrize("scale", (0.3, -0.2, 0.0))
@walks
def test_any_scale(attend, scale, walk):
    batch = Batch(text_only().layout, text_only().tables, scale)
    check(attend, batch, batch.leaves(2, 64, dtype=torch.bfloat16), **walk)


@walks
def test_vectors_and_head_scale_in_float32(attend, walk):
    batch = kept_grid()
    results = check(attend, batch, wide(batch, 2, 32), **walk)
    assert results.bias[0].dtype == results.head_scale.dtype == torch.float32


@walks
@pytest.mark.parametrize("dim, limit", list(SHAPES.values()), ids=SHAPES)
@pytest.mark.parametrize("where", ("rows", "corners", "anywhere"))
def test_vectors_that_shared_memory_does_not_hold_are_read_in_windows(attend, where, dim, limit, walk):
    """A grid of 120 has 57,121 entries; patches far apart meet more of them than a window has."""
    batch = windowed_grid(120, where)
    check(attend, batch, batch.leaves(1, dim, dtype=HALF[dim != 64]), **walk, **limit)


@pytest.mark.parametrize("limit, side", [("99 KiB", 24), ("99 KiB", 25), ("163 KiB", 44), ("163 KiB", 45)])
def test_vectors_around_what_shared_memory_holds(attend, limit, side):
    """Those of the smaller grids stand in shared memory, those of the others do not."""
    batch = windowed_grid(side, "corners")
    leaves = batch.leaves(1, 32, dtype=torch.float16)
    bytes_of_block = {"shared_limit": SHARED_LIMITS[limit]}
    results = check(attend, batch, leaves, **bytes_of_block)
    given = batch.given(leaves) | bytes_of_block
    (frozen,) = attend(leaves["qkv"], gradient_of(leaves["qkv"]), **given, bias_needs=[False, False])
    assert_same(frozen, results)


@walks
def test_minus_infinity_in_a_vector_masks_even_whole_tiles(attend, walk):
    batch = coded([*range(130)])
    leaves = batch.leaves(1, 32, head_scale=False, dtype=torch.bfloat16)
    leaves["table0"][130:-3] = -torch.inf  # no key before its query
    leaves["table0"][-2] = -torch.inf  # nor CLS
    results = check(attend, batch, leaves, **walk)
    assert not results.bias[0][:, 130:-3].any() and not results.bias[0][:, -2].any()


@pytest.mark.parametrize("dim, count, dtype", [(32, 100, torch.bfloat16), (64, 200, torch.float16)])
def test_scores_that_grow_from_tile_to_tile_are_renormalised(attend, dim, count, dtype):
    batch = lengths([count])
    leaves = batch.leaves(1, dim, dtype=dtype)
    leaves["qkv"][:, 1] *= torch.arange(count + 5).to(dtype)[:, None, None] / 20
    check(attend, batch, leaves)


@walks
def test_strides_of_qkv_and_grad_do_not_matter(attend, walk):
    batch = mixed()
    leaves = batch.leaves(2, 32, dtype=torch.bfloat16)
    given = batch.given(leaves) | walk
    tensors = {"qkv": leaves["qkv"], "grad": gradient_of(leaves["qkv"])}
    (expected,) = attend(**tensors, **given)
    for name, tensor in tensors.items():
        flat = tensor.flatten(1)
        padded = torch.full((len(flat), 8 + flat.shape[1] + 16), torch.nan, dtype=flat.dtype)
        padded[:, 8:-16] = flat
        heads_first = tensor.movedim(-2, 0).contiguous().movedim(0, -2)
        for layout in (padded[:, 8:-16].view(tensor.shape), heads_first):
            assert not layout.is_contiguous() and torch.equal(layout, tensor)
            assert_same(attend(**{**tensors, name: layout}, **given)[0], expected)


@walks
def test_nothing_of_other_samples_or_inert_rows_is_read(attend, walk):
    batch = mixed()
    leaves = batch.leaves(2, 32, dtype=torch.bfloat16)
    qkv, given, inert = leaves["qkv"], batch.given(leaves) | walk, batch.layout.offsets[-1]
    grad = gradient_of(qkv)
    (expected,) = attend(qkv, grad, **given)
    for sample in range(batch.layout.samples):
        mine = batch.layout.rows_of(sample)
        alone = [
            torch.full_like(tensor, torch.nan).index_copy(0, torch.tensor(mine), tensor[mine]) for tensor in (qkv, grad)
        ]
        (actual,) = attend(*alone, **given)
        assert all(torch.equal(a[mine], b[mine]) for a, b in zip(actual[:3], expected[:3], strict=True))
    for tensor, foreign in ((qkv, torch.nan), (grad, torch.nan), (given["code"], 2**31 - 1), (given["is_cls"], True)):
        tensor[inert:] = foreign
    assert_same(attend(qkv, grad, **given)[0], expected)


LAUNCHES = {
    "whole": (mixed, 2, 32, WALKS["whole"]),
    "split": (lambda: lengths([70, 3], 2), 1, 64, WALKS["split"]),
    "long": (lambda: lengths([131, 3]), 1, 128, WALKS["whole"]),
    "large": (lambda: windowed_grid(64, "rows"), 1, 32, WALKS["whole"]),
    "large and split": (lambda: windowed_grid(64, "rows"), 1, 32, WALKS["split"]),
    "heads of 96": (mixed, 2, 96, WALKS["whole"]),
    "compact, 64": (mixed, 2, 64, COMPACT),
    "compact, 96": (mixed, 2, 96, COMPACT),
    "compact, 128": (mixed, 2, 128, COMPACT),
}


@pytest.mark.parametrize("name", ["whole", "split", "large"])
def test_what_is_frozen_changes_no_bit_of_the_other_gradients(attend, name):
    make, heads, dim, walk = LAUNCHES[name]
    batch = make()
    leaves = batch.leaves(heads, dim, dtype=torch.bfloat16)
    given, grad, vectors = batch.given(leaves) | walk, gradient_of(leaves["qkv"]), len(batch.tables)
    (expected,) = attend(leaves["qkv"], grad, **given)
    needs = [[i != m for i in range(vectors)] for m in range(vectors)] + [[False] * vectors]
    for bias_needs, scale_need in [*((need, True) for need in needs), ([True] * vectors, False), (needs[-1], False)]:
        (actual,) = attend(leaves["qkv"], grad, **given, bias_needs=bias_needs, head_scale_need=scale_need)
        assert [vector is not None for vector in actual.bias] == bias_needs
        assert (actual.head_scale is not None) == scale_need
        assert_same(actual, expected)


@pytest.mark.parametrize("batch, heads, dim, how", LAUNCHES.values(), ids=LAUNCHES)
def test_the_order_of_blocks_and_warps_changes_no_bit(attend, batch, heads, dim, how):
    batch = batch()
    leaves = batch.leaves(heads, dim, dtype=torch.float16)
    given = batch.given(leaves) | how
    first, *others = attend(leaves["qkv"], gradient_of(leaves["qkv"]), **given, orders=(0, 1, 2, 3))
    assert len(others) == 3
    for other in others:
        assert_same(other, first)


@pytest.mark.parametrize("multiprocessors", (1, 132))
@pytest.mark.parametrize("max_length", (0, 10_000))
def test_the_longest_length_may_be_unknown_or_too_large(attend, max_length, multiprocessors):
    batch = lengths([131, 3])
    leaves = batch.leaves(1, 128, dtype=torch.bfloat16)
    check(attend, batch, leaves, max_length=max_length, multiprocessors=multiprocessors)


@pytest.mark.parametrize("max_length", (1, 17, 20))
def test_a_sample_longer_than_promised_has_its_values_and_no_gradient_but_nan(attend, max_length):
    batch = lengths([20, 150, 3])
    leaves = batch.leaves(1, 128, dtype=torch.bfloat16)
    given, grad = batch.given(leaves), gradient_of(leaves["qkv"])
    (expected,) = attend(leaves["qkv"], grad, **given)
    (actual,) = attend(leaves["qkv"], grad, **{**given, "max_length": max_length})
    assert torch.equal(actual.out, expected.out) and torch.equal(actual.log_sum_exp, expected.log_sum_exp)
    longest = torch.zeros(len(grad), dtype=torch.bool)
    longest[batch.layout.rows_of(1)] = True
    assert actual.qkv[longest].isnan().all() and torch.equal(actual.qkv[~longest], expected.qkv[~longest])
    assert actual.bias[0].isnan().all() and actual.head_scale.isnan().all()


@walks
@pytest.mark.parametrize("counts, capacity", [([], 3), ([0], 3), ([0, 0], 3), ([0, 0], 0)], ids=str)
def test_batches_without_tokens_give_zeros(attend, counts, capacity, walk):
    batch = Batch(naive_layout(whole_rows({"text": counts}), capacity=capacity), (series(4, 2),))
    leaves = batch.leaves(2, 32, dtype=torch.bfloat16)
    nothing = torch.full_like(leaves["qkv"], torch.nan)
    (results,) = attend(nothing, nothing[:, 0], **batch.given(leaves) | walk)
    assert not any(tensor.any() for tensor in (*results[:3], *results.bias, results.head_scale))


def test_a_head_scale_of_an_unknown_type_is_refused_in_one_line(build, tmp_path):
    batch = text_only()
    leaves = batch.leaves(1, 32, dtype=torch.bfloat16)
    changed = {"head_scale_type": 3}
    case = host_shim.attention_case(leaves["qkv"], **batch.given(leaves), changed=changed)
    process = host_shim.run(build("address"), tmp_path, case)
    line = "head_scale: expected float16, bfloat16 or float32, got an unknown type\n"
    assert (process.returncode, process.stderr) == (1, line)
