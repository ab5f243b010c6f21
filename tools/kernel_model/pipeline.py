"""Whether the loads of a compiled product run ahead of it as deep as its launch asks, and what waits for what.

Triton leaves its software pipeline out without a word where something in the loop stands in its way, such as a
barrier. Then there is one buffer, and each step waits for its own loads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tools.kernel_model.sass import Instruction
from tools.kernel_model.timeline import exposed_loads

# An allocation of a loop's operands: how many buffers, and of what; those of barriers are of integers.
_BUFFERS = re.compile(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32|f8\w*)\b")
_OUTSTANDING = re.compile(r"(gsb0|SB0),\s*0x([0-9a-f]+)$")
# What Triton 3.9 itself stands in the way of, by architecture: it is printed, and is no fault. mma.sync takes x^T of
# a weight's gradient from registers, which Triton loads early and then moves from step to step; each move waits.
OF_REGISTERS = "pipeline: a step waits for loads that it started itself"
KNOWN = {"sm_80": {"grouped_gradients": OF_REGISTERS}}


class Pipeline(NamedTuple):
    """Buffers of each operand of all main loops, and how many groups their waits leave outstanding, the least of all.

    ``products`` are groups of wgmma, ``copies`` those of cp.async; None where a loop has no such wait. ``waits`` is how
    often a turn of a loop waits for loads into registers that it started itself.
    """

    loops: int
    buffers: tuple[int, ...]
    products: int | None
    copies: int | None
    waits: int


def pipeline(ttgir: str, main: Sequence[Sequence[Instruction]]) -> Pipeline:
    """What the compiler made of a kernel's loops of products."""
    buffers = tuple(int(count) for count in _BUFFERS.findall(ttgir))
    products, copies = (_outstanding(name, main) for name in ("WARPGROUP.DEPBAR", "DEPBAR"))
    return Pipeline(len(main), buffers, products, copies, sum(map(exposed_loads, main)))


def _outstanding(name: str, main: Sequence[Sequence[Instruction]]) -> int | None:
    least = []
    for loop in main:
        waits = [_OUTSTANDING.search(one.operands) for one in loop if one.name.startswith(f"{name}.LE")]
        counts = [int(found[2], 16) for found in waits if found]
        if not counts:
            return None
        least.append(min(counts))
    return min(least, default=None)


def is_known(architecture: str, name: str, fault: str) -> bool:
    """Whether a fault of a launch is one that this library cannot mend."""
    return KNOWN.get(architecture, {}).get(name.rpartition(": ")[2]) == fault


def faults(found: Pipeline, architecture: str, stages: int) -> list[str]:
    """What is not as a launch of so many stages asks, each in one line."""
    lines = []
    copies_by_descriptor = architecture == "sm_90"
    # What cp.async brings is read from its buffer before the loop goes on: one fewer is enough. There an operand that
    # has to be transposed is loaded into registers, as many steps ahead, and has one buffer.
    least, operands = (stages, 2) if copies_by_descriptor else (stages - 1, 1)
    fewest = min(found.buffers) if len(found.buffers) >= operands * found.loops else 1
    if fewest < least:
        lines.append(f"pipeline: {fewest} buffer{'s' * (fewest > 1)} of an operand, not {least}, for {stages} stages")
    if copies_by_descriptor and not found.products:
        lines.append("pipeline: each product is waited for before the next one starts")
    if not copies_by_descriptor and not found.copies:
        lines.append("pipeline: each step waits for all copies, the last ones among them")
    if found.waits:
        lines.append(OF_REGISTERS)
    return lines
