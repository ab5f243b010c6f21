"""The relative-bias attention kernel, run on a CPU under AddressSanitizer, against float64 by the tolerance rule.

Results are allocated full of NaN, and so is the shared memory of every thread block.
"""

import pytest
import torch
from support import host_shim, naive
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
from support.kernel_attention import BATCHES, HEAD_SIZES, arguments, check, rounded
from support.plans import naive_layout, whole_rows

from onepeace_fast.tolerance import HALF, assert_within_rule


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_forward_follows_the_dense_bias(attend, name, dtype, dim):
    batch = BATCHES[name]()
    check(attend, batch, rounded(batch, dtype, 2, dim))


@pytest.mark.parametrize("dtype, dim", list(zip((HALF[1], *HALF), HEAD_SIZES, strict=True)), ids=str)
def test_lengths_around_the_edges_of_blocks_and_tiles(attend, dtype, dim):
    batch = lengths([1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129])
    check(attend, batch, rounded(batch, dtype, 1, dim))


@pytest.mark.parametrize("modalities", (2, 3))
def test_lengths_around_the_edges_in_several_modalities(attend, modalities):
    batch = lengths([64, 1, 17, 0, 66, 16], modalities)
    check(attend, batch, rounded(batch, torch.bfloat16, 1, 64))


def test_a_whole_image_of_257_tokens(attend):
    batch = shuffled_grid(16)
    check(attend, batch, rounded(batch, torch.bfloat16, 1, 64))


@pytest.mark.parametrize("side", range(3, 8))
def test_patches_of_grids_in_random_order(attend, side):
    batch = shuffled_grid(side, [1, 5])
    check(attend, batch, rounded(batch, torch.float16, 1, 32))


def test_long_samples_of_several_modalities(attend):
    batch = mixed(long=True)
    check(attend, batch, rounded(batch, torch.bfloat16, 1, 64))


@pytest.mark.parametrize(
    "counts",
    [
        [[(20, 0), (3, 1), (65, 0)]],
        [[(5, 2), (0, 3), (1, 0)], [(16, 0), (0, 0), (9, 1)]],
        [[(18, 9), (2, 1)], [(40, 20), (1, 17)], [(0, 6), (3, 0)]],
    ],
    ids=["none", "some", "more than a block"],
)
def test_any_number_of_cls_tokens(attend, counts):
    batch = any_cls(counts)
    check(attend, batch, rounded(batch, torch.bfloat16, 2, 32))


@pytest.mark.parametrize("bias, head_scale", [(False, False), (True, False), (False, True)])
def test_bias_and_head_scale_are_each_optional(attend, bias, head_scale):
    batch = mixed()
    check(attend, batch, rounded(batch, torch.float16, 2, 32, bias=bias, head_scale=head_scale))


@pytest.mark.parametrize("scale", (0.3, -0.2))
def test_any_scale(attend, scale):
    batch = Batch(text_only().layout, text_only().tables, scale)
    check(attend, batch, rounded(batch, torch.bfloat16, 2, 64))


def test_vectors_and_head_scale_in_float32(attend):
    batch = kept_grid()
    leaves = batch.leaves(2, 32)
    half = leaves["qkv"].bfloat16()
    wide = {name: leaf.float() for name, leaf in leaves.items()} | {"qkv": half}
    ((out, _),) = attend(half, **arguments(batch, wide))
    exact = batch.plain(**{name: leaf.double() for name, leaf in wide.items()})
    plain = batch.plain(**{name: leaf.bfloat16() for name, leaf in wide.items()})
    assert_within_rule("out", out, plain, exact)


@pytest.mark.parametrize("where", ("rows", "corners", "anywhere"))
def test_vectors_that_shared_memory_does_not_hold_are_read_in_windows(attend, where):
    """A grid of 64 has 16,129 entries; patches far apart meet more of them than a window has."""
    batch = windowed_grid(64, where)
    for dtype, dim in zip(HALF, (64, 32), strict=True):
        check(attend, batch, rounded(batch, dtype, 1, dim))


def test_minus_infinity_in_a_vector_masks_even_whole_tiles(attend):
    batch = lengths([130])
    leaves = rounded(batch, torch.bfloat16, 1, 32, head_scale=False)
    given = arguments(batch, leaves)
    vector = given["bias"][0].clone()
    vector[:, 130:-3] = -torch.inf  # no key before its query
    vector[:, -2] = -torch.inf  # nor CLS
    ((out, _),) = attend(leaves["qkv"], **{**given, "bias": [vector]})
    row = naive.vector_row(given["code_offsets"][0], vector.shape[1])
    plain, exact = (
        naive.attention(leaves["qkv"].to(t), batch.layout, [vector.t().to(t)], [row], None)
        for t in (torch.bfloat16, torch.float64)
    )
    assert_within_rule("out", out, plain, exact)


def test_scores_that_grow_from_tile_to_tile_are_renormalised(attend):
    batch = lengths([200])
    leaves = rounded(batch, torch.bfloat16, 1, 64)
    leaves["qkv"][:, 1] *= torch.arange(205).bfloat16()[:, None, None] / 20
    check(attend, batch, leaves)


def test_strides_of_qkv_do_not_matter(attend):
    batch = mixed()
    leaves = rounded(batch, torch.bfloat16, 2, 32)
    qkv, given = leaves["qkv"], arguments(batch, leaves)
    rows = qkv.shape[0]
    expected = attend(qkv, **given)[0]
    wide = torch.full((rows, 8 + 192 + 16), torch.nan, dtype=qkv.dtype)
    wide[:, 8:-16] = qkv.flatten(1)
    heads_first = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    for layout in (wide[:, 8:-16].view(qkv.shape), heads_first):
        assert not layout.is_contiguous() and torch.equal(layout, qkv)
        for actual, wanted in zip(attend(layout, **given)[0], expected, strict=True):
            assert torch.equal(actual, wanted)


def test_nothing_of_other_samples_or_inert_rows_is_read(attend):
    batch = mixed()
    leaves = rounded(batch, torch.bfloat16, 2, 32)
    given = arguments(batch, leaves)
    expected = attend(leaves["qkv"], **given)[0]
    for sample in range(batch.layout.samples):
        mine = batch.layout.rows_of(sample)
        alone = torch.full_like(leaves["qkv"], torch.nan)
        alone[mine] = leaves["qkv"][mine]
        for actual, wanted in zip(attend(alone, **given)[0], expected, strict=True):
            assert torch.equal(actual[mine], wanted[mine])


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_the_order_of_blocks_and_warps_changes_no_bit(attend, dim):
    batch = mixed()
    leaves = rounded(batch, torch.float16, 2, dim)
    first, *others = attend(leaves["qkv"], **arguments(batch, leaves), orders=(0, 1, 2, 3))
    assert len(others) == 3
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


@pytest.mark.parametrize("max_length", (0, 1, 17, 10_000))
def test_the_longest_length_is_a_hint(attend, max_length):
    batch = lengths([300, 3])
    leaves = rounded(batch, torch.bfloat16, 1, 32)
    given = arguments(batch, leaves)
    expected = attend(leaves["qkv"], **given)[0]
    for actual, wanted in zip(attend(leaves["qkv"], **{**given, "max_length": max_length})[0], expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("counts", ([], [0], [0, 0]), ids=str)
def test_batches_without_tokens_give_zeros(attend, counts):
    layout = naive_layout(whole_rows({"text": counts}), capacity=3)
    batch = Batch(layout, (series(4, 2),))
    leaves = rounded(batch, torch.bfloat16, 2, 32)
    ((out, log_sum_exp),) = attend(torch.full_like(leaves["qkv"], torch.nan), **arguments(batch, leaves))
    assert out.shape == (3, 2, 32) and not out.any() and not log_sum_exp.any()


REFUSED = {
    "qkv: expected a head size of 32, 64 or 128, got 48": {"head_dim": 48},
    "qkv: expected float16 or bfloat16, got float32": {"type": 2},
    "cu_seqlens: expected 1 to 16 modalities, got 17": {"modalities": 17},
    "qkv: expected no negative size and at least one head, got": {"heads": 0},
    "cu_seqlens: expected at most 65534 samples and 65535 heads in one launch, got 65535 and": {"samples": 65_535},
    "bias: expected one vector for each of 1 modalities, or none, got 2": {"bias_vectors": 2},
    "head_scale: expected float16, bfloat16 or float32, got an unknown type": {"head_scale_type": 3},
    "qkv: expected strides that 8 divides, got 97": {"row_stride": 97},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_kernel_cannot_take_is_refused_in_one_line(build, tmp_path, line):
    batch = text_only()
    leaves = rounded(batch, torch.bfloat16, 1, 32)
    case = host_shim.attention_case(leaves["qkv"], **arguments(batch, leaves), changed=REFUSED[line])
    process = host_shim.run(build("address"), tmp_path, case)
    assert process.returncode == 1 and process.stderr.startswith(line), process.stderr
    assert len(process.stderr.splitlines()) == 1
