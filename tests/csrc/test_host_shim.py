"""csrc/host_shim finds what a GPU would trip over: kernels with planted faults run on it."""

import re
import shutil
import subprocess

import pytest
from support import host_shim

SOURCE = host_shim.SHIM.parent.parent / "tests" / "csrc" / "host_shim_probe.cu"


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Run the probe with a fault."""
    if shutil.which(host_shim.COMPILER) is None:
        pytest.skip(f"no C++ compiler is found (set CXX, or install {host_shim.COMPILER})")
    program = tmp_path_factory.mktemp("probe") / "probe"
    sources = [SOURCE, *(host_shim.SHIM / name for name in ("fibers.cpp", "warp.cpp"))]
    options = ["-Og", *host_shim.SANITIZERS["address"], f"-I{host_shim.SHIM}", "-x", "c++"]
    subprocess.run([host_shim.COMPILER, *host_shim.FLAGS, *options, *map(str, sources), "-o", str(program)], check=True)
    return lambda fault: subprocess.run([str(program), str(fault)], capture_output=True, text=True)


FAULTS = {
    1: "misaligned address .* for type 'struct uint4', which requires 16 byte alignment",
    2: "misaligned address .* for type 'const struct float2', which requires 8 byte alignment",
    3: "its warp has diverged, and is elsewhere in another __shfl_sync",
    4: "its warp has diverged, and is elsewhere in another __shfl_sync",
    5: "is at another __syncthreads",
    6: "its warp has diverged, and is elsewhere in another mma",
    7: "is at another __syncthreads",
}


def test_a_kernel_without_a_fault_runs(probe):
    process = probe(0)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_misaligned_accesses_and_diverged_warps_are_found(probe, fault):
    process = probe(fault)
    assert process.returncode not in (0, 2), "it ran"
    assert re.search(FAULTS[fault], process.stderr), process.stderr


def test_powers_below_the_normal_numbers_are_flushed_to_zero(probe):
    assert probe(8).stdout.split() == ["1.17549e-38", "0", "0", "1"]


def test_shared_memory_beyond_48_kib_must_be_allowed_first(probe):
    assert probe(9).returncode == 1
