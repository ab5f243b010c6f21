"""Whether the CUDA extension is built on this machine, by which nvcc and for which GPUs; if not, why.

nvcc comes from CUDA_HOME, else from PATH, else from the toolkit's own wheels on PyPI, which the build backend asks for
where there is a driver and no toolkit. ``ONEPEACE_FAST_CUDA_ARCHITECTURES`` names the architectures as nvcc does
("sm_80,sm_90a,compute_90", the last one being PTX), or is "none", which leaves the extension out. Without it those of
the GPUs that are here are built, and where none is, nothing: compiling takes minutes, and nothing here would run it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ENVIRONMENT_VARIABLE = "ONEPEACE_FAST_CUDA_ARCHITECTURES"
# Each serves its major version, and "compute_90", compiled by the driver at the first launch, whatever is later.
ANY_GPU = ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_90")
NARROW_PTX = r"compute_\d{3}"  # lacks a kernel that GPUs with other shared memory need: csrc/backward_workspace.cuh
OLDEST_GPU = (8, 0)
OLDEST_NVCC = (12, 0)  # the first that knows sm_90a
OLDEST_WHEELS = (13, 0)  # those for CUDA 12 hold ptxas and no nvcc
BUILD_TOOLS = {"pybind11": "pybind11>=2.13", "ninja": "ninja"}
AGAIN = "then install again"


class Driver(NamedTuple):
    """The newest CUDA version that the driver runs, and the compute capability of each GPU."""

    version: tuple[int, int]
    capabilities: tuple[tuple[int, int], ...]


class Toolkit(NamedTuple):
    """An nvcc, its version, and the folders that the linker needs beside those nvcc knows."""

    nvcc: Path
    version: tuple[int, int]
    libraries: tuple[Path, ...] = ()


class Decision(NamedTuple):
    """What is built: by which toolkit for which architectures, or nothing and why; ``wanted`` where the user asked."""

    toolkit: Toolkit | None
    architectures: tuple[str, ...]
    left_out: str | None
    wanted: bool


def dotted(version: tuple[int, int]) -> str:
    """(13, 0) as 13.0."""
    return "{}.{}".format(*version)


def find_driver() -> Driver | None:
    """Ask NVIDIA's driver, None where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    value = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(value)) != 0 or not value.value:
        return None
    version = (value.value // 1000, value.value % 1000 // 10)
    count = ctypes.c_int()
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Driver(version, ())
    capabilities = []
    for device in range(count.value):
        pair = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            pair.append(value.value)
        capabilities.append(tuple(pair))
    return Driver(version, tuple(capabilities))


def find_toolkit() -> Toolkit | None:
    """The first nvcc of CUDA_HOME, PATH and the toolkit's wheels."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    candidates = [(Path(home) / "bin" / "nvcc", ())] if home else []
    candidates += [(Path(on_path), ())] if on_path else []
    for root in _wheel_roots():
        candidates.append((root / "bin" / "nvcc", (root / "lib",)))
    for nvcc, libraries in candidates:
        if nvcc.is_file():
            return Toolkit(nvcc, _nvcc_version(nvcc), libraries)
    return None


def _wheel_roots() -> list[Path]:
    """Folders into which the toolkit's wheels install: nvidia/cu13 and so on."""
    try:
        spec = find_spec("nvidia")
    except (ImportError, ValueError):
        return []
    folders = spec.submodule_search_locations if spec else None
    return sorted((root for folder in folders or () for root in Path(folder).glob("cu[0-9]*")), reverse=True)


def _nvcc_version(nvcc: Path) -> tuple[int, int]:
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", answer).groups()
    return int(major), int(minor)


def wheel_requirement(driver: Driver | None) -> str | None:
    """The toolkit's wheels that fit a driver, None where there is no driver or no such wheels."""
    if driver is None or driver.version < OLDEST_WHEELS:
        return None
    major, minor = driver.version
    return f"cuda-toolkit[nvcc,cudart,cccl]>={dotted(OLDEST_WHEELS)},<{major}.{minor + 1}"


def build_requirements() -> list[str]:
    """What the build backend asks pip for: nothing where the extension will be left out."""
    requested, driver = _requested(), find_driver()
    if requested == () or sys.platform != "linux" or (requested is None and not _has_gpu(driver)):
        return []
    tools = list(BUILD_TOOLS.values())
    if find_toolkit() is not None:
        return tools
    wheels = wheel_requirement(driver)
    return [*tools, wheels] if wheels else []


def decide() -> Decision:
    """Decide by the environment, the toolkit, the driver and the GPUs."""
    requested = _requested()
    if requested == ():
        return Decision(None, (), f"{ENVIRONMENT_VARIABLE}=none asked for that", False)
    driver, wanted = find_driver(), requested is not None
    if not wanted and not _has_gpu(driver):
        how = f"to compile it for others, {ENVIRONMENT_VARIABLE}={','.join(ANY_GPU)} pip install ."
        return Decision(None, (), f"no NVIDIA GPU is found here; {how}", False)
    if sys.platform != "linux":
        return Decision(None, (), f"expected Linux, for which alone it can be compiled, got {sys.platform}", wanted)
    toolkit = find_toolkit()
    reason = _no_toolkit(toolkit, driver)
    if reason is None:
        known = _known(toolkit)
        unknown = [name for name in requested or () if name.rstrip("a") not in known]
        architectures = requested or _present(driver, known)
        if architectures and not unknown:
            return Decision(toolkit, architectures, None, wanted)
        if unknown:
            got = f"{toolkit.nvcc} of CUDA {dotted(toolkit.version)}"
            reason = f"expected an nvcc that knows {', '.join(unknown)}, got {got}; update it, {AGAIN}"
            return Decision(None, (), reason, wanted)
        found = ", ".join(dotted(capability) for capability in driver.capabilities)
        reason = f"expected a GPU of compute capability {dotted(OLDEST_GPU)} or later, got {found}"
    return Decision(None, (), reason, wanted)


def _has_gpu(driver: Driver | None) -> bool:
    return driver is not None and bool(driver.capabilities)


def _requested() -> tuple[str, ...] | None:
    """The architectures that the environment names, () for none, None where it says nothing."""
    names = tuple(re.split(r"[\s,;]+", os.environ.get(ENVIRONMENT_VARIABLE, "").strip()))
    if names == ("",):
        return None
    if names == ("none",):
        return ()
    for name in names:
        found = re.fullmatch(r"(?:sm|compute)_(\d{2,3})a?", name)
        if not found:
            raise SystemExit(f"{ENVIRONMENT_VARIABLE}: expected names as in {','.join(ANY_GPU)} or none, got {name!r}")
        if divmod(int(found[1]), 10) < OLDEST_GPU:
            oldest = dotted(OLDEST_GPU)
            raise SystemExit(f"{ENVIRONMENT_VARIABLE}: expected compute capability {oldest} or later, got {name!r}")
        if re.fullmatch(NARROW_PTX, name):
            wide = f"PTX with what any later GPU launches, as of {ANY_GPU[-1]}"
            raise SystemExit(f"{ENVIRONMENT_VARIABLE}: expected {wide}, got {name!r}")
    return names


def _no_toolkit(toolkit: Toolkit | None, driver: Driver | None) -> str | None:
    """Why nothing can be compiled here and what to do, or None."""
    if toolkit is not None:
        if toolkit.version < OLDEST_NVCC:
            got = f"{toolkit.nvcc} of CUDA {dotted(toolkit.version)}"
            return f"expected an nvcc of CUDA {dotted(OLDEST_NVCC)} or later, got {got}; update it, {AGAIN}"
        absent = [name for name in BUILD_TOOLS if not _available(name)]
        return f"{' and '.join(absent)} not installed; install them, {AGAIN}" if absent else None
    if driver is None:
        return f"neither nvcc nor an NVIDIA driver is found; put nvcc on PATH or set CUDA_HOME, {AGAIN}"
    wheels = wheel_requirement(driver)
    if wheels is None:
        return (
            f"expected a driver of CUDA {dotted(OLDEST_WHEELS)} or later, for which PyPI has nvcc, got "
            f"{dotted(driver.version)}; update it, or put nvcc {dotted(OLDEST_NVCC)} or later on PATH, {AGAIN}"
        )
    return f"no nvcc is found; install {wheels}, or leave out --no-build-isolation, {AGAIN}"


def _available(tool: str) -> bool:
    return find_spec(tool) is not None or shutil.which(tool) is not None


def _known(toolkit: Toolkit) -> set[str]:
    """The architectures that an nvcc compiles for, without those with an "a", which it knows with the others."""
    names = set()
    for option in ("--list-gpu-code", "--list-gpu-arch"):
        names.update(subprocess.run([toolkit.nvcc, option], capture_output=True, text=True, check=True).stdout.split())
    return names


def _present(driver: Driver, known: set[str]) -> tuple[str, ...]:
    """The architectures of the GPUs that are here."""
    usable = sorted({capability for capability in driver.capabilities if capability >= OLDEST_GPU})
    names = ["sm_{}{}".format(*capability) for capability in usable]
    # A GPU younger than nvcc runs the PTX.
    names = [name if name in known else ANY_GPU[-1] for name in names]
    return tuple(dict.fromkeys("sm_90a" if name == "sm_90" else name for name in names))
