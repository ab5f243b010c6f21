"""The CUDA kernels on a CPU: their sources built by g++ against csrc/host_shim, and run on a case in a process."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
SHIM = CSRC / "host_shim"
KERNELS = ("relative_bias_attention_forward.cu",)
COMPILER = os.environ.get("CXX") or "g++"
MAX_MODALITIES = 16
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SANITIZERS = {
    "address": ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"),
    "thread": ("-fsanitize=thread", "-DONEPEACE_FAST_THREAD_SANITIZER"),
}


class BiasVector(ctypes.Structure):
    """Of ``csrc/relative_bias_attention.h``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("entry_stride", ctypes.c_int64),
        ("entries", ctypes.c_int32),
        ("code_offset", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class RelativeBiasAttention(ctypes.Structure):
    """Of ``csrc/relative_bias_attention.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("device", "samples", "modalities", "heads", "head_dim", "rows")),
        ("max_length", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("qkv", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "which_stride", "head_stride")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "code", "is_cls")),
        ("bias_vectors", ctypes.c_int32),
        ("bias", BiasVector * MAX_MODALITIES),
        ("head_scale", ctypes.c_void_p),
        ("head_scale_type", ctypes.c_int32),
    )


def build(folder: Path, sanitizer: str, csrc: Path = CSRC) -> Path:
    """Compile the kernels' sources for this CPU under a sanitizer; returns the program."""
    shim, program = csrc / "host_shim", folder / f"run_{sanitizer}"
    flags = [COMPILER, "-std=c++17", "-O1", "-g", "-fPIE"]
    flags += [f"-I{shim}", f"-I{csrc}"]
    # The fibers hand values from lane to lane, which is no access of the kernel's: ThreadSanitizer must not see it.
    hidden = SANITIZERS[sanitizer][1:] if sanitizer == "thread" else SANITIZERS[sanitizer]
    sources = [(csrc / kernel, SANITIZERS[sanitizer]) for kernel in KERNELS]
    sources += [(shim / "run.cpp", SANITIZERS[sanitizer]), (shim / "fibers.cpp", hidden), (shim / "warp.cpp", hidden)]
    objects = []
    for source, options in sources:
        objects.append(str(folder / f"{source.stem}_{sanitizer}.o"))
        _run([*flags, *options, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    _run([COMPILER, *SANITIZERS[sanitizer], *objects, "-o", str(program)])
    return program


def _run(command: Sequence[str]) -> None:
    process = subprocess.run(command, text=True, capture_output=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{process.stderr[-4000:]}")


def _array(tensor: Tensor | None) -> bytes:
    """A tensor's storage, whatever its strides."""
    if tensor is None:
        return struct.pack("q", 0)
    storage = bytes(tensor.untyped_storage())
    return struct.pack("q", len(storage)) + storage


def attention_case(
    qkv: Tensor,
    *,
    cu_seqlens: Tensor,
    code: Tensor,
    is_cls: Tensor,
    max_length: int = 0,
    bias: Sequence[Tensor] = (),
    code_offsets: Sequence[int] = (),
    head_scale: Tensor | None = None,
    scale: float | None = None,
    orders: Sequence[int] = (0,),
    changed: Mapping[str, int] | None = None,
    **_: object,
) -> bytes:
    """The case that the program reads: arguments as those of the op, and an order of blocks for each run.

    ``changed`` overrides members of the struct with values that no tensor has.
    """
    rows, _, heads, head_dim = qkv.shape
    case = RelativeBiasAttention(
        samples=cu_seqlens.shape[1] - 1, modalities=cu_seqlens.shape[0], heads=heads, head_dim=head_dim, rows=rows,
        max_length=max_length, scale=head_dim**-0.5 if scale is None else scale, type=TYPES[qkv.dtype],
        row_stride=qkv.stride(0), which_stride=qkv.stride(1), head_stride=qkv.stride(2), bias_vectors=len(bias),
        head_scale_type=TYPES[qkv.dtype if head_scale is None else head_scale.dtype],
    )  # fmt: skip
    for m, (vector, offset) in enumerate(zip(bias, code_offsets, strict=True)):
        case.bias[m] = BiasVector(None, *vector.stride(), vector.shape[1], offset, TYPES[vector.dtype])
    for name, value in (changed or {}).items():
        setattr(case, name, value)
    parts = [bytes(case), struct.pack("q", qkv.storage_offset() * qkv.element_size()), _array(qkv)]
    parts += [_array(tensor.contiguous()) for tensor in (cu_seqlens, code, is_cls)]
    parts += [struct.pack("q", len(bias)), *(_array(vector) for vector in bias)]
    parts += [_array(head_scale), struct.pack(f"q{len(orders)}q", len(orders), *orders)]
    return b"".join(parts)


def run(program: Path, folder: Path, case: bytes, options: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program on a case; the results stand in ``folder``."""
    (folder / "case").write_bytes(case)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": options}
    command = [str(program), str(folder / "case"), str(folder / "results")]
    return subprocess.run(command, env=environment, text=True, capture_output=True)


def forward(program: Path, folder: Path, qkv: Tensor, **arguments: object) -> list[tuple[Tensor, Tensor]]:
    """out and log-sum-exp of each run; fails by what the program says."""
    process = run(program, folder, attention_case(qkv, **arguments))
    assert process.returncode == 0, process.stderr[-4000:]
    rows, _, heads, head_dim = qkv.shape
    data, results = (folder / "results").read_bytes(), []
    size = rows * heads * (2 * head_dim + 4)
    for start in range(0, len(data), max(size, 1)):
        out, log_sum_exp = data[start : start + size - 4 * rows * heads], data[start + size - 4 * rows * heads :]
        results.append(
            (
                torch.frombuffer(bytearray(out), dtype=qkv.dtype).view(rows, heads, head_dim),
                torch.frombuffer(bytearray(log_sum_exp[: 4 * rows * heads]), dtype=torch.float32).view(rows, heads),
            )
        )
    return results
