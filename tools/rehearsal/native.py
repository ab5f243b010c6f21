"""Compiles the two C sources beside this file, once for each version of torch and Triton."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


def build_folder() -> Path:
    """Where what is built is kept, the kernels that Triton compiles included: by versions, in ``build/``."""
    import torch
    import triton

    return ROOT / "build" / "rehearsal" / f"torch-{torch.__version__}_triton-{triton.__version__}"


def compiled(source: Path, output: Path, compilers: tuple[str, ...], *options: str) -> Path:
    """Compile a shared library, unless it is there and as new as its source."""
    if output.exists() and output.stat().st_mtime >= source.stat().st_mtime:
        return output
    compiler = next(filter(shutil.which, compilers), None)
    if compiler is None:
        raise RuntimeError(f"the rehearsal: expected a compiler, {' or '.join(compilers)}, got none; install one")
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f"{output.name}.{os.getpid()}")  # several processes may come here at once
    command = [compiler, "-shared", "-fPIC", "-O1", "-fvisibility=hidden", str(source), "-o", str(draft), *options]
    subprocess.run(command, check=True)
    return draft.replace(output)


def libcuda(folder: Path) -> Path:
    """The driver that executes nothing, as ``libcuda.so.1``, and as ``libcuda.so``, by which Triton 3.4 links."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    output = folder / "libcuda.so.1"
    compiled(FOLDER / "libcuda.c", output, ("gcc", "cc", "clang"), "-Wl,-soname,libcuda.so.1", f"-I{include}")
    if not (plain := folder / "libcuda.so").exists():
        plain.symlink_to(output.name)
    return output


def install_device_guard(folder: Path) -> None:
    """Let PyTorch take device 0 for the current CUDA device of this process."""
    import torch

    base = Path(torch.__file__).parent
    options = [f"-I{base / 'include'}", f"-L{base / 'lib'}", "-lc10", "-std=c++20"]
    library = compiled(FOLDER / "device_guard.cpp", folder / "device_guard.so", ("g++", "clang++", "c++"), *options)
    ctypes.CDLL(str(library)).install()
