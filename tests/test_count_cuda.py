"""The count of the forward kernel's instructions: each goes to its part by the source lines that lead to it."""

from collections import Counter

from support.sass_listing import listing

from tools import count_cuda

WALK = "query_walk.cuh"
OUTER = ((WALK, "attend_tile<KEYS>(rows"), ("relative_bias_attention_forward.cu", "walk_queries<OutputRows"))
START = (("bias.cuh", "of_diagonal[d] = entry"), (WALK, "start_runs<COLUMNS>("), (WALK, "start_scores<COLUMNS>("))
RUNS = listing(*START, *OUTER)
PRODUCT = listing(("tile.cuh", "ldmatrix(a"), (WALK, "multiply_keys<COLUMNS, Launch::HEAD_DIM>("), *OUTER)
TEXT = f"""
//---- .text.kernelI13__nv_bfloat16Li64ELb0E
.text.kernelI13__nv_bfloat16Li64ELb0E:
{RUNS}
        /*0010*/                   LDS R1, [R2] ;
        /*0020*/              @!P0 LDS.64 R1, [R2] ;
{PRODUCT}
        /*0030*/                   LDSM.16.M88.4 R4, [R5] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/                   EXIT ;
        /*0060*/                   WARPSYNC.COLLECTIVE R4, `(.L_x_1) ;
        /*0070*/                   SHFL.BFLY P0, R8, R8, R9, R10 ;
.text.kernelI13__nv_bfloat16Li64ELb1E:
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
"""


def test_instructions_are_counted_by_part_and_class():
    parts = count_cuda.count(TEXT, "bfloat16Li64ELb0")
    found = {name: dict(of) for name, of in parts.items() if of}
    product = {"LDSM": 1, "HMMA": 1, "issued": 2, "shared": 4}
    assert found == {"tile: bias of runs": {"LDS": 2, "issued": 2, "shared": 3}, "tile: q k^T": product}


def test_each_kind_of_resource_is_modelled():
    """A warp's tile of 64 keys that fills 800 slots, 400 cycles of shared memory and 128 matrix instructions."""
    parts = {name: Counter[str]() for name in count_cuda.PARTS}
    parts["tile: q k^T"].update(issued=800, shared=400, HMMA=128)
    found = dict((row[0], row[1:]) for row in count_cuda.model(parts, "runs", 64, 5))
    # 64 samples of 24 heads, 9 warps of up to two row blocks and 4 tiles each: 55,296 tiles for 132 multiprocessors of
    # 1.7 GHz.
    assert found["64 x 257 tokens"] == ("49", "99", "51")
