"""The rehearsal finds what it is for: each planted fault in one line, and its driver refuses what a GPU's would."""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.rehearsal.run import Outcome, judge

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

LAUNCHES = """
import ctypes, sys
from tools.rehearsal import native
library = ctypes.CDLL(str(native.libcuda(native.build_folder())))
library.rehearsal_device(9, 0, 132, 232448)

class Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("x", "y", "z", "bx", "by", "bz", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]

function = ctypes.c_void_p()
library.cuModuleGetFunction(ctypes.byref(function), None, b"kernel")
ask = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

def launch(grid=(1, 1, 1), block=(128, 1, 1), shared=0):
    code = library.cuLaunchKernelEx(ctypes.byref(Config(*grid, *block, shared)), function, None, None)
    text = ctypes.c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    print(code, text.value.decode())

launch()
launch(grid=(1, 70000, 1))
launch(grid=(0, 1, 1))
launch(block=(2048, 1, 1))
launch(block=(512, 4, 1))
launch(shared=60000)
print(library.cuFuncSetAttribute(function, ask, 60000))
launch(shared=60000)
print(library.cuFuncSetAttribute(function, ask, 300 * 1024))
launch(shared=300 * 1024)
print(library.rehearsal_launches())
"""

PLANTED = """
import pytest
import torch

from onepeace_fast import layer_norm, routed_ffn

pytestmark = pytest.mark.NEEDS


def ffn(dtype, **how):
    def made(*shape):
        return torch.ones(shape, dtype=dtype, device="cuda")

    offsets = torch.tensor([0, 3], dtype=torch.int32, device="cuda")
    return routed_ffn(made(3, 32), [made(64, 32)], [made(64, 32)], [made(32, 64)], offsets=offsets, **how)


def test_sound():
    assert ffn(torch.bfloat16, strategy="grouped").is_cuda


def test_mixes_devices():
    layer_norm(torch.ones(3, 8, device="cuda")) + torch.ones(3, 8)


def test_hands_a_cpu_tensor_to_an_op():
    layer_norm(torch.ones(3, 8, device="cuda"), torch.ones(8))


def test_reads_the_host():
    torch.cuda.set_sync_debug_mode("error")
    assert layer_norm(torch.ones(3, 8, device="cuda")).sum().item() == 0


def test_float32_in_tiles():
    ffn(torch.float32, strategy="grouped")


def test_fails():
    assert ffn(torch.bfloat16, strategy="grouped").shape == (4, 32)
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True)


def test_the_driver_refuses_what_a_gpu_s_does():
    result = run("-c", LAUNCHES)
    assert result.returncode == 0, result.stderr
    accepted, *grids, big, cubic, unasked, asked, allowed, refused, too_much, launches = result.stdout.splitlines()
    assert accepted == allowed == "0 no error" and asked == "0" and launches == "2"
    assert "1 to 65535 programs in dimension 1 of the grid, got 70000" in grids[0]
    assert "got 0" in grids[1] and "got 2048" in big and "got 2048" in cubic
    assert "at most 49152 bytes of shared memory, got 60000" in unasked
    assert refused == "1" and "got 307200" in too_much


@pytest.mark.slow
def test_every_planted_fault_is_one_line_and_what_is_sound_is_none(tmp_path):
    path = tmp_path / "test_planted.py"
    path.write_text(PLANTED.replace("NEEDS", "gpu"))  # so that this file is not one of GPU tests
    result = run("-m", "tools.rehearsal", "--short", str(path))
    faults = [line.split("::")[-1] for line in result.stdout.splitlines() if line.startswith("fault: ")]
    assert result.returncode == 1 and len(faults) == 5, result.stdout + result.stderr
    found = {name: line for name, _, line in (fault.partition(": ") for fault in faults)}
    assert found["test_mixes_devices"].startswith("DeviceMixError: aten.add")
    assert "weight" in found["test_hands_a_cpu_tensor_to_an_op"] and "cpu" in found["test_hands_a_cpu_tensor_to_an_op"]
    assert found["test_reads_the_host"].startswith("HostReadError: expected no wait for the device")
    assert "float32" in found["test_float32_in_tiles"] and "float16 or bfloat16" in found["test_float32_in_tiles"]
    assert found["test_fails"].startswith("AssertionError")
    summary = result.stdout.splitlines()[-1]
    assert summary.startswith("rehearsal: 6 tests, ") and summary.endswith(" launches, 5 faults"), summary


def test_no_test_at_all_is_a_fault():
    faults, summary = judge([Outcome("tests", tests=Counter(skipped=3))])
    assert faults == ["the rehearsal: expected tests for a GPU, got none that ran"]
    assert summary == "rehearsal: 0 tests, 0 compiles, 0 launches, 1 faults (3 more cannot run here)"


@pytest.mark.slow
def test_a_feed_forward_step_compiles_few_programs_and_another_batch_none():
    result = run("-m", "tools.rehearsal.step", "--count-only")
    found = json.loads(result.stdout.splitlines()[-1])
    assert not found["faults"]
    steps = {name: sum(programs.values()) for name, programs in found["steps"].items()}
    assert 0 < steps["routed_ffn"] <= 11
    assert steps["routed_ffn, another batch"] == 0, found["steps"]
    assert steps["routed_ffn, a frozen modality"] == 0, found["steps"]
