"""The cost model of the compiled kernels: what it reads from machine code."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

from onepeace_fast.kernels.launch import Configuration  # noqa: E402
from tools.kernel_model import pipeline, sass, timeline  # noqa: E402
from tools.kernel_model.compiled import Code, behind_copies, of_one_sum, parts, trips, without_short  # noqa: E402
from tools.kernel_model.constants import Span  # noqa: E402
from tools.kernel_model.launches import Launch  # noqa: E402

# As cuobjdump prints it; the second word of the load says 4 clocks, barrier 2 when it is there, wait for barrier 0.
LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/                   S2R R135, SR_TID.X ;                    /* 0x0000000000877919 */
                                                                           /* 0x000e620000002100 */
        /*0020*/              @!P0 LDG.E.128 R4, [R2.64] ;                 /* 0x0000000402048981 */
                                                                           /* 0x0012a8000c1e1d00 */
        /*0030*/                   BRA.U !UP0, 0x10 ;                      /* 0xfffffff908807547 */
                                                                           /* 0x000fea000b83ffff */
"""
LATENCY = {"l2": 200, "memory": 500, "shared": 30, "mufu": 20, "shuffle": 20, "operands": 10}


def code(*lines: str) -> list[sass.Instruction]:
    """Instructions at 0, 1, 2, ...; ``NAME operands``, a predicate first if there is one, then ``+N``: clocks."""
    found = []
    for address, line in enumerate(lines):
        text, _, clocks = line.partition(" +")
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        name, _, operands = rest.partition(" ")
        found.append(sass.Instruction(address, predicate, name, operands, int(clocks or 1)))
    return found


def test_instructions_are_read_with_their_barriers():
    first, second, load, branch = sass.parse(LISTING)
    assert (first.name, first.next_after, first.writes, first.reads, first.waits) == ("LDC", 1, None, None, ())
    assert (second.operands, second.next_after, second.writes) == ("R135, SR_TID.X", 1, 1)
    assert (load.predicate, load.name, load.next_after, load.writes, load.reads) == ("@!P0", "LDG.E.128", 4, 2, 1)
    assert load.waits == (0,) and load.kind == "global" and timeline.access_bytes(load) == 16
    assert (branch.target, branch.falls_through) == (16, True)
    with pytest.raises(ValueError, match="got none") as error:
        sass.parse("no code")
    assert len(str(error.value).splitlines()) == 1


NAMED = {
    "HGMMA.64x128x16.F32.BF16": "products", "HMMA.16816.F32.BF16": "products", "LDSM.16.M88.4": "ldsm",
    "LDS.128": "shared", "STSM.16.MT88.4": "shared", "MUFU.EX2": "mufu", "SHFL.BFLY": "shuffles", "LDG.E": "global",
    "LDGSTS.E.BYPASS.128": "global", "UTMALDG.2D": "global", "LDGDEPBAR": "barriers", "BAR.SYNC.DEFER_BLOCKING":
    "barriers", "WARPGROUP.DEPBAR.LE": "barriers", "SYNCS.PHASECHK.TRANS64.TRYWAIT": "barriers", "STL.64": "spills",
    "FFMA.FTZ": "float", "F2FP.BF16.F32.PACK_AB": "float", "IMAD.WIDE": "integer", "UIADD3": "integer",
    "BRA": "control",
}  # fmt: skip


def test_each_instruction_has_its_class():
    assert {name: sass.Instruction(0, "", name, "", 1).kind for name in NAMED} == NAMED


def test_the_main_loop_is_the_innermost_one_and_code_behind_the_end_makes_none():
    text = code(
        "MOV",             # 0
        "LDG R1",          # 1: the loop over tiles
        "@P1 BRA 0xa",     # 2: to what the compiler moved behind the end
        "HGMMA.64x8x16",   # 3: the loop over steps
        "@P0 BRA 0x3",     # 4
        "FADD",            # 5: the epilogue
        "@P2 BRA 0x7",     # 6
        "STG",             # 7
        "@P3 BRA 0x1",     # 8
        "EXIT",            # 9
        "NANOSLEEP",       # 10
        "BRA 0x3",         # 11: no loop, though it branches back
    )  # fmt: skip
    (found,) = parts(text)
    assert [[one.address for one in loop.code] for loop in found.main] == [[3, 4]]
    assert [one.address for one in found.after] == [5, 6, 7, 8] and [one.address for one in found.before] == [1, 2]
    assert sass.counts(found.after) == {"global": 1, "float": 1, "control": 2}


def test_each_loop_over_tiles_is_a_part_with_the_main_loops_in_it():
    text = code(
        "MOV",             # 0: the loop over modalities
        "LDG R1",          # 1: two products one after another for each tile
        "HGMMA.64x8x16",   # 2
        "@P0 BRA 0x2",     # 3
        "HGMMA.64x8x16",   # 4
        "@P0 BRA 0x4",     # 5
        "@P1 BRA 0x1",     # 6
        "MOV",             # 7: one product for each tile of another loop
        "HGMMA.64x8x16",   # 8
        "@P0 BRA 0x8",     # 9
        "FADD",            # 10
        "@P1 BRA 0x7",     # 11
        "@P2 BRA 0x0",     # 12
        "EXIT",            # 13
    )  # fmt: skip
    first, second = parts(text)
    assert [[one.address for one in loop.code] for loop in first.main] == [[2, 3], [4, 5]]
    assert [one.address for one in first.before] == [1] and [one.address for one in first.after] == [6]
    assert [one.address for one in second.working] == [8, 9]
    assert [one.address for one in second.before] == [7] and [one.address for one in second.after] == [10, 11]


def test_a_short_loop_of_products_stands_before_the_long_one_as_often_as_it_turns():
    (both,) = parts(
        code("LDG R1", "HGMMA.64x8x16", "@P0 BRA 0x1", "HGMMA.64x8x16", "@P0 BRA 0x3", "@P1 BRA 0x0", "EXIT")
    )
    found = without_short(both, 3)
    assert [one.address for one in found.working] == [3, 4] and len(found.main) == 1
    assert [one.address for one in found.before] == [0, 1, 2, 1, 2, 1, 2] and found.after == both.after


def turns(kernel, sizes, offsets=None, **given):
    """Turns of a launch of one program that adds up partial sums."""
    offsets = None if offsets is None else torch.tensor(offsets)
    named = SimpleNamespace(__name__=f"{kernel}_kernel")
    return trips(Launch("", Configuration(named, {"offsets": offsets, **given}, sizes, 4, grid=(1,))))


def test_partial_sums_take_as_many_turns_as_their_launch_has_of_them():
    sizes = {"BLOCK_ROWS": 2, "BLOCK_PROGRAMS": 4}
    assert turns("partial_sums", sizes, rows=1000, norm=0, modalities_per_norm=0, programs=10) == 3
    # Shares of 100 rows: programs 0 to 3 have rows of the first norm, 3 to 9 of the second, none of the third.
    of_norms = {"offsets": [0, 350, 1000, 1000], "rows": 1024, "modalities_per_norm": 1, "programs": 10}
    assert [turns("partial_sums", sizes, **of_norms, norm=norm) for norm in range(3)] == [1, 2, 0]
    assert turns("routed_ffn_sum_norm_tiles", {"BLOCK_TILES": 32}, row_tiles=33) == 2
    # Of 3 and 5 row tiles, the gradient of gamma adds up all.
    tiles, given = {"BLOCK_ROWS": 32, "BLOCK_TILES": 2}, {"offsets": [0, 70, 230], "rows": 230}
    assert turns("routed_ffn_sum_row_tiles", tiles, **given, dgamma=None) == 3
    assert turns("routed_ffn_sum_row_tiles", tiles, **given, dgamma=torch.empty(8, 1)) == 4


def test_of_the_loops_over_partial_sums_a_program_takes_one():
    (both,) = parts(code("MOV", "LDG R1", "@P0 BRA 0x1", "LDG R1", "FADD", "@P0 BRA 0x3", "STG", "EXIT"))
    found = of_one_sum(both)
    assert [one.address for one in found.working] == [3, 4, 5] and len(found.main) == 1
    assert [one.address for one in found.before] == [0, 6, 7]


def test_a_turn_over_rows_takes_its_share_of_a_load_where_rows_are_copied_ahead():
    (copying,), (loading,) = (parts(code(f"{name} R1", "FADD", "@P0 BRA 0x0", "EXIT")) for name in ("LDGSTS", "LDG"))
    loads = Span(500, 1000)
    assert behind_copies(Code({}, Span(300, 600), 0, 0), copying, loads, {"STAGES": 3}).clocks == (300, 600)
    assert behind_copies(Code({}, Span(300, 600), 0, 0), copying, loads, {"STAGES": 2}).clocks == (500, 1000)
    assert behind_copies(Code({}, Span(300, 600), 0, 0), loading, loads, {}).clocks == (300, 600)


def test_without_products_the_main_loop_is_the_innermost_one_that_loads():
    (found,) = parts(code("MOV", "LDG R1", "FADD", "@P0 BRA 0x1", "STG", "@P0 BRA 0x4", "EXIT"))
    assert [[one.address for one in loop.code] for loop in found.main] == [[1, 2, 3]]
    assert found.after == [] and [one.address for one in found.before] == [0, 4, 5, 6]


def test_a_warp_waits_for_what_it_loaded_and_for_the_stores_of_its_buffer():
    load, math, use = code("LDG R1 +2", "FADD +4", "FADD R2, R1 +4")
    text = [load._replace(writes=3), math, use._replace(waits=(3,))]
    assert timeline.warp_clocks(text, LATENCY, 500) == 500 + 4
    assert timeline.warp_clocks(text, LATENCY, 2) == 2 + 4 + 4
    assert timeline.exposed_loads(text) == 1 and timeline.exposed_loads([load, math, use]) == 0
    store, wait = code("UTMASTG.2D +2", "DEPBAR.LE SB0, 0x0 +1")
    assert timeline.warp_clocks([store, wait], LATENCY, 300) == 300 + 1


def test_warps_of_a_scheduler_take_turns_between_barriers():
    text = code("FADD +20", "BAR.SYNC +1", *["FADD +1"] * 4)
    assert timeline.warp_clocks(text, LATENCY, 500) == 21 + 4
    # Three warps: 21 clocks are enough for the two instructions of each, then each takes 4 of its own.
    assert timeline.warp_clocks(text, LATENCY, 500, warps=3) == 21 + 3 * 4


ALLOCATION = "%0 = ttg.local_alloc : () -> !ttg.memdesc<{}x128x64xbf16, #shared, #smem, mutable> loc(#loc290)\n"
OTHERS = (
    "%1 = ttg.local_alloc : () -> !ttg.memdesc<3x1xi64, #shared1, #smem, mutable>\n"
    "%2 = ttg.local_alloc %3 : (tensor<128x32xbf16, #blocked>) -> !ttg.memdesc<128x32xbf16, #shared, #smem>\n"
)


def pipeline_faults(buffers: tuple[int, ...], *loop: str, architecture: str = "sm_90", stages: int = 3) -> list[str]:
    ttgir = OTHERS + "".join(map(ALLOCATION.format, buffers))
    return pipeline.faults(pipeline.pipeline(ttgir, [code(*loop)]), architecture, stages)


def test_a_pipeline_has_as_many_buffers_as_stages_and_does_not_wait_for_the_product_it_started():
    deep, none = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert pipeline_faults((3, 3), deep) == []
    late = "pipeline: each product is waited for before the next one starts"
    assert pipeline_faults((3, 3), deep, none) == [late] == pipeline_faults((3, 3), "FADD")
    assert pipeline_faults((3, 2), deep) == ["pipeline: 2 buffers of an operand, not 3, for 3 stages"]
    assert pipeline_faults((), deep) == ["pipeline: 1 buffer of an operand, not 3, for 3 stages"]
    assert pipeline_faults((3,), deep) == ["pipeline: 1 buffer of an operand, not 3, for 3 stages"]


def test_copies_without_descriptors_need_one_buffer_fewer_and_leave_later_ones_outstanding():
    deep = "DEPBAR.LE SB0, 0x4"
    assert pipeline_faults((3, 3), deep, architecture="sm_80", stages=4) == []
    assert pipeline_faults((3,), deep, architecture="sm_80", stages=4) == []  # the other one passes through registers
    few = "pipeline: 2 buffers of an operand, not 3, for 4 stages"
    assert pipeline_faults((2, 3), deep, architecture="sm_80", stages=4) == [few]
    every = "pipeline: each step waits for all copies, the last ones among them"
    assert pipeline_faults((3, 3), "DEPBAR.LE SB0, 0x0", architecture="sm_80", stages=4) == [every]


def test_a_step_that_waits_for_its_own_loads_is_a_fault_but_where_triton_leaves_no_choice():
    load, use = code("LDG R1", "MOV R2, R1")
    made = pipeline.pipeline(ALLOCATION.format(3), [[load._replace(writes=1), use._replace(waits=(1,))]])
    (fault,) = pipeline.faults(made._replace(copies=2), "sm_80", 4)
    assert fault == "pipeline: a step waits for loads that it started itself"
    assert pipeline.is_known("sm_80", "routed_ffn: grouped_gradients", fault)
    assert not pipeline.is_known("sm_90", "routed_ffn: grouped_gradients", fault)
    assert not pipeline.is_known("sm_80", "routed_ffn: routed_ffn_hidden", fault)
