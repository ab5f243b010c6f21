"""Count what the forward kernel of attention issues: its compiled instructions by the source line that each comes from.

    python -m tools.count_cuda [--architecture sm_90a] [--head-size 64] [--value-size 64] [--lines]

A row is a part of the kernel: its instructions by class, as one warp issues them, and the cycles in which shared memory
is busy with them, 128 bytes each, without conflicts of banks. What a loop repeats counts once. Below them, for heads of
which there are 24, samples of one modality and one CLS: microseconds in which an H100's issue slots, shared memory and
tensor cores would each be busy.
"""

from __future__ import annotations

import argparse
import linecache
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from build_backend.cuda_toolkit import Toolkit, find_toolkit
from tools.compile_cuda import ARCHITECTURES, CSRC, HEAD_SIZES, HEADS

SOURCE = CSRC / "relative_bias_attention_forward.cu"
# A part of the kernel: a pattern of the source lines that lead to an instruction, outermost first, the first that fits.
PARTS = {
    "orders": r"describe_orders|mask_later|\border|_order\b|of_queries",
    "tile: bias of runs": r"start_scores.*start_runs",
    "tile: bias of any codes": r"start_scores.*visit_pairs",
    "tile: other kinds of bias": r"start_scores.*(start_rows|const float bias = is_cls|!is_cls .. query_code)",
    "narrow tile: bias": r"start_scores.*(start_cls|is_cls . |const ClsEntry)",
    "tile: choice of bias": r"start_scores",
    "tile: q k^T": r"attend_tile<KEYS>.*multiply_keys",
    "tile: mask": r"attend_tile<KEYS>.*(mask_keys|keys_are_whole|has_order)",
    "tile: rescale": r"attend_tile<KEYS>.*rescale",
    "tile: softmax, p v": r"attend_tile<KEYS>.*attend<COLUMNS>",
    "tile: rest": r"attend_tile<KEYS>",
    "codes of a tile": r"load_keys\(1 .*copy_codes|describe_keys",
    "load of CLS": r"load_keys\(1 .*copy_cls_keys",
    "load of a tile": r"load_keys\(1 ",
    "first load": r"load_keys\(0,",
    "narrow tile": r"attend_tile<BLOCK_ROWS>",
    "loop": r"(?<!has_keys. )cp_async_wait_all|this tile is there|has_next|key_rows.stage..modality == arg",
    "load of the bias": r"load_whole_bias",
    "store": r"rows\.store",
    "inert rows": r"zero_inert_rows",
    "begin": r"",
}
# Of a full tile of one modality's body, where all codes are runs, where they are not, and without a bias.
OF_TILE = ("choice of bias", "q k^T", "softmax, p v", "rest")
OF_CODES = {"runs": "bias of runs", "any": "bias of any codes", "none": "other kinds of bias"}
OF_LOAD = ("load of a tile", "loop")  # by idle warps too; the codes are one warp's
NARROW = ("narrow tile", "narrow tile: bias")
ONCE = ("tile: rescale", "first load", "load of the bias", "store", "begin")
CLASSES = {
    "HMMA": r"HMMA", "LDSM": r"LDSM", "LDS": r"LDS", "STS": r"STS", "ATOMS": r"ATOMS", "MUFU": r"MUFU",
    "SHFL": r"SHFL|VOTE", "FP32": r"F[A-Z0-9]+", "LDGSTS": r"LDGSTS", "global": r"LDG|STG|LD|ST",
    "barrier": r"BAR|WARPSYNC|BSSY|BSYNC|\w*DEPBAR",
}  # fmt: skip
OTHER = "integer"  # and addresses, branches, constants
SHAPES = ((64, 72), (64, 257), (32, 329), (16, 750), (16, 1025))  # samples, tokens of each
TILES = {(96, 96): (48, 4), (128, 64): (48, 4), (128, 128): (32, 4)}  # keys and warps, others' 64 and 5
ROW_BLOCKS = 2  # of a warp
CLOCK, ISSUED, HMMA_CYCLES = 1700.0, 4, 4096 / (4096 * 0.62)  # MHz; a cycle of a multiprocessor; by mma.sync


def disassembler() -> str:
    """nvdisasm, from Triton's own wheel."""
    from triton import knobs

    return knobs.nvidia.nvdisasm.path


def disassemble(nvcc: Path, architecture: str, source: Path = SOURCE) -> str:
    """Kernels' instructions, with the source lines of each and of all that it is inlined in."""
    target = f"-gencode=arch=compute_{architecture[3:]},code={architecture}"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        command = [nvcc, "-std=c++17", "-O3", "-lineinfo", f"-I{CSRC}", target, "-cubin", "-o", binary, source]
        subprocess.run(list(map(str, command)), check=True)
        listing = [disassembler(), "-gi", "-c", str(binary)]
        return subprocess.run(listing, capture_output=True, text=True, check=True).stdout


@cache
def source_line(file: str, number: int) -> str:
    """Its text; nothing where ptxas gives a line of one file as another's, as it does where it merges code."""
    return linecache.getline(file, number).strip()


def instructions(listing: str, kernel: str, patterns: Mapping[str, str] = PARTS) -> Iterator[tuple[str, str, str]]:
    """Each instruction of a kernel, by part of its mangled name: its part, its name and the line of csrc it is from."""
    functions = re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]
    function = next(text for text in functions if kernel in text.split(":")[0])
    chain: list[tuple[str, int]] = []
    inside = False
    for line in function.splitlines():
        if found := re.search(r'//## File "(.*?)", line (\d+)', line):
            chain = chain if inside else []
            chain.append((found[1], int(found[2])))
            inside = "inlined at" in line
        elif found := re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            if found[1] == "WARPSYNC.COLLECTIVE":
                return  # from here on code of warps whose lanes have parted, which ours do not
            mine = [(file, number) for file, number in reversed(chain) if file.startswith(str(CSRC))]
            text = " ".join(source_line(file, number) for file, number in mine)
            where = f"{Path(mine[-1][0]).name}:{mine[-1][1]}" if mine else "?"
            if found[1] not in ("NOP", "EXIT"):
                yield next(part for part, pattern in patterns.items() if re.search(pattern, text)), found[1], where


def class_of(name: str) -> str:
    """The class of an instruction."""
    base = name.split(".")[0]
    return next((kind for kind, pattern in CLASSES.items() if re.fullmatch(pattern, base)), OTHER)


def shared_cycles(name: str) -> int:
    """Cycles of shared memory for the 32 lanes: 128 bytes each, without conflicts of banks."""
    kind = class_of(name)
    if kind in ("LDSM", "LDGSTS"):
        return 4
    if kind == "ATOMS":  # reads and writes
        return 2
    return (4 if ".128" in name else 2 if ".64" in name else 1) if kind in ("LDS", "STS") else 0


def count(listing: str, kernel: str, patterns: Mapping[str, str] = PARTS) -> dict[str, Counter[str]]:
    """Instructions of each part by class, "issued" and "shared" among them."""
    parts = {part: Counter[str]() for part in patterns}
    for part, name, _ in instructions(listing, kernel, patterns):
        parts[part].update({class_of(name): 1, "issued": 1, "shared": shared_cycles(name)})
    return parts


def total(parts: dict[str, Counter[str]], names: Iterable[str]) -> Counter[str]:
    """Of some parts together."""
    result = Counter[str]()
    for name in names:
        result.update(parts[name])
    return result


def model(parts: dict[str, Counter[str]], codes: str, keys: int, warps: int) -> list[tuple[str, ...]]:
    """Microseconds of an H100 for each shape, by what is busy."""
    chip, rows = ARCHITECTURES["sm_90a"], []
    tile = total(parts, (f"tile: {name}" for name in (*OF_TILE, OF_CODES[codes])))
    load, narrow, once = total(parts, OF_LOAD), total(parts, NARROW), total(parts, ONCE)
    for samples, length in SHAPES:
        row_blocks, tiles = math.ceil((length - 1) / 16) + 1, math.ceil((length - 1) / keys)
        active = math.ceil(row_blocks / ROW_BLOCKS)
        blocks = math.ceil(active / warps)
        busy = Counter[str]()
        for kind in ("issued", "shared", "HMMA"):
            of_all = tiles * (load[kind] + parts["codes of a tile"][kind] / warps)
            of_rows = tiles * tile[kind] + narrow[kind] + once[kind]
            busy[kind] = samples * HEADS * (blocks * warps * of_all + active * of_rows)
        cycles = (busy["issued"] / ISSUED, busy["shared"], busy["HMMA"] * HMMA_CYCLES)
        times = (f"{value / chip.multiprocessors / CLOCK:.0f}" for value in cycles)
        rows.append((f"{samples} x {length} tokens", *times))
    return rows


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, tuple[int, int], Toolkit | None]:
    """The options, the head sizes of keys and of values among them, and nvcc; where there is none, say so."""
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--value-size", type=int, help="by default the head size")
    chosen = parser.parse_args(arguments)
    sizes = chosen.head_size, chosen.value_size or chosen.head_size
    if sizes not in HEAD_SIZES:
        parser.error(f"--head-size, --value-size: expected one of {HEAD_SIZES}, got {sizes}")
    toolkit = find_toolkit()
    if toolkit is None:
        print("CUDA kernels: not counted, there is no nvcc; set CUDA_HOME, or put it on PATH")
    return chosen, sizes, toolkit


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, count, print; where there is no nvcc, say so and return 0."""
    from onepeace_fast.info import format_table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default="sm_90a", choices=ARCHITECTURES)
    parser.add_argument("--lines", action="store_true", help="print each line of each part, too")
    chosen, sizes, toolkit = parse(parser, arguments)
    if toolkit is None:
        return 0
    listing = disassemble(toolkit.nvcc, chosen.architecture)
    kernel = "bfloat16Li{}ELi{}ELb0ELb0".format(*sizes)
    parts = count(listing, kernel)
    kinds = (*CLASSES, OTHER, "issued", "shared")
    print(format_table([("a warp", *kinds), *((part, *(str(of[k]) for k in kinds)) for part, of in parts.items())], ""))
    keys, warps = TILES.get(sizes, (64, 5))
    load = total(parts, OF_LOAD)
    for codes in OF_CODES:
        tile = total(parts, (f"tile: {name}" for name in (*OF_TILE, OF_CODES[codes])))
        issued, shared = tile["issued"] + load["issued"], tile["shared"] + load["shared"]
        print(f"\ncodes: {codes}; a tile and the load of the next {issued} issued, {shared} shared\n")
        print(format_table([("H100, us", "issue", "shared", "tensor"), *model(parts, codes, keys, warps)], indent=""))
    if chosen.lines:
        found = Counter((part, where) for part, _, where in instructions(listing, kernel))
        lines = [(part, where, str(number)) for (part, where), number in sorted(found.items())]
        print()
        print(format_table([("part", "line", "issued"), *lines], indent=""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
