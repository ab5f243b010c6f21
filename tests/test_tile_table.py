"""The tiles of matrix products: those that a GPU gets fit into its shared memory, and one that is too old gets none."""

import pytest

from onepeace_fast.kernels.tile_table import KERNELS, TileParameters, refusal, tiles_of, use_tiles

SHARED = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227,
          "sm_110": 227, "sm_120": 99, "sm_121": 99, "sm_130": 99}  # fmt: skip
ELEMENT = 2  # bytes, of half precision


@pytest.mark.parametrize("gpu", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_product_has_under_way_fits_into_a_program_s_shared_memory(kernel, gpu):
    tiles = tiles_of(kernel, gpu)
    weights = 2 if kernel == "routed_ffn_hidden" else 1
    stage = (tiles.block_rows + weights * tiles.block_columns) * tiles.block_inner * ELEMENT
    assert tiles.num_stages * stage <= SHARED[gpu] * 1024
    accumulators = weights * tiles.block_rows * tiles.block_columns // (32 * tiles.num_warps)
    assert accumulators <= 128, "registers of a thread for sums"
    assert tiles.block_columns % tiles.pieces == 0 and tiles.block_columns // tiles.pieces >= 8


@pytest.mark.parametrize("gpu, one_like_it", [("sm_86", "sm_89"), ("sm_103", "sm_100"), ("sm_121", "sm_120")])
def test_gpus_that_multiply_alike_take_the_same_tiles(gpu, one_like_it):
    assert all(tiles_of(kernel, gpu) == tiles_of(kernel, one_like_it) for kernel in KERNELS)
    assert tiles_of("gradients", "sm_120") != tiles_of("gradients", "sm_90")


def test_a_gpu_that_is_too_old_is_refused_in_one_line():
    assert refusal("sm_80") is None and refusal("sm_120") is None
    assert refusal("sm_75") == "expected a GPU of compute capability 8.0 or later, got 7.5"
    with pytest.raises(ValueError, match=r"^gradients: expected a GPU of .* 8.0 or later, got 7.5$"):
        tiles_of("gradients", "sm_75")
    with pytest.raises(ValueError, match="expected an architecture like sm_90, got 'hopper'"):
        tiles_of("gradients", "hopper")


def test_other_tiles_hold_inside_a_block_on_every_architecture():
    mine = TileParameters(32, 32, 32, 1, 4, 2, 1)
    with use_tiles({"gradients": mine}):
        assert tiles_of("gradients", "sm_80") == tiles_of("gradients", "sm_120") == mine
    assert tiles_of("gradients", "sm_80") != mine
