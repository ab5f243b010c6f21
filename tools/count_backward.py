"""Count what the backward pass of attention issues, as tools/count_cuda.py does for the forward pass.

    python -m tools.count_backward [--head-size 64] [--value-size 64]

A row is a part of the largest kernel: its instructions by class, in all copies that the compiler made of it, and what
one of them is repeated for. Below them, for heads of which there are 24, samples of one modality and one CLS:
microseconds in which an H100's issue slots, shared memory and tensor cores would each be busy, on the multiprocessor
that has most to do. Then those of the row sums before it, and in which device memory would be busy with the sums of
dq behind it, where a walk does not hold all keys.

The bias is none; frozen, so that it does not learn; or it learns, with codes that are runs and have sums by difference,
runs that have none, or any codes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools import count_cuda
from tools.compile_cuda import ARCHITECTURES, HEADS
from tools.count_cuda import CLASSES, CLOCK, HMMA_CYCLES, ISSUED, OTHER, SHAPES, TILES, count, disassemble

SOURCE = """
#include "backward_launch.cuh"
#include "backward_walks.cuh"

namespace onepeace_fast {{
template LaunchWalks launch_walks<bfloat16, {0}, {1}, false>;
template decltype(launch_backward<bfloat16, {0}, {1}>) launch_backward<bfloat16, {0}, {1}>;
}}  // namespace onepeace_fast
"""
CLS_ENTRIES = 3
BANDWIDTH = 3.0e6  # bytes of device memory in a microsecond


class Part(NamedTuple):
    """A pattern of the source lines that lead to an instruction, and what a warp issues it for.

    What all lanes read together is one cycle of shared memory, however wide.
    """

    pattern: str
    repeated: str
    read_together: bool = False


OWN = r"find_probabilities\(probabilities\[slot\]"
STORED = r"store_queries.*"
PARTS = {
    # What one sample in many does, or none: CLS rows among others, orders, several runs in a row block.
    "seldom": Part(
        r"i >= sample.cls|sample.first\[m\] \+ sample.body\[m\]|hide_later|orders|_order\b|refuse_sample|fill_rows|"
        r"zero_inert_rows|first_run|next_run|\binside\b|uint32_t (rows|columns)|load_element|"
        r"load_queries\(0", "nothing"),
    "p: bias of a run": Part(OWN + r".*(float\* entries|DIAGONALS|bias\[diagonal)", "halves of runs"),
    "p: bias of any codes": Part(OWN + r".*visit_entries.*(int shift|int key = |visit\(n, 2|!=)", "halves of any"),
    "p: bias of CLS": Part(OWN + r".*visit_entries.*(find_entry|entry >= 0)", "halves of CLS"),
    "p: no run": Part(OWN + r".*(visit_entries|Side keys|queries\(stage|bias_vectors|is_key)", "halves of no run"),
    "p": Part(OWN, "pairs", read_together=True),
    "q k^T, p g, g v^T, ds q": Part(r"multiply<Launch|accumulate<Launch", "pairs"),
    "ds to memory": Part(r"leave_score_gradient", "pairs"),
    "sums: by difference": Part(r"add_to_sums.*(difference_sums|int index|index >= 0)", "halves by difference"),
    "sums: along diagonals": Part(
        r"add_to_sums.*(add_diagonals\(values|int entry = queries)", "halves by diagonal"),
    "sums: of any codes": Part(
        r"add_to_sums.*visit_entries.*(int shift|int key = |visit\(n, 2|keys.vector !=)", "halves by pair"),
    "sums: of CLS, adds": Part(r"add_to_sums.*visit_entries.*(scaled|atomicAdd)", "adds by CLS"),
    "sums: of CLS": Part(r"add_to_sums.*visit_entries", "halves by CLS"),
    "sums: in fixed point": Part(
        r"add_to_sums.*(Side keys|is_key|find_run_starts|add_bias_gradient|arguments, backward|runs &)",
        "halves in fixed point"),
    "sums: choice": Part(r"add_to_sums", "halves that learn"),
    "sums: fixed point": Part(r"prepare_sums.*(const int64_t sum|high|low = |int i = )|flush.*(int i =|sum|high)",
                              "entries"),
    "sums: ready": Part(r"prepare_sums|share_largest", "tiles that learn"),
    "r": Part(r"share_sums|find_row_sum.*partial_sums", "tiles whole"),
    "ds": Part(r"differentiate<Launch>", "tiles"),
    "dq: products": Part(r"find_query_gradient.*(mma<T>|ldmatrix|right_operand)", "steps of dq"),
    "dq: in parts": Part(
        STORED + r"(count\) continue|int64_t rows|query_parts|before|row = lane / 4 )", "pieces of dq in parts"),
    "dq: whole": Part(STORED + r"(staged|pack<T>|lane / 2|row < row_block|the rows|next rows)", "pieces of dq whole"),
    "dq": Part(r"find_query_gradient", "tiles"),
    "spread: no CLS": Part(
        r"spread.find_probabilities\(.*(float\* entries|DIAGONALS|bias\[diagonal|int key = |visit\(n, 2)", "nothing"),
    "spread: p": Part(r"spread.find_probabilities\(", "spread halves"),
    "spread: r, dk, dv": Part(r"spread.row_sum|spread.accumulate|spread.differentiate.*Side keys", "spread tiles"),
    "spread: ds": Part(r"spread.differentiate", "spread rows"),
    "spread: store": Part(r"spread.(store|begin)\(", "spread walks"),
    "runs of queries": Part(r"find_query_runs", "tiles, one warp"),
    "load: of queries, rows": Part(
        r"load_queries\(1 .*(thread < TILE|int half|int count|Row row = |_code|_exp|row_sums|query_rows|"
        r"BLOCK_ROWS (<|==)|int64_t index)", "tiles, one warp"),
    "load: of queries": Part(r"load_queries\(1 ", "tiles"),
    "load: of keys": Part(
        r"load_keys\(first.*(int row = i|cp_async_16|T\* target|target =|has_value)", "copies of keys"),
    "store of keys: rows": Part(r"store_keys.*(int i = lane|int row = i|gradient_row|\(row, chunk)", "copies of rows"),
    "store of keys": Part(r"store_keys|find_key_run", "key blocks"),
    "walk": Part(r"load_keys\(first|for \(int tile|int tiles", "walks"),
    "tile": Part(r"walk_keys\(", "tiles"),
    "differences to entries: sums": Part(r"add_all_differences.*\.along\(", "sums along"),
    "differences to entries": Part(r"add_all_differences", "entries of differences"),
    "sample": Part(r"read_sample|key_block|is_whole|sample = |flush|walks_whole|nobody reads the sample", "samples"),
    "thread block": Part(r"", "thread blocks"),
}  # fmt: skip
# What a bias may be: there is none, it does not learn; codes of all row blocks are runs and have sums by difference, or
# have none; codes are no runs.
BIASES = ("none", "frozen", "differences", "runs", "any")


def compile_text(nvcc: Path, sizes: tuple[int, int]) -> str:
    """The backward pass's instructions for one pair of head sizes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "backward.cu"
        source.write_text(SOURCE.format(*sizes), encoding="utf-8")
        return disassemble(nvcc, "sm_90a", source)


def walks_of(key_blocks: int, slots: int) -> list[int]:
    """Key blocks of each walk: one more than there are slots where that ends the sample."""
    walks = []
    while key_blocks:
        walks.append(key_blocks if key_blocks <= slots + 1 else slots)
        key_blocks -= walks[-1]
    return walks


def repeats(length: int, sizes: tuple[int, int], entries: int, bias: str) -> Counter[str]:
    """How often warps of a thread block issue each kind of part, for a sample of one modality and one CLS.

    Of what the compiler has several copies of, as many times less.
    """
    warps, copies = 8, 2 if sum(sizes) < 192 else 1
    slots, columns = warps * copies, sizes[0] // 16
    whole, part = divmod(length - 1, 16)
    bodies = whole + bool(part)
    walks, tiles = walks_of(bodies + 1, slots), math.ceil((bodies + 1) / 2)
    spread = sum(walk > slots for walk in walks)  # 0 or 1: what is spread is CLS
    own, learns = bodies + 1 - spread, bias not in ("none", "frozen")
    all_halves, pairs = own * 2 * tiles, bodies * bodies
    runs = whole * whole if bias in ("frozen", "differences", "runs") else 0
    pieces = len(walks) * (bodies + 1) * columns
    found = Counter({
        "halves of runs": runs, "halves of any": (pairs - runs) * (bias != "none"),
        "halves of CLS": (all_halves - pairs) * (bias != "none"), "halves of no run": all_halves - runs,
        "halves by difference": pairs * (bias == "differences"), "halves by diagonal": pairs * (bias == "runs"),
        "halves by pair": pairs * (bias == "any"), "halves by CLS": (all_halves - pairs) * learns,
        "adds by CLS": (all_halves - pairs) * learns / 4,  # of a lane's eight values two are in a row of CLS
        "halves in fixed point": (all_halves - pairs * (bias == "differences")) * learns,
        "halves that learn": all_halves * learns,
    })  # fmt: skip
    found = Counter({name: number / (2 * copies) for name, number in found.items()})
    found.update({
        "pairs": own * tiles / copies, "key blocks": own / copies, "copies of rows": own * columns / copies,
        "copies of keys": (bodies + 1) * columns, "tiles": warps * tiles * len(walks),
        "tiles, one warp": tiles * len(walks), "walks": warps * len(walks), "samples": warps,
        "tiles that learn": warps * tiles * len(walks) * learns,
        "tiles whole": warps * tiles * (len(walks) == 1),
        "entries": warps * math.ceil(entries / (32 * warps)) * learns,
        "steps of dq": 2 * columns * tiles * (bodies + 1) / 3,  # two in the loop, and one behind it
        "pieces of dq in parts": pieces * (len(walks) > 1), "pieces of dq whole": pieces * (len(walks) == 1),
        "spread halves": 2 * tiles * spread, "spread tiles": warps * tiles * spread, "spread rows": tiles * spread,
        "spread walks": warps * spread,
    })  # fmt: skip
    return found


def repeats_of_block(entries: int, bias: str) -> Counter[str]:
    """As repeats, for what a thread block does beside its samples."""
    warps, found = 8, Counter({"thread blocks": 8.0})
    if bias == "differences":
        trips = warps * math.ceil(entries / (32 * warps))
        # Of 32 entries one is within 16 of each of up to four differences; the diagonals of each have four lanes.
        found.update({"entries of differences": trips, "sums along": trips * 4 * 4})
    return found


def most_work(samples: int, of_sample: float, of_block: float) -> float:
    """Of the multiprocessor that has most to do, by the groups of samples that end soonest (backward_workspace.cuh)."""
    chip = ARCHITECTURES["sm_90a"].multiprocessors
    first = min(samples, max(1, 2 * chip // HEADS))
    return min(
        math.ceil(groups * HEADS / chip) * (math.ceil(samples / groups) * of_sample + of_block)
        for groups in range(first, min(samples, 4 * first) + 1)
    )


def entries_of(length: int) -> int:
    """Of a vector with CLS: of a square grid where the tokens are one, else of a sequence."""
    side = math.isqrt(length - 1)
    return CLS_ENTRIES + ((2 * side - 1) ** 2 if side * side == length - 1 else 2 * (length - 1) - 1)


def model(parts: Mapping[str, Counter[str]], sizes: tuple[int, int], bias: str) -> dict[str, tuple[float, ...]]:
    """Microseconds of an H100 for each shape, in which issue slots, shared memory and tensor cores are busy."""
    found = {}
    for samples, length in SHAPES:
        arguments = length, sizes, entries_of(length), bias
        work = []
        for kind in ("issued", "shared", "HMMA"):
            of_sample, of_block = (
                sum(part[kind] * repeated[PARTS[name].repeated] for name, part in parts.items())
                for repeated in (repeats(*arguments), repeats_of_block(*arguments[2:]))
            )
            work.append(most_work(samples, of_sample, of_block))
        cycles = (work[0] / ISSUED, work[1], work[2] * HMMA_CYCLES)
        found[f"{samples} x {length} tokens"] = tuple(value / CLOCK for value in cycles)
    return found


def count_parts(listing: str, kernel: str) -> dict[str, Counter[str]]:
    """Instructions of each part by class, "issued" and "shared" among them."""
    parts = count(listing, kernel, {name: part.pattern for name, part in PARTS.items()})
    for name, part in PARTS.items():
        if part.read_together:
            parts[name]["shared"] = parts[name]["LDS"]
    return parts


def rows_of(
    parts: Mapping[str, Counter[str]], sums: dict[str, Counter[str]], sizes: tuple[int, int]
) -> list[tuple[str, ...]]:
    """The table of microseconds: the largest kernel, the row sums where they run, the sums of dq."""
    rows, slots = [], 16 if sum(sizes) < 192 else 8
    for bias in BIASES:
        codes = {"none": "none", "any": "any"}.get(bias, "runs")
        before = {name: times for name, *times in count_cuda.model(sums, codes, *TILES.get(sizes, (64, 5)))}
        for (samples, length), (name, times) in zip(SHAPES, model(parts, sizes, bias).items(), strict=True):
            elements = samples * length * HEADS * sizes[0]
            others = [*before[name], f"{elements * (4 + 2) / BANDWIDTH:.0f}"]
            in_parts = math.ceil((length - 1) / 16) > slots
            rows.append((name, bias, *(f"{time:.0f}" for time in times), *(others if in_parts else ["0"] * 4)))
    return sorted(rows, key=lambda row: [f"{samples} x {length} tokens" for samples, length in SHAPES].index(row[0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, count, print; where there is no nvcc, say so and return 0."""
    from onepeace_fast.info import format_table

    _, sizes, toolkit = count_cuda.parse(argparse.ArgumentParser(description=__doc__.split("\n")[0]), arguments)
    if toolkit is None:
        return 0
    listing = compile_text(toolkit.nvcc, sizes)
    parts = count_parts(listing, "attention_backward_kernelI13__nv_bfloat16Li{}ELi{}ELb0ELb0E".format(*sizes))
    sums = count(listing, "attention_row_sums_kernelI13__nv_bfloat16Li{}ELi{}ELb0ELb0E".format(*sizes))
    kinds = (*CLASSES, OTHER, "issued", "shared")
    table = [(part, *(str(of[kind]) for kind in kinds), PARTS[part].repeated) for part, of in parts.items()]
    print(format_table([("a warp", *kinds, "repeated for"), *table], indent=""))
    print()
    headings = ("H100, us", "bias", "issue", "shared", "tensor", "row sums: issue", "shared", "tensor", "dq: memory")
    print(format_table([headings, *rows_of(parts, sums, sizes)], indent=""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
