"""How many clocks one warp needs for straight code, by the barriers and distances that the compiler wrote into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tools.kernel_model.sass import Instruction

_SIZE = re.compile(r"\.(64|128|256)\b|\.[US](8|16)\b")


def access_bytes(one: Instruction) -> int:
    """Bytes that a thread's load or store moves."""
    found = _SIZE.search(one.name)
    return 4 if found is None else int(found[1] or found[2]) // 8


def warp_clocks(code: Iterable[Instruction], latency: Mapping[str, float], of_load: float, warps: float = 1) -> float:
    """Clocks of so many warps of one scheduler, each instruction once and in order.

    A load of device memory takes ``of_load``, and so does a TMA store until its shared memory may be written again,
    which the code waits for. From one barrier to the next the warps take turns, and the slowest part counts: the
    distances of one warp's instructions, or the number of all of theirs.
    """
    time = start = 0.0
    ready = [0.0] * 6
    stored = 0.0
    issued = 0
    for one in code:
        issued += 1
        for barrier in one.waits:
            time = max(time, ready[barrier])
        if one.base == "DEPBAR":
            time, stored = max(time, stored), 0.0
        done = time + _latency(one, latency, of_load)
        if one.writes is not None:
            ready[one.writes] = max(ready[one.writes], done)
        if one.reads is not None:
            ready[one.reads] = max(ready[one.reads], time + latency["operands"])
        if one.base == "UTMASTG":
            stored = time + of_load
        time += max(one.next_after, 1)
        if one.base == "BAR":
            time = start = max(time, start + warps * issued)
            issued = 0
    return max(time, stored, start + warps * issued)


def _latency(one: Instruction, latency: Mapping[str, float], of_load: float) -> float:
    if one.base == "LDG":
        return of_load
    if one.base in ("LDS", "LDSM"):
        return latency["shared"]
    return latency.get({"MUFU": "mufu", "SHFL": "shuffle"}.get(one.base, ""), latency["operands"])


def exposed_loads(code: Iterable[Instruction]) -> int:
    """How often one warp comes to wait for loads of device memory that were issued since it last did."""
    pending: set[int] = set()
    times = 0
    for one in code:
        if pending.intersection(one.waits):
            times += 1
            pending.clear()
        if one.base == "LDG" and one.writes is not None:
            pending.add(one.writes)
    return times
