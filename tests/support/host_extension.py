"""The CUDA extension compiled for the CPU: the kernels' sources and their binding, by g++ against csrc/host_shim."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = "sm_80,sm_90a,compute_90"


def build(folder: Path) -> ModuleType:
    """Compile into a folder and import from there."""
    pybind11 = pytest.importorskip("pybind11")
    output = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [SOURCES / "host_shim", SOURCES, pybind11.get_include(), sysconfig.get_path("include")]
    sources = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]
    sources += [path for path in (SOURCES / "host_shim").glob("*.cpp") if path.name != "run.cpp"]  # which has a main
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f'-DONEPEACE_FAST_ARCHITECTURES="{ARCHITECTURES}"', *(f"-I{path}" for path in includes)]
    subprocess.run([*command, "-x", "c++", *map(str, sources), "-o", str(output)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", output)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
