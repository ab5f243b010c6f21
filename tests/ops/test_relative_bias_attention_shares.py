"""How the backward pass of attention shares its work among thread blocks: as even as the number of samples allows."""

import ctypes
import heapq

import pytest

HEADS = 24
CLS_AND_GRID = 964  # entries of a grid of 16 x 16
SHARED_LIMIT = 227 * 1024
# Samples, tokens of each, multiprocessors: how much longer than evenly shared the slowest multiprocessor may take.
SHAPES = {
    (64, 257, 132): 1.04, (64, 257, 108): 1.06, (64, 257, 84): 1.05,
    (32, 329, 132): 1.04, (32, 329, 108): 1.13, (32, 329, 84): 1.1,
    (16, 750, 132): 1.04, (16, 750, 108): 1.13, (16, 750, 84): 1.1,
    (16, 822, 132): 1.04, (16, 822, 108): 1.13, (16, 822, 84): 1.1,
    (16, 1025, 132): 1.04, (16, 1025, 108): 1.13, (16, 1025, 84): 1.1,
}  # fmt: skip


class Shares(ctypes.Structure):
    """``BackwardShares`` of csrc/relative_bias_attention.h."""

    _fields_ = (("groups", ctypes.c_int32), ("parts", ctypes.c_int32))


def share(extension, samples, length, multiprocessors):
    """What the extension plans for heads of 64 on an H100 or one of fewer multiprocessors."""
    function = ctypes.CDLL(extension.__file__).relative_bias_attention_backward_shares
    function.restype = Shares
    return function(samples, length, HEADS, 64, 64, CLS_AND_GRID, multiprocessors, ctypes.c_int64(SHARED_LIMIT))


def slowest(samples, groups, parts, multiprocessors):
    """When the last thread block ends, by an even share's end; each goes to the multiprocessor that is free first."""
    free = [0.0] * multiprocessors
    for group in range(groups):
        size = (group + 1) * samples // groups - group * samples // groups
        for _ in range(HEADS * parts):
            heapq.heapreplace(free, free[0] + size / parts)
    return max(free) / (samples * HEADS / multiprocessors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_slowest_multiprocessor_takes_little_longer_than_all_do_together(host_extension, shape):
    samples, _, multiprocessors = shape
    shares = share(host_extension, *shape)
    assert shares.parts == 1 and slowest(samples, shares.groups, 1, multiprocessors) <= SHAPES[shape]


@pytest.mark.parametrize("samples, length, groups, parts", [(8, 1025, 8, 2), (2, 1025, 2, 5), (1, 257, 1, 4)])
def test_few_samples_have_their_keys_split(host_extension, samples, length, groups, parts):
    shares = share(host_extension, samples, length, 132)
    assert (shares.groups, shares.parts) == (groups, parts)
