"""The backward kernels of attention, run on a CPU under AddressSanitizer, against float64 by the tolerance rule.

Results, the workspace and the shared memory of every thread block are full of NaN before.
"""

import pytest
import torch
from support import host_shim
from support.attention_cases import (
    Batch,
    any_cls,
    kept_grid,
    lengths,
    mixed,
    series,
    shuffled_grid,
    text_only,
    windowed_grid,
)
from support.kernel_attention import (
    BATCHES,
    HEAD_SIZES,
    WALKS,
    arguments,
    assert_same_gradients,
    check_gradients,
    coded,
    gradient_of,
    rounded,
    walks,
    wide,
)
from support.plans import naive_layout, whole_rows

from onepeace_fast.tolerance import HALF


@walks
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_follow_the_dense_bias(differentiate, name, dtype, dim, walk):
    batch = BATCHES[name]()
    check_gradients(differentiate, batch, rounded(batch, dtype, 2 if dim == 32 else 1, dim), **walk)


@walks
@pytest.mark.parametrize("dtype, dim", list(zip((HALF[1], *HALF), HEAD_SIZES, strict=True)), ids=str)
def test_lengths_around_the_edges_of_blocks_and_tiles(differentiate, dtype, dim, walk):
    batch = lengths([1, 2, 16, 17, 18, 32, 33, 34, 65])
    check_gradients(differentiate, batch, rounded(batch, dtype, 1, dim), **walk)


@pytest.mark.parametrize("dim, counts", [(32, [258]), (64, [257, 258]), (128, [129, 130, 3])])
def test_lengths_around_what_one_thread_block_walks(differentiate, dim, counts):
    batch = lengths(counts)
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, dim))


@walks
@pytest.mark.parametrize("modalities", (2, 3))
def test_lengths_around_the_edges_in_several_modalities(differentiate, modalities, walk):
    batch = lengths([64, 1, 17, 0, 16], modalities)
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, 64), **walk)


@walks
@pytest.mark.parametrize("batch", [lambda: kept_grid(16, 16), lambda: shuffled_grid(16)], ids=["in order", "shuffled"])
def test_a_whole_image_of_257_tokens(differentiate, batch, walk):
    batch = batch()
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, 64), **walk)


@pytest.mark.parametrize("side", (*range(3, 9), 14))
def test_grids_whose_rows_end_inside_blocks(differentiate, side):
    batch = kept_grid(side, side)
    check_gradients(differentiate, batch, rounded(batch, torch.float16, 1, 32))


@pytest.mark.parametrize("side", range(3, 8))
def test_patches_of_grids_in_random_order(differentiate, side):
    batch = shuffled_grid(side, [1, 5])
    check_gradients(differentiate, batch, rounded(batch, torch.float16, 1, 32))


@walks
def test_long_samples_of_several_modalities_beside_short_ones(differentiate, walk):
    batch = mixed(long=True)
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, 64), **walk)


CLS_COUNTS = {
    "none": [[(20, 0), (3, 1), (65, 0)]],
    "some": [[(5, 2), (0, 3), (1, 0)], [(16, 0), (0, 0), (9, 1)]],
    "more than a block": [[(18, 9), (2, 1)], [(40, 20), (1, 17)], [(0, 6), (3, 0)]],
    "in the last block of a walk": [[(129, 0), (80, 18), (0, 136)], [(0, 0), (20, 3), (0, 1)]],
}


@walks
@pytest.mark.parametrize("name", CLS_COUNTS)
def test_any_number_of_cls_tokens(differentiate, name, walk):
    batch = any_cls(CLS_COUNTS[name])
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, 128), **walk)


@walks
@pytest.mark.parametrize("bias, head_scale", [(False, False), (True, False), (False, True)])
def test_bias_and_head_scale_are_each_optional(differentiate, bias, head_scale, walk):
    batch = mixed()
    check_gradients(
        differentiate, batch, rounded(batch, torch.float16, 2, 32, bias=bias, head_scale=head_scale), **walk
    )


@walks
def test_a_head_scale_of_zero_stops_all_gradients_but_its_own(differentiate, walk):
    batch = text_only()
    leaves = rounded(batch, torch.bfloat16, 2, 32)
    leaves["head_scale"][0] = 0
    gradients = check_gradients(differentiate, batch, leaves, **walk)
    assert not gradients.qkv[:, :, 0].any() and not gradients.bias[0][0].any() and gradients.head_scale[0] != 0


@pytest.mark.parametrize("scale", (0.3, -0.2))
@walks
def test_any_scale(differentiate, scale, walk):
    batch = Batch(text_only().layout, text_only().tables, scale)
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 2, 64), **walk)


@walks
def test_vectors_and_head_scale_in_float32(differentiate, walk):
    batch = kept_grid()
    gradients = check_gradients(differentiate, batch, wide(batch, 2, 32), **walk)
    assert gradients.bias[0].dtype == gradients.head_scale.dtype == torch.float32


@walks
@pytest.mark.parametrize("where", ("rows", "corners", "anywhere"))
def test_vectors_that_shared_memory_does_not_hold(differentiate, where, walk):
    batch = windowed_grid(64, where)
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, 32), **walk)


@pytest.mark.parametrize("limit, side", [("99 KiB", 24), ("99 KiB", 25), ("163 KiB", 44), ("163 KiB", 45)])
def test_vectors_around_what_shared_memory_holds(differentiate, limit, side):
    """Those of the smaller grids stand in shared memory, those of the others do not."""
    batch = windowed_grid(side, "corners")
    leaves = rounded(batch, torch.float16, 1, 32)
    bytes_of_block = {"shared_limit": host_shim.SHARED_LIMITS[limit]}
    gradients = check_gradients(differentiate, batch, leaves, **bytes_of_block)
    given = arguments(batch, leaves) | bytes_of_block
    (frozen,) = differentiate(leaves["qkv"], gradient_of(leaves["qkv"]), **given, bias_needs=[False, False])
    assert_same_gradients(frozen, gradients)


@walks
def test_minus_infinity_in_a_vector_masks_even_whole_tiles(differentiate, walk):
    batch = coded([*range(70)])
    leaves = rounded(batch, torch.bfloat16, 1, 32, head_scale=False)
    leaves["table0"][70:-3] = -torch.inf  # no key before its query
    leaves["table0"][-2] = -torch.inf  # nor CLS
    gradients = check_gradients(differentiate, batch, leaves, **walk)
    assert not gradients.bias[0][:, 70:-3].any() and not gradients.bias[0][:, -2].any()


def test_scores_that_grow_from_tile_to_tile(differentiate):
    batch = lengths([100])
    leaves = rounded(batch, torch.bfloat16, 1, 32)
    leaves["qkv"][:, 1] *= torch.arange(105).bfloat16()[:, None, None] / 20
    check_gradients(differentiate, batch, leaves)


@walks
def test_strides_of_grad_do_not_matter(differentiate, walk):
    batch = mixed()
    leaves = rounded(batch, torch.bfloat16, 2, 32)
    qkv, given = leaves["qkv"], arguments(batch, leaves) | walk
    grad = gradient_of(qkv)
    (expected,) = differentiate(qkv, grad, **given)
    padded = torch.full((grad.shape[0], 8 + 64 + 16), torch.nan, dtype=grad.dtype)
    padded[:, 8:-16] = grad.flatten(1)
    heads_first = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for layout in (padded[:, 8:-16].view(grad.shape), heads_first):
        assert not layout.is_contiguous() and torch.equal(layout, grad)
        assert_same_gradients(differentiate(qkv, layout, **given)[0], expected)
    heads_first = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    assert_same_gradients(differentiate(heads_first, grad, **given)[0], expected)


@walks
def test_nothing_of_other_samples_or_inert_rows_is_read(differentiate, walk):
    batch = mixed()
    leaves = rounded(batch, torch.bfloat16, 1, 32)
    qkv, given, inert = leaves["qkv"], arguments(batch, leaves) | walk, batch.layout.offsets[-1]
    grad = gradient_of(qkv)
    (expected,) = differentiate(qkv, grad, **given)
    for sample in range(batch.layout.samples):
        mine = batch.layout.rows_of(sample)
        alone = [
            torch.full_like(tensor, torch.nan).index_copy(0, torch.tensor(mine), tensor[mine]) for tensor in (qkv, grad)
        ]
        assert torch.equal(differentiate(*alone, **given)[0].qkv[mine], expected.qkv[mine])
    for tensor, foreign in ((qkv, torch.nan), (grad, torch.nan), (given["code"], 2**31 - 1), (given["is_cls"], True)):
        tensor[inert:] = foreign
    assert_same_gradients(differentiate(qkv, grad, **given)[0], expected)


FROZEN = {
    "whole": (mixed, 2, 32, WALKS["whole"]),
    "split": (lambda: lengths([70, 3], 2), 1, 32, WALKS["split"]),
    "large": (lambda: windowed_grid(64, "rows"), 1, 32, WALKS["whole"]),
}


@pytest.mark.parametrize("batch, heads, dim, walk", FROZEN.values(), ids=FROZEN)
def test_what_is_frozen_changes_no_bit_of_the_other_gradients(differentiate, batch, heads, dim, walk):
    batch = batch()
    leaves = rounded(batch, torch.bfloat16, heads, dim)
    given, grad, vectors = arguments(batch, leaves) | walk, gradient_of(leaves["qkv"]), len(batch.tables)
    (expected,) = differentiate(leaves["qkv"], grad, **given)
    needs = [[i != m for i in range(vectors)] for m in range(vectors)] + [[False] * vectors]
    for bias_needs, scale_need in [*((need, True) for need in needs), ([True] * vectors, False), (needs[-1], False)]:
        (actual,) = differentiate(leaves["qkv"], grad, **given, bias_needs=bias_needs, head_scale_need=scale_need)
        assert [vector is not None for vector in actual.bias] == bias_needs
        assert (actual.head_scale is not None) == scale_need
        assert_same_gradients(actual, expected)


ORDERS = {
    "whole": (mixed, 2, 32, WALKS["whole"]),
    "split": (lambda: lengths([70, 3], 2), 1, 64, WALKS["split"]),
    "long": (lambda: lengths([131, 3]), 1, 128, WALKS["whole"]),
    "large": (lambda: windowed_grid(64, "rows"), 1, 32, WALKS["whole"]),
    "large and split": (lambda: windowed_grid(64, "rows"), 1, 32, WALKS["split"]),
}


@pytest.mark.parametrize("batch, heads, dim, walk", ORDERS.values(), ids=ORDERS)
def test_the_order_of_blocks_and_warps_changes_no_bit(differentiate, batch, heads, dim, walk):
    batch = batch()
    leaves = rounded(batch, torch.float16, heads, dim)
    given = arguments(batch, leaves) | walk
    first, *others = differentiate(leaves["qkv"], gradient_of(leaves["qkv"]), **given, orders=(0, 1, 2, 3))
    assert len(others) == 3
    for other in others:
        assert_same_gradients(other, first)


@pytest.mark.parametrize("multiprocessors", (1, 132))
@pytest.mark.parametrize("max_length", (0, 10_000))
def test_the_longest_length_may_be_unknown_or_too_large(differentiate, max_length, multiprocessors):
    batch = lengths([131, 3])
    leaves = rounded(batch, torch.bfloat16, 1, 128)
    check_gradients(differentiate, batch, leaves, max_length=max_length, multiprocessors=multiprocessors)


def test_a_sample_longer_than_promised_has_no_gradient_but_nan(differentiate):
    batch = lengths([20, 150, 3])
    leaves = rounded(batch, torch.bfloat16, 1, 128)
    given, grad = arguments(batch, leaves), gradient_of(leaves["qkv"])
    (expected,) = differentiate(leaves["qkv"], grad, **given)
    (actual,) = differentiate(leaves["qkv"], grad, **{**given, "max_length": 20})
    longest = torch.zeros(len(grad), dtype=torch.bool)
    longest[batch.layout.rows_of(1)] = True
    assert actual.qkv[longest].isnan().all() and torch.equal(actual.qkv[~longest], expected.qkv[~longest])
    assert actual.bias[0].isnan().all() and actual.head_scale.isnan().all()


@walks
@pytest.mark.parametrize("counts, capacity", [([], 3), ([0], 3), ([0, 0], 0)], ids=str)
def test_batches_without_tokens_give_zeros(differentiate, counts, capacity, walk):
    batch = Batch(naive_layout(whole_rows({"text": counts}), capacity=capacity), (series(4, 2),))
    leaves = rounded(batch, torch.bfloat16, 2, 32)
    nothing = torch.full_like(leaves["qkv"], torch.nan)
    (gradients,) = differentiate(nothing, nothing[:, 0], **arguments(batch, leaves) | walk)
    assert not any(gradient.any() for gradient in (gradients.qkv, gradients.bias[0], gradients.head_scale))


REFUSED = {
    "grad: expected an address that 16 divides, got one that is 8 modulo 16": ({}, 4),
    "grad: expected strides that 8 divides, got 36": ({"row_stride": 36}, 0),
    "grad: expected strides that 8 divides, got 52": ({"head_stride": 52}, 0),
    "workspace: expected an address that 16 divides, got one that is 8 modulo 16": ({"workspace": 8}, 0),
    "gradient of qkv: expected an address that 16 divides, got one that is 8 modulo 16": ({"qkv": 8}, 0),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_kernels_cannot_take_is_refused_in_one_line(build, tmp_path, line):
    batch, (changed, begin) = text_only(), REFUSED[line]
    leaves = rounded(batch, torch.bfloat16, 1, 32)
    grad = torch.zeros(begin + 32 * len(leaves["qkv"]), dtype=torch.bfloat16)[begin:].view(-1, 1, 32)
    gradients = host_shim.gradients_case(grad, [True], True, changed=changed)
    case = host_shim.attention_case(leaves["qkv"], **arguments(batch, leaves), gradients=gradients)
    process = host_shim.run(build("address"), tmp_path, case)
    said = [text for text in process.stderr.splitlines() if "makecontext" not in text]  # of which the sanitizer warns
    assert process.returncode == 1 and len(said) == 1 and said[0].startswith(line), said
