"""The count of the backward kernel's instructions, and how often a sample's shape repeats each part."""

from collections import Counter

import pytest
from support.sass_listing import listing

from tools import count_backward
from tools.compile_cuda import HEADS

KERNEL = "backward_kernel.cuh"
WALK = (KERNEL, "walk_keys(backward, key_block, taken")
PROBABILITIES = (KERNEL, "backward.find_probabilities(probabilities[slot][half]")
RUN = listing(("backward_memory.cuh", "bias[i] = entries[-diagonal"), PROBABILITIES, WALK)
SCALE = listing(("backward_memory.cuh", "scores[n][i] = scores[n][i] * scale"), PROBABILITIES, WALK)
TOGETHER = listing(("backward_memory.cuh", "const Run key_run"), PROBABILITIES, WALK)
DIFFERENCE = listing(
    ("difference_sums.cuh", "const float4 before"), (KERNEL, "difference_sums()[index].add"),
    (KERNEL, "stage, 0, seen, sums)"), WALK,
)  # fmt: skip
TEXT = f"""
//---- .text.kernelI13__nv_bfloat16Li64ELi64ELb0ELb0E
.text.kernelI13__nv_bfloat16Li64ELi64ELb0ELb0E:
{RUN}
        /*0010*/                   LDS R1, [R2] ;
{TOGETHER}
        /*0020*/                   LDS.128 R4, [R2] ;
{SCALE}
        /*0030*/                   FFMA R1, R2, R3, R4 ;
{DIFFERENCE}
        /*0040*/                   LDS.128 R4, [R2] ;
        /*0050*/                   ATOMS.ADD R4, [R2], R5 ;
"""


def test_instructions_are_counted_by_part_and_class():
    parts = count_backward.count_parts(TEXT, "bfloat16Li64ELi64ELb0ELb0")
    assert {name: dict(of) for name, of in parts.items() if of} == {
        "p: bias of a run": {"LDS": 1, "issued": 1, "shared": 1},
        "p": {"LDS": 1, "FP32": 1, "issued": 2, "shared": 1},  # all lanes read the same
        "sums: by difference": {"LDS": 1, "ATOMS": 1, "issued": 2, "shared": 6},
    }


@pytest.mark.parametrize("key_blocks, walks", [(17, [17]), (18, [16, 2]), (33, [16, 17]), (48, [16, 16, 16])])
def test_a_walk_takes_one_key_block_more_where_that_ends_the_sample(key_blocks, walks):
    assert count_backward.walks_of(key_blocks, 16) == walks


def test_a_grid_and_its_cls_repeat_each_part():
    """16 row blocks of 16 and one of CLS: 9 tiles, the last of CLS and nothing; 16 key blocks in slots, one spread."""
    found = count_backward.repeats(257, (64, 64), 964, "differences")
    expected = {
        # Of a warp's two key blocks and two halves of a tile the compiler has copies.
        "halves of runs": 16 * 16 / 4, "halves of no run": 16 * 2 / 4, "halves by difference": 16 * 16 / 4,
        "halves by CLS": 16 * 2 / 4, "pairs": 16 * 9 / 2, "tiles": 8 * 9, "tiles whole": 8 * 9, "entries": 8 * 4,
        "steps of dq": 8 * 9 * 17 / 3, "pieces of dq whole": 17 * 4, "pieces of dq in parts": 0, "spread halves": 18,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_a_sample_of_several_walks_adds_dq_up_in_parts():
    """47 row blocks, the last of 13 rows, and one of CLS: three walks of 24 tiles each."""
    found = count_backward.repeats(750, (64, 64), 1502, "runs")
    expected = {
        "halves of runs": 46 * 46 / 4, "halves of any": (47 * 47 - 46 * 46) / 4, "halves by diagonal": 47 * 47 / 4,
        "tiles": 8 * 24 * 3, "tiles whole": 0, "pieces of dq whole": 0,
        "pieces of dq in parts": 3 * 48 * 4, "spread halves": 0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("bias, learned", [("none", 0), ("frozen", 0), ("runs", 288 / 4), ("any", 288 / 4)])
def test_only_a_bias_that_learns_has_sums(bias, learned):
    assert count_backward.repeats(257, (64, 64), 964, bias)["halves that learn"] == learned


def test_the_busiest_multiprocessor_is_modelled():
    """Of a tile a warp fills 400 slots, 200 cycles of shared memory and 64 matrix instructions; a block takes 8 us."""
    parts = {name: Counter[str]() for name in count_backward.PARTS}
    parts["tile"].update(issued=400, shared=200, HMMA=64)
    # 64 samples of 24 heads in 11 groups: 264 thread blocks, two for each of 132 multiprocessors, of up to 6 samples.
    found = count_backward.model(parts, (64, 64), "none")["64 x 257 tokens"]
    samples = 2 * 6 * 8 * 9 / 1700
    assert HEADS == 24
    assert found == pytest.approx((samples * 400 / 4, samples * 200, samples * 64 / 0.62))
    parts["thread block"].update(issued=4 * 1700)
    found = count_backward.model(parts, (64, 64), "none")["64 x 257 tokens"]
    assert found[0] == pytest.approx(samples * 400 / 4 + 2 * 8)
