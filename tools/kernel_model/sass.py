"""Machine code of a kernel as ``cuobjdump --dump-sass`` prints it: instructions, their classes, loops.

From Volta on 21 bits of an instruction's second word tell the hardware when the next one may go: how many clocks later,
which of six barriers it sets when its result is there, and which of them it waits for. So the compiled text says how
long one warp needs, but for what memory adds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

NO_BARRIER = 7
# The first pattern that an operation's name begins with decides.
CLASSES = {
    "products": r"HGMMA|HMMA|UTC\w*MMA|QGMMA|IMMA",
    "ldsm": r"LDSM",
    "shared": r"LDS|STS|STSM|ATOMS|UBLKCP",
    "mufu": r"MUFU",
    "shuffles": r"SHFL",
    "global": r"LDG|STG|LDGSTS|UTMALDG|UTMASTG|RED|ATOMG|ATOM",
    "spills": r"LDL|STL",
    "barriers": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|MEMBAR|FENCE|ERRBAR|UTMACMDFLUSH|ARRIVES|NANOSLEEP|"
    r"UCGABAR_\w+",
    "float": r"FADD|FMUL|FFMA|FSETP|FSEL|FSET|FMNMX|FCHK|FSWZADD|F2F|F2FP|F2I|I2F|I2FP|HADD2|HFMA2|HMUL2|HSETP2|HMNMX2|"
    r"FRND",
    "control": r"BRA|BRX|JMP|EXIT|CALL|RET|BSSY|BSYNC|BREAK|NOP|ELECT|VOTE|VOTEU|YIELD|S2R|S2UR|CS2R|LDC|LDCU|ULDC|"
    r"R2B|PLOP3|UPLOP3|P2R|R2P|BMOV|USETMAXREG|CCTL|UTMACCTL|PREFETCH|ACQBULK",
}
OTHER = "integer"  # addresses, indices, moves
NAMES = (*CLASSES, OTHER)
_CLASSES = [(name, re.compile(rf"(?:{pattern})$")) for name, pattern in CLASSES.items()]
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", re.MULTILINE
)
_SECOND_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_BRANCHES = ("BRA", "JMP")
_ENDS = ("EXIT", "RET", "BRX", "KILL")


class Instruction(NamedTuple):
    """One instruction; the warp's next one may go ``next_after`` clocks later.

    ``waits`` are the barriers that it waits for; ``writes`` is set when its result is there, ``reads`` when its
    operands may be overwritten.
    """

    address: int
    predicate: str
    name: str
    operands: str
    next_after: int
    writes: int | None = None
    reads: int | None = None
    waits: tuple[int, ...] = ()

    @property
    def base(self) -> str:
        """Its name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def kind(self) -> str:
        """Its class."""
        return next((name for name, pattern in _CLASSES if pattern.match(self.base)), OTHER)

    @property
    def target(self) -> int | None:
        """Where a branch goes to; None for what is none."""
        found = _TARGET.search(self.operands) if self.base in _BRANCHES else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.base in _BRANCHES:
            return bool(self.predicate) or "," in self.operands
        return self.base not in _ENDS or bool(self.predicate)


class Loop(NamedTuple):
    """The instructions of a natural loop, in the order of their addresses, and the address of its last branch back."""

    code: tuple[Instruction, ...]
    tail: int

    @property
    def addresses(self) -> frozenset[int]:
        """Where they stand."""
        return frozenset(one.address for one in self.code)


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel; raise ValueError in one line where there are none."""
    found = []
    for line in _LINE.finditer(text):
        second = _SECOND_WORD.search(text, line.end())
        word = int(second[1], 16) if second else 0
        writes, reads = (None if barrier == NO_BARRIER else barrier for barrier in (word >> 46 & 7, word >> 49 & 7))
        waits = tuple(barrier for barrier in range(6) if word >> 52 + barrier & 1)
        found.append(
            Instruction(int(line[1], 16), line[2] or "", line[3], line[4], word >> 41 & 15, writes, reads, waits)
        )
    if not found:
        raise ValueError("SASS: expected instructions with their two words, got none; is this cuobjdump --dump-sass?")
    return found


def counts(code: Iterable[Instruction]) -> dict[str, int]:
    """How many there are of each class."""
    counter = Counter(instruction.kind for instruction in code)
    return {name: counter[name] for name in NAMES if counter[name]}


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Every natural loop, the smallest first: a branch back to where every way to it has passed, and what lies between.

    So code that the compiler moved behind the end, which branches back as well, makes no loop of its own.
    """
    blocks, following = _blocks(code)
    dominators = _dominators(following)
    bodies: dict[int, set[int]] = {}
    tails: dict[int, int] = {}
    before: list[list[int]] = [[] for _ in blocks]
    for block, nexts in enumerate(following):
        for one in nexts:
            before[one].append(block)
    for tail, nexts in enumerate(following):
        for head in nexts:
            if not dominators[tail] >> head & 1:
                continue
            body, open_ = bodies.setdefault(head, {head}), [tail]
            tails[head] = max(tails.get(head, 0), blocks[tail][-1].address)
            while open_:
                if (block := open_.pop()) not in body:
                    body.add(block)
                    open_ += before[block]
    found = [
        Loop(tuple(one for block in sorted(body) for one in blocks[block]), tails[head])
        for head, body in bodies.items()
    ]
    return sorted(found, key=lambda loop: len(loop.code))


def _blocks(code: Sequence[Instruction]) -> tuple[list[Sequence[Instruction]], list[list[int]]]:
    """Runs of instructions that nothing enters or leaves but at their ends, and which of them follow each."""
    starts = {code[0].address} | {one.target for one in code if one.target is not None}
    starts |= {nxt.address for one, nxt in pairwise(code) if one.target is not None or _ends(one)}
    edges = [i for i, one in enumerate(code) if one.address in starts]
    blocks = [code[start:stop] for start, stop in zip(edges, [*edges[1:], len(code)], strict=True)]
    number = {block[0].address: i for i, block in enumerate(blocks)}
    following = []
    for i, block in enumerate(blocks):
        last = block[-1]
        nexts = [i + 1] if last.falls_through and i + 1 < len(blocks) else []
        if last.target in number:
            nexts.append(number[last.target])
        following.append(nexts)
    return blocks, following


def _ends(one: Instruction) -> bool:
    return one.base in _ENDS


def _dominators(following: Sequence[Sequence[int]]) -> list[int]:
    """Of each block those that every way to it passes, as bits; of one that nothing reaches none."""
    before: list[list[int]] = [[] for _ in following]
    for block, nexts in enumerate(following):
        for one in nexts:
            before[one].append(block)
    everything = (1 << len(following)) - 1
    found = [1] + [everything] * (len(following) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(following)):
            common = everything if before[block] else 0
            for one in before[block]:
                common &= found[one]
            common |= 1 << block
            changed |= common != found[block]
            found[block] = common
    return found


def main_loops(code: Sequence[Instruction], found: Sequence[Loop]) -> list[Loop]:
    """The innermost loops with products of the tensor cores, or in a kernel without any those that load rows."""
    has_products = any(one.kind == "products" for one in code)

    def works(loop: Loop) -> bool:
        return any(one.kind == "products" if has_products else one.base in ("LDG", "LDGSTS") for one in loop.code)

    working = [loop for loop in found if works(loop)]
    return [loop for loop in working if not any(other.addresses < loop.addresses for other in working)]


def tile_loops(found: Sequence[Loop], main: Sequence[Loop]) -> list[tuple[Loop | None, list[Loop]]]:
    """The innermost loop around each main loop, what a persistent program does for each tile, with all those in it.

    They are in the order of their addresses; of a kernel without such a loop all main loops are together, with None.
    """
    around = [next((loop for loop in found if loop.addresses > one.addresses), None) for one in main]
    if None in around:
        return [(None, list(main))]
    several = sorted(dict.fromkeys(around), key=lambda loop: loop.tail)
    return [(loop, [one for one, mine in zip(main, around, strict=True) if mine is loop]) for loop in several]
