"""What the model has to know of a compiled launch: resources, instructions by class, a warp's clocks, faults."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from tools.kernel_model import sass
from tools.kernel_model.constants import Span, constants
from tools.kernel_model.launches import Launch, Shape, recorded
from tools.kernel_model.pipeline import faults, pipeline
from tools.kernel_model.timeline import exposed_loads, warp_clocks

PIECES = ("main", "epilogue", "before")
# A product that adds a few columns, as many as the argument says, in a loop of their own before the others.
SHORT_LOOPS = {"routed_ffn_output": "a_tiles"}
# Launches that add up partial sums, and how many at a time; a program takes one of several loops, each of a vector.
SUMS = {
    "partial_sums": "BLOCK_PROGRAMS",
    "routed_ffn_sum_norm_tiles": "BLOCK_TILES",
    "routed_ffn_sum_row_tiles": "BLOCK_TILES",
}
SCHEDULERS = 4  # of a multiprocessor; each has a quarter of a program's warps


@dataclass(frozen=True)
class Code:
    """Instructions of one warp by class, bytes that it moves through shared memory, clocks of a program's warps."""

    counts: dict[str, int]
    clocks: Span
    shared_bytes: int
    exposed_loads: int

    @property
    def instructions(self) -> int:
        """Of all classes."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Part:
    """What a program does for each tile of one of its loops over tiles; in a kernel without products all of its code.

    ``main`` is one turn of the main loop, or of several one after another (``main_loops``); ``epilogue`` what follows
    it in a tile of products, ``before`` what comes before it, and without products all that is outside the main loop.
    """

    main: Code
    epilogue: Code
    before: Code
    main_loops: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Part:
        """What ``dataclasses.asdict`` made of one, and JSON of that."""
        codes = {piece: Code(**{**value[piece], "clocks": Span(*value[piece]["clocks"])}) for piece in PIECES}
        return cls(**{**value, **codes})


@dataclass(frozen=True)
class Compiled:
    """A launch on an architecture, with a part for each of its loops over tiles, in the order of the code."""

    name: str
    architecture: str
    programs: int  # of the launch
    tile: tuple[int, ...]  # of products: rows, columns and inner columns
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    resident: int  # programs that a multiprocessor holds
    traffic: int  # bytes of device memory
    trips: int  # of the main loop in each program, where there are no products
    parts: tuple[Part, ...]
    buffers: tuple[int, ...]
    outstanding: int | None
    faults: tuple[str, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Compiled:
        """What ``dataclasses.asdict`` made of one, and JSON of that."""
        lists = {name: tuple(value[name]) for name in ("tile", "buffers", "faults")}
        return cls(**{**value, **lists, "parts": tuple(map(Part.from_json, value["parts"]))})

    @property
    def has_products(self) -> bool:
        """Whether it multiplies on tensor cores."""
        return "products" in self.parts[0].main.counts


def code_of(code: Sequence[sass.Instruction], architecture: str, loads: Span, warps: float) -> Code:
    """What straight code comes to, with latencies of a load from least to most, and so many warps of a scheduler.

    At least these overlap between barriers; at most each waits until the others have issued all of theirs.
    """
    latency = constants().chips[architecture].latency
    low = warp_clocks(code, latency, loads.low, warps)
    clocks = Span(low, max(low, warp_clocks(code, latency, loads.high) + (warps - 1) * len(code)))
    return Code(sass.counts(code), clocks, sum(map(_shared_bytes, code)), exposed_loads(code))


def _shared_bytes(one: sass.Instruction) -> int:
    """Bytes of shared memory that a warp's instruction moves; wgmma reads its operands there, a warp its quarter."""
    if one.base == "HGMMA":
        rows, columns, inner = (int(n) for n in one.name.split(".")[1].split("x"))
        # Four warps together; the left operand may be in registers, which Triton does not do here.
        return 2 * inner * (rows + columns) // 4
    if one.base in ("LDSM", "STSM"):
        return 512 if ".4" in one.name or "x4" in one.name else 256 if ".2" in one.name else 128
    if one.base in ("LDS", "STS", "LDGSTS"):
        return 32 * (16 if ".128" in one.name else 8 if ".64" in one.name else 4)
    return 0


def partial_sums(launch: Launch) -> int:
    """The most partial sums that a program of a launch in ``SUMS`` adds up."""
    constant, given = launch.configuration.constants, launch.configuration.arguments
    if launch.kernel == "routed_ffn_sum_norm_tiles":
        return given["row_tiles"]
    bounds = [0, given["rows"]] if given["offsets"] is None else given["offsets"].tolist()
    if launch.kernel == "routed_ffn_sum_row_tiles":
        tiles = [-(-(stop - start) // constant["BLOCK_ROWS"]) for start, stop in pairwise(bounds)]
        return max(tiles) if given["dgamma"] is None else sum(tiles)
    # Of the programs that left them, those with rows of the norm.
    modalities = given["modalities_per_norm"] or 1
    start, stop = bounds[given["norm"] * modalities], bounds[(given["norm"] + 1) * modalities]
    rows = -(-bounds[-1] // given["programs"])
    share = max(-(-rows // constant["BLOCK_ROWS"]), 1) * constant["BLOCK_ROWS"]
    return -(-stop // share) - start // share if start < stop else 0


def trips(launch: Launch) -> int:
    """Turns of the main loop in a program of a kernel without products, the most of all programs."""
    configuration, (programs, *_) = launch.configuration, launch.configuration.grid
    constant, given = configuration.constants, configuration.arguments
    if launch.kernel in SUMS:
        return -(-partial_sums(launch) // constant[SUMS[launch.kernel]])
    if "PARTS" in constant:  # its programs walk over shares of the rows
        blocks = -(-given["rows"] // constant["BLOCK_ROWS"])
        return -(-blocks // programs)
    columns = {"routed_ffn_fold": "hidden", "routed_ffn_scale_gradient": "width"}.get(launch.kernel)
    return 1 if columns is None else -(-given[columns] // constant["BLOCK_COLUMNS"])


class Pieces(NamedTuple):
    """Code in pieces: of a kernel with products what a program does for each tile of a loop over them, else all."""

    main: list[sass.Loop]
    working: list[sass.Instruction]
    after: list[sass.Instruction]
    before: list[sass.Instruction]


def parts(code: Sequence[sass.Instruction]) -> list[Pieces]:
    """The main loops, and what stands after and before them; all that is not in them is before, without products."""
    loops = sass.loops(code)
    main = sass.main_loops(code, loops)
    if not any(one.kind == "products" for loop in main for one in loop.code):
        return [_pieces(None, main, code)]
    return [_pieces(around, mine, code) for around, mine in sass.tile_loops(loops, main)]


def _pieces(around: sass.Loop | None, main: list[sass.Loop], code: Sequence[sass.Instruction]) -> Pieces:
    inside = frozenset().union(*(loop.addresses for loop in main))
    working = [one for loop in main for one in loop.code]
    if around is None:
        return Pieces(main, working, [], [one for one in code if one.address not in inside])
    last, rest = max(loop.tail for loop in main), [one for one in around.code if one.address not in inside]
    # What the compiler moved behind the end of the loop is seldom run.
    after = [one for one in rest if last < one.address <= around.tail]
    return Pieces(main, working, after, [one for one in rest if one.address < last])


def _steps_of_short(launch: Launch) -> int:
    configuration = launch.configuration
    return -(-configuration.arguments[SHORT_LOOPS[launch.kernel]] // configuration.constants["BLOCK_INNER"])


def without_short(part: Pieces, steps: int) -> Pieces:
    """The first main loop's steps, too few for a pipeline, stand before the second one."""
    short, main = sorted(part.main, key=lambda loop: loop.tail)
    return Pieces([main], [*main.code], part.after, [*part.before, *short.code * steps])


def of_one_sum(part: Pieces) -> Pieces:
    """Of several loops, each over the partial sums of a vector, the longest: a program takes one of them."""
    longest = max(part.main, key=lambda loop: len(loop.code))
    return part._replace(main=[longest], working=[*longest.code])


def behind_copies(code: Code, part: Pieces, loads: Span, constants_of: Mapping[str, Any]) -> Code:
    """A turn that reads what earlier turns copied ahead: so many of them take at least as long as a load."""
    if not any(one.base == "LDGSTS" for one in part.working):
        return code
    ahead = constants_of["STAGES"] - 1
    low, high = (max(clocks, load / ahead) for clocks, load in zip(code.clocks, loads, strict=True))
    return replace(code, clocks=Span(low, high))


def read(launch: Launch, name: str, architecture: str, text: str, ttgir: str, used: Any) -> Compiled:
    """What is known of a launch from its machine code and intermediate code."""
    from tools.cubin import CHIPS

    configuration, latency = launch.configuration, constants().chips[architecture].latency
    found_parts = parts(sass.parse(text))
    has_products = any(one.kind == "products" for one in found_parts[0].working)
    if launch.kernel in SHORT_LOOPS and len(found_parts[0].main) == 2:
        found_parts[0] = without_short(found_parts[0], _steps_of_short(launch))
    if launch.kernel in SUMS:
        found_parts[0] = of_one_sum(found_parts[0])
    # An epilogue reads what the caches hold and what they do not; a kernel over rows reads all from memory.
    near = Span(latency["l2"], latency["memory"])
    loads = near if has_products else Span(latency["memory"], constants().loaded_latency * latency["memory"])
    made = pipeline(ttgir, [loop.code for part in found_parts for loop in part.main])
    warps = configuration.num_warps
    codes = [
        Part(
            *(code_of(piece, architecture, loads, max(1, warps / SCHEDULERS)) for piece in part[1:]), len(part.main)
        )
        for part in found_parts
    ]  # fmt: skip
    if not has_products:
        codes = [replace(codes[0], main=behind_copies(codes[0].main, found_parts[0], loads, configuration.constants))]
    found = [f"spills: {used.local} bytes of local memory"] if used.local else []
    tile: tuple[int, ...] = ()
    if has_products:
        tile = tuple(configuration.constants[size] for size in ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_INNER"))
        found += faults(made, architecture, configuration.num_stages)
    return Compiled(
        name=name,
        architecture=architecture,
        programs=prod(configuration.grid),
        tile=tile,
        warps=warps,
        stages=configuration.num_stages or 0,
        registers=used.registers,
        spilled=used.local,
        shared=used.shared,
        resident=CHIPS[architecture].programs_at_once(used.registers, used.shared, warps),
        traffic=launch.traffic,
        trips=trips(launch),
        parts=tuple(codes),
        buffers=made.buffers,
        outstanding=made.copies if made.products is None else made.products,
        faults=tuple(found),
    )


def compile_launch(launch: Launch, name: str, architecture: str) -> Compiled:
    """Compile a launch as it would be for a GPU that need not be there, and read what came of it."""
    from tools.compile_kernels import target
    from tools.cubin import CHIPS, sass_of, usage

    with target(CHIPS[architecture].capability):
        compiled = launch.configuration.kernel.warmup(grid=(1,), **launch.configuration.keywords)
    return read(launch, name, architecture, sass_of(compiled), compiled.asm["ttgir"], usage(compiled))


def work(job: tuple[Shape, str, str]) -> Compiled:
    """Compile one launch in this process."""
    import torch

    torch.set_num_threads(1)
    shape, architecture, name = job
    return compile_launch(_recorded(shape, architecture)[name], name, architecture)


@functools.lru_cache(maxsize=2)
def _recorded(shape: Shape, architecture: str) -> dict[str, Launch]:
    return recorded(shape, architecture)


def compile_all(shape: Shape, architectures: Sequence[str], workers: int) -> list[Compiled]:
    """Every launch for every architecture, compiled by other processes into a folder that is deleted afterwards."""
    jobs = [(shape, architecture, name) for architecture in architectures for name in recorded(shape, architecture)]
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
                return pool.map(work, jobs, chunksize=1)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
