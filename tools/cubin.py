"""What a compiled Triton kernel uses of a chip, and how wide it reads and writes each of its tensors."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor of an architecture has; sizes in bytes, registers of 32 bits."""

    capability: int
    multiprocessors: int
    shared: int
    shared_of_program: int
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    threads_of_program: int = 1024
    registers_of_thread: int = 255

    def programs_at_once(self, registers: int, shared: int, warps: int) -> int:
        """How many programs of a kernel fit into a multiprocessor; registers go out by 256 to a warp."""
        by_registers = self.registers // (warps * -(-registers * 32 // 256) * 256)
        by_shared = self.shared // (shared + 1024)  # the system takes 1 KiB for each
        return min(by_registers, by_shared, self.threads // (32 * warps), self.programs)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; multiprocessors of an A100, RTX 3090,
# RTX 4090, H100, B200 and RTX 5090.
CHIPS = {
    "sm_80": Chip(80, 108, 164 * 1024, 163 * 1024),
    "sm_86": Chip(86, 82, 100 * 1024, 99 * 1024, threads=1536, programs=16),
    "sm_89": Chip(89, 128, 100 * 1024, 99 * 1024, threads=1536, programs=24),
    "sm_90": Chip(90, 132, 228 * 1024, 227 * 1024),
    "sm_100": Chip(100, 148, 228 * 1024, 227 * 1024),
    "sm_120": Chip(120, 170, 100 * 1024, 99 * 1024, threads=1536, programs=24),
}


class Access(NamedTuple):
    """A load or store of device memory by one thread, or a "copy" of it into shared memory that runs beside the thread.

    The tensor is the kernel's parameter that its address is from.
    """

    kind: str
    tensor: str
    bytes: int


class Usage(NamedTuple):
    """Registers of a thread, its bytes of local memory (spills live there), shared bytes of a program."""

    registers: int
    local: int
    shared: int


def cuobjdump(binary: Path, *options: str) -> str:
    """What cuobjdump, from Triton's own wheel, says of a compiled file."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *options, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _of_kernel(compiled: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return cuobjdump(Path(file.name), option)


def sass_of(compiled: Any) -> str:
    """A kernel's machine code."""
    return _of_kernel(compiled, "--dump-sass")


def usage(compiled: Any) -> Usage:
    """What a kernel uses of a multiprocessor."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _of_kernel(compiled, "--dump-resource-usage"))
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack + local, compiled.metadata.shared)


# Instructions of the tensor cores, and of the loads by descriptors that feed them where there are any.
PRODUCT_INSTRUCTIONS = {
    "sm_80": ("HMMA",), "sm_86": ("HMMA",), "sm_89": ("HMMA",), "sm_90": ("HGMMA", "UTMALDG"),
    "sm_100": ("UTCHMMA", "UTMALDG"), "sm_120": ("HMMA", "UTMALDG"),
}  # fmt: skip


def missing_instructions(compiled: Any, architecture: str) -> list[str]:
    """What a kernel of matrix products ought to have, and has not; empty for any other kernel."""
    if "tt.dot " not in compiled.asm["ttir"]:
        return []
    code = sass_of(compiled)
    missing = [name for name in PRODUCT_INSTRUCTIONS[architecture] if not re.search(rf"\b{name}\b", code)]
    # A wait that leaves one under way. Where ptxas cannot tell who reads the sums it waits for each, and says nothing.
    if "HGMMA" in code and not re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]", code):
        missing.append("asynchronous HGMMA")
    return missing


def pointer_parameters(compiled: Any) -> dict[int, str]:
    """The kernel's pointers by their number in PTX, where what is known at compile time is no parameter.

    Those of a tuple have one name: which of them is read is decided as the kernel runs.
    """
    parameters: list[tuple[str, str]] = []
    for name, kind in compiled.src.signature.items():
        parameters += [(name, one) for one in (kind if isinstance(kind, tuple) else (kind,)) if one != "constexpr"]
    return {number: name for number, (name, kind) in enumerate(parameters) if kind.startswith("*")}


_STATEMENT = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);\s*$")
_COPY = re.compile(r"\[.*\], \[\s*(%rd\d+).*\], (\w+)")  # to, from, bytes
_WIDE_REGISTER = re.compile(r"%rd\d+")
_SHARED = "shared"
_SIZE = re.compile(r"[bfus](\d+)$")


def accesses(ptx: str, names: Mapping[int, str]) -> list[Access]:
    """Every ``ld.global``, ``st.global`` and ``cp.async``, its address followed to the pointers it is computed from.

    Addresses may pass through shared memory, which counts as one register. The tensor is "?" where there is not
    exactly one pointer.
    """
    pointers: dict[str, set[int]] = {}
    moves: list[tuple[str, list[str]]] = []
    found: list[tuple[str, str, int]] = []
    for line in ptx.splitlines():
        statement = _STATEMENT.match(line)
        if statement is None:
            continue
        operation, operands = statement.groups()
        registers = _WIDE_REGISTER.findall(operands)
        if operation.startswith(("ld.global", "st.global")):
            address = re.search(r"\[\s*(%rd\d+)", operands)
            found.append((operation[:2], address[1] if address else "", _bytes(operation)))
        elif operation.startswith("cp.async") and (copy := _COPY.match(operands)):
            found.append(("cp", copy[1], int(copy[2], 0)))
        elif operation.startswith("ld.param") and registers:
            number = int(re.search(r"_param_(\d+)", operands)[1])
            pointers[registers[0]] = {number} & names.keys()
        elif operation.startswith("st.shared"):
            moves.append((_SHARED, registers))
        elif operation.startswith("ld.shared"):
            moves += [(register, [_SHARED]) for register in registers]
        elif registers and operands.startswith(registers[0]):
            moves.append((registers[0], registers[1:]))
    _follow(pointers, moves)
    result = []
    for kind, address, size in found:
        sources = {names[number] for number in pointers.get(address, ())}
        tensor = sources.pop() if len(sources) == 1 else "?"
        result.append(Access({"ld": "load", "st": "store", "cp": "copy"}[kind], tensor, size))
    return result


def _bytes(operation: str) -> int:
    """Of ``ld.global.v4.b32``: 16."""
    parts = operation.split(".")
    vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
    return vector * int(_SIZE.match(parts[-1])[1]) // 8


def _follow(pointers: dict[str, set[int]], moves: list[tuple[str, list[str]]]) -> None:
    """Hand the pointers on from registers to what is computed from them, until nothing is new: loops go round."""
    changed = True
    while changed:
        changed = False
        for target, sources in moves:
            known = pointers.setdefault(target, set())
            before = len(known)
            known.update(*(pointers.get(source, ()) for source in sources))
            changed |= len(known) > before


def bytes_per_element(found: list[Access], element_sizes: Mapping[str, int]) -> int:
    """Bytes that a kernel must move for each element of the row tensors that it reads and writes."""
    return sum(element_sizes[tensor] for _, tensor in {(a.kind, a.tensor) for a in found if a.tensor in element_sizes})
