"""The CUDA kernels on a CPU: their sources built by g++ against csrc/host_shim, and run on a case in a process."""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast import Segments

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
SHIM = CSRC / "host_shim"
KERNELS = tuple(sorted(path.name for path in CSRC.glob("*.cu")))
COMPILER = os.environ.get("CXX") or "g++"
MAX_MODALITIES = 16
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
FLAGS = ("-std=c++17", "-g1", "-fPIE", "-DONEPEACE_FAST_CALL_SITES")
# What a thread block may have: on compute capability 8.6, 8.9 and 12.0, on 8.0, and on 9.0 and 10.0.
SHARED_LIMITS = {"99 KiB": 99 * 1024, "163 KiB": 163 * 1024, "227 KiB": 227 * 1024}
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


class HeadRows(ctypes.Structure):
    """Of ``csrc/relative_bias_attention.h``."""

    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))


class PackedRows(ctypes.Structure):
    """Of ``csrc/relative_bias_attention.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "modalities", "max_length")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "code", "is_cls", "order")),
    )


class RelativeBiasAttention(ctypes.Structure):
    """Of ``csrc/relative_bias_attention.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("device", "samples", "modalities", "heads", "head_dim", "value_dim")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
        *((name, HeadRows) for name in "qkv"),
        *((name, PackedRows) for name in ("queries", "keys")),
        ("bias_vectors", ctypes.c_int32),
        ("bias", BiasVector * MAX_MODALITIES),
        ("head_scale", ctypes.c_void_p),
        ("head_scale_type", ctypes.c_int32),
    )


class GradientRows(ctypes.Structure):
    """Of ``csrc/relative_bias_attention.h``."""

    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64))


class RelativeBiasAttentionGradients(ctypes.Structure):
    """Of ``csrc/relative_bias_attention.h``; ``csrc/host_shim/run.cpp`` has what its pointers say in a case."""

    _fields_ = (
        ("multiprocessors", ctypes.c_int32),
        ("grad", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride")),
        ("log_sum_exp", ctypes.c_void_p),
        *((name, GradientRows) for name in "qkv"),
        ("bias", ctypes.c_void_p * MAX_MODALITIES),
        *((name, ctypes.c_void_p) for name in ("head_scale", "workspace")),
    )


class Results(NamedTuple):
    """What both passes give; None for the gradients of what is frozen or not there.

    The gradient of qkv is a tensor, or a tuple where the three were given apart.
    """

    out: Tensor
    log_sum_exp: Tensor
    qkv: Any
    bias: list[Tensor | None]
    head_scale: Tensor | None


def build(
    folder: Path, sanitizer: str, csrc: Path = CSRC, changed: str | None = None, beside: Path | None = None
) -> Path:
    """Compile the kernels' sources for this CPU under a sanitizer; returns the program.

    Where one source has ``changed``, all others come from the program ``beside``.
    """
    shim, program = csrc / "host_shim", folder / f"run_{sanitizer}"
    # The kernels are long: what a debugger needs beside lines, and more optimization, cost more time than they save.
    kernel, rest = (["-Og", *SANITIZERS[sanitizer]], ["-O2", *SANITIZERS[sanitizer]])
    # The fibers hand values from lane to lane, which is no access of the kernel's: ThreadSanitizer must not see it.
    hidden = ["-O2", *SANITIZERS[sanitizer][1:]] if sanitizer == "thread" else rest
    sources = [(csrc / name, kernel) for name in KERNELS]
    sources += [(shim / "run.cpp", rest), (shim / "fibers.cpp", hidden), (shim / "warp.cpp", hidden)]
    before, objects, commands = [], [], []
    for source, options in sources:
        if changed not in (None, source.name):
            before.append(str(beside.parent / f"{source.stem}_{sanitizer}.o"))
            continue
        objects.append(str(folder / f"{source.stem}_{sanitizer}.o"))
        command = [COMPILER, *FLAGS, f"-I{shim}", f"-I{csrc}", *options]
        commands.append([*command, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    # The changed one last: of objects with some functions in common ThreadSanitizer finds the last one's lines alone.
    _run([COMPILER, *SANITIZERS[sanitizer], *before, *objects, "-o", str(program)])
    return program


def _run(command: Sequence[str]) -> None:
    process = subprocess.run(command, text=True, capture_output=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{process.stderr[-4000:]}")


def _array(tensor: Tensor | None, begin: bool = False) -> bytes:
    """A tensor's storage, whatever its strides, and before it where the tensor begins in it if asked."""
    memory = None if tensor is None else tensor.untyped_storage()
    storage = b"" if memory is None else ctypes.string_at(memory.data_ptr(), memory.nbytes())
    offset = struct.pack("q", tensor.storage_offset() * tensor.element_size()) if begin else b""
    return offset + struct.pack("q", len(storage)) + storage


def _apart(qkv: Tensor | tuple[Tensor, Tensor, Tensor]) -> Sequence[Tensor]:
    return qkv.unbind(1) if isinstance(qkv, Tensor) else qkv


def attention_case(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    cu_seqlens: Tensor,
    code: Tensor,
    is_cls: Tensor,
    modality: Tensor | None = None,
    max_length: int = 0,
    order: Tensor | None = None,
    keys: Segments | None = None,
    bias: Sequence[Tensor] = (),
    code_offsets: Sequence[int] = (),
    head_scale: Tensor | None = None,
    scale: float | None = None,
    orders: Sequence[int] = (0,),
    changed: Mapping[str, int] | None = None,
    gradients: bytes = b"",
    **_: object,
) -> bytes:
    """The case that the program reads: arguments as those of the op, and an order of blocks for each run.

    ``changed`` overrides members of the struct with values that no tensor has. With ``gradients``, of
    ``gradients_case``, the backward pass runs too.
    """
    apart = _apart(qkv)
    like, (_, heads, head_dim) = apart[0], apart[0].shape
    queries = Segments(cu_seqlens, like, code, is_cls, max_length, order)
    case = RelativeBiasAttention(
        samples=cu_seqlens.shape[1] - 1, modalities=max(len(side.cu_seqlens) for side in (queries, keys or queries)),
        heads=heads, head_dim=head_dim, value_dim=apart[2].shape[2],
        scale=head_dim**-0.5 if scale is None else scale, type=TYPES[like.dtype],
        bias_vectors=len(bias), head_scale_type=TYPES[like.dtype if head_scale is None else head_scale.dtype],
        **{name: HeadRows(None, *x.stride()[:2]) for name, x in zip("qkv", apart, strict=True)},
        queries=_packed_rows(queries, like), keys=_packed_rows(keys or queries, apart[1]),
    )  # fmt: skip
    for m, (vector, offset) in enumerate(zip(bias, code_offsets, strict=True)):
        case.bias[m] = BiasVector(None, *vector.stride(), vector.shape[1], offset, TYPES[vector.dtype])
    for name, value in (changed or {}).items():
        setattr(case, name, value)
    parts = [bytes(case), *(_array(x, begin=True) for x in apart), *_plan(queries)]
    parts += [struct.pack("q", keys is not None), *(() if keys is None else _plan(keys))]
    parts += [struct.pack("q", len(bias)), *(_array(vector) for vector in bias)]
    parts += [_array(head_scale), struct.pack("q", bool(gradients)), gradients]
    return b"".join([*parts, struct.pack(f"q{len(orders)}q", len(orders), *orders)])


def _packed_rows(segments: Segments, rows: Tensor) -> PackedRows:
    return PackedRows(rows.shape[0], segments.cu_seqlens.shape[0], segments.max_length)


def _plan(segments: Segments) -> list[bytes]:
    tensors = (segments.cu_seqlens, segments.code, segments.is_cls, segments.order)
    return [_array(None if x is None else x.contiguous()) for x in tensors]


def gradients_case(
    grad: Tensor, bias_needs: Sequence[bool], head_scale_need: bool, multiprocessors: int = 1, joint: bool = True
) -> bytes:
    """What the case has for the backward pass; the gradients of q, k and v are one array where it is ``joint``."""
    case = RelativeBiasAttentionGradients(
        multiprocessors=multiprocessors,
        row_stride=grad.stride(0),
        head_stride=grad.stride(1),
        head_scale=head_scale_need,
        k=GradientRows(None, joint),
    )
    case.bias[: len(bias_needs)] = list(map(int, bias_needs))
    return bytes(case) + _array(grad, begin=True)


def run(
    program: Path, folder: Path, case: bytes, options: str = "", shared_limit: int = SHARED_LIMITS["227 KiB"]
) -> subprocess.CompletedProcess[str]:
    """Run the program on a case, on a device whose thread blocks may have so much; the results stand in ``folder``."""
    (folder / "case").write_bytes(case)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": options}
    environment["HOST_SHIM_SHARED_LIMIT"] = str(shared_limit)
    command = [str(program), str(folder / "case"), str(folder / "results")]
    return subprocess.run(command, env=environment, text=True, capture_output=True)


def attend(
    program: Path,
    folder: Path,
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    *,
    bias: Sequence[Tensor] = (),
    head_scale: Tensor | None = None,
    bias_needs: Sequence[bool] | None = None,
    head_scale_need: bool = True,
    multiprocessors: int = 1,
    shared_limit: int = SHARED_LIMITS["227 KiB"],
    **arguments: object,
) -> list[Results]:
    """Both passes of each run, with all gradients that there are unless told otherwise; fails by the program's word."""
    needs = [True] * len(bias) if bias_needs is None else bias_needs
    scale_need = head_scale is not None and head_scale_need
    joint = isinstance(qkv, Tensor)
    gradients = gradients_case(grad, needs, scale_need, multiprocessors, joint)
    case = attention_case(qkv, bias=bias, head_scale=head_scale, gradients=gradients, **arguments)
    process = run(program, folder, case, shared_limit=shared_limit)
    assert process.returncode == 0, process.stderr[-4000:]
    data = torch.frombuffer(bytearray((folder / "results").read_bytes()), dtype=torch.uint8)
    written = [grad, grad[..., 0].float(), *([qkv] if joint else qkv), *itertools.compress(bias, needs)]
    written += [head_scale] if scale_need else []
    sizes = [array.numel() * array.itemsize for array in written]
    results = []
    for one in data.split(sum(sizes)):
        arrays = zip(one.split(sizes), written, strict=True)
        out, total, *rest = (array.clone().view(like.dtype).view(like.shape) for array, like in arrays)
        others = iter(rest)
        dqkv = next(others) if joint else tuple(itertools.islice(others, 3))
        dbias = [next(others) if need else None for need in needs]
        results.append(Results(out, total, dqkv, dbias, next(others, None)))
    return results
