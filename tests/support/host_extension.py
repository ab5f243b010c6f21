"""The CUDA extension compiled for the CPU: the kernels' sources and their binding, by g++ against csrc/host_shim."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from onepeace_fast import cuda_extension
from onepeace_fast.ops import attention_on_gpu, operation
from support.built_once import built_once, digest, version

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = "sm_80,sm_90a,compute_90"


def build(builds: Path) -> ModuleType:
    """Compile into a folder of ``builds``, unless it is there already, and import from it."""
    pytest.importorskip("pybind11")
    name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next(filter(shutil.which, names), None)
    if compiler is None:
        pytest.skip("no C++ compiler is found (set CXX, or install g++)")
    files = [path for path in SOURCES.rglob("*") if path.is_file()]
    key = digest([*files, Path(__file__)], version(compiler), name, metadata.version("pybind11"))
    folder = built_once(builds, "host_extension", key, lambda folder: _compile(compiler, folder, name))
    spec = importlib.util.spec_from_file_location("_cuda", folder / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(compiler: str, folder: Path, name: str) -> None:
    import pybind11

    includes = [SOURCES / "host_shim", SOURCES, pybind11.get_include(), sysconfig.get_path("include")]
    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")], key=lambda path: -path.stat().st_size)
    sources += [path for path in (SOURCES / "host_shim").glob("*.cpp") if path.name != "run.cpp"]  # which has a main
    # More optimization costs more time than it saves.
    command = [compiler, "-std=c++17", "-Og", "-fPIC", "-fvisibility=hidden"]
    command += [f'-DONEPEACE_FAST_ARCHITECTURES="{ARCHITECTURES}"', *(f"-I{path}" for path in includes)]

    def compile_one(source: Path) -> str:
        compiled = str(folder / f"{source.name}.o")
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, sources))
    subprocess.run([compiler, "-shared", *objects, "-o", str(folder / name)], check=True)


def force_gpu_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ops that need no Triton run on CPU tensors what they run on a GPU, but for float64."""
    takes = lambda name, tensor, triton=True: not triton and tensor.dtype != torch.float64  # noqa: E731
    monkeypatch.setattr(operation, "runs_kernel", takes)


def use(monkeypatch: pytest.MonkeyPatch, extension: ModuleType, multiprocessors: int = 132) -> None:
    """Let ops take this extension, on an H100 as far as they ask, or one of another number of multiprocessors."""
    force_gpu_paths(monkeypatch)
    monkeypatch.setattr(cuda_extension, "extension", lambda: extension)
    monkeypatch.setattr(cuda_extension, "unavailable_reason", extension.unavailable_reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_on_gpu, "_current_stream", lambda device: 0)
    monkeypatch.setattr(attention_on_gpu, "_multiprocessors", lambda device: multiprocessors)
