"""What thread blocks take of shared memory, on devices that give them as much as 8.6, 8.9 and 12.0, 8.0, and 9.0 do.

The host shim fails launches beyond what the device gives, as CUDA does; the compact shape of the backward kernel runs
here, which only the smallest of these devices takes.
"""

import pytest
import torch
from support import host_shim
from support.attention_cases import any_cls, lengths, mixed, shuffled_grid, windowed_grid
from support.host_shim import SHARED_LIMITS
from support.kernel_attention import (
    BATCHES,
    HEAD_SIZES,
    arguments,
    assert_same_gradients,
    check,
    check_gradients,
    gradient_of,
    rounded,
    walks,
)

COMPACT = {"shared_limit": SHARED_LIMITS["99 KiB"]}


@pytest.mark.parametrize("limit", SHARED_LIMITS)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_both_passes_run_with_what_each_device_gives(attend, differentiate, dim, limit):
    """With vectors that fill what the forward pass has for them."""
    batch = windowed_grid(42, "rows")
    leaves = rounded(batch, torch.bfloat16, 1, dim)
    given = {"shared_limit": SHARED_LIMITS[limit]}
    check(lambda qkv, **others: attend(qkv, **others, **given), batch, leaves)
    check_gradients(differentiate, batch, leaves, **given)


@walks
@pytest.mark.parametrize("dim", HEAD_SIZES[1:])
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_of_the_compact_shape_follow_the_dense_bias(differentiate, name, dim, walk):
    batch = BATCHES[name]()
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 2, dim), **walk, **COMPACT)


@pytest.mark.parametrize("dim, counts", [(64, [144, 145, 146, 3]), (128, [80, 81, 82, 3])])
def test_lengths_around_what_one_compact_thread_block_walks(differentiate, dim, counts):
    batch = lengths(counts)
    check_gradients(differentiate, batch, rounded(batch, torch.float16, 1, dim), **COMPACT)


@walks
@pytest.mark.parametrize("dim", HEAD_SIZES[1:])
def test_a_whole_image_in_the_compact_shape(differentiate, dim, walk):
    batch = shuffled_grid(16)
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, dim), **walk, **COMPACT)


@pytest.mark.parametrize("dim, body", [(64, 128), (128, 64)])
def test_cls_in_the_last_block_of_a_compact_walk(differentiate, dim, body):
    batch = any_cls([[(body, 9), (80, 18), (0, body + 3)], [(0, 0), (20, 3), (0, 1)]])
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, dim), **COMPACT)


@walks
@pytest.mark.parametrize("dim", HEAD_SIZES[1:])
def test_vectors_that_the_compact_shape_does_not_hold(differentiate, dim, walk):
    batch = windowed_grid(64, "corners")
    check_gradients(differentiate, batch, rounded(batch, torch.bfloat16, 1, dim), **walk, **COMPACT)


@pytest.mark.parametrize("dim", HEAD_SIZES[1:])
def test_the_order_of_blocks_and_warps_changes_no_bit_of_the_compact_shape(differentiate, dim):
    batch = mixed()
    leaves = rounded(batch, torch.float16, 2, dim)
    first, *others = differentiate(
        leaves["qkv"], gradient_of(leaves["qkv"]), **arguments(batch, leaves), orders=(0, 1, 2), **COMPACT
    )
    assert len(others) == 2
    for other in others:
        assert_same_gradients(other, first)


def test_a_device_that_gives_too_little_ends_in_one_line(build, tmp_path):
    batch = mixed()
    leaves = rounded(batch, torch.bfloat16, 1, 64)
    case = host_shim.attention_case(leaves["qkv"], **arguments(batch, leaves))
    process = host_shim.run(build("address"), tmp_path, case, shared_limit=48 * 1024)
    assert process.returncode == 1
    assert process.stderr == "relative_bias_attention: CUDA refuses the launch: invalid argument\n"
