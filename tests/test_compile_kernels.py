"""The compile-only check of the kernels: it compiles all it should, and every one of its gates bites."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing"),
]
ROOT = Path(__file__).resolve().parent.parent


def compile_kernels(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.compile_kernels", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True)


def counts(output: str) -> list[int]:
    """Configurations for sm_80 and sm_90, and faults."""
    line = r"sm_80: (\d+) configurations, sm_90: (\d+) configurations; (\d+) faults"
    return [int(number) for number in re.fullmatch(line, output.splitlines()[-1]).groups()]


@pytest.mark.slow
def test_every_kernel_of_the_models_width_keeps_within_both_chips():
    result = compile_kernels("--width", "1536")
    old, new, faults = counts(result.stdout)
    assert old == new > 0 and faults == 0 and result.returncode == 0, result.stdout + result.stderr


@pytest.mark.sweep
def test_every_shipped_configuration_keeps_within_both_chips():
    result = compile_kernels()
    old, new, faults = counts(result.stdout)
    assert old == new > 0 and faults == 0 and result.returncode == 0, result.stdout + result.stderr
    from onepeace_fast.kernels.launch_table import SHIPPED
    from tools.compile_kernels import WIDTHS

    for by_width in (sizes for kernel in SHIPPED.values() for gpu in kernel.values() for sizes in gpu.values()):
        classes = {int(width) for width in by_width}
        assert {min(block for block in classes if block >= width) for width in WIDTHS} == classes


def test_the_interpreter_is_refused_since_it_compiles_nothing():
    result = compile_kernels(TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stdout and len(result.stdout.splitlines()) == 1


def test_each_entry_of_the_table_is_launched_by_a_case(monkeypatch):
    from onepeace_fast.kernels import grouped_gemm, launch, tile_table
    from onepeace_fast.kernels.launch_table import SHIPPED
    from tools.compile_kernels import configurations

    asked = set()
    entry, tiles = launch.table_entry, grouped_gemm.tiles_of
    monkeypatch.setattr(launch, "table_entry", lambda kernel, *rest: asked.add(kernel) or entry(kernel, *rest))
    monkeypatch.setattr(grouped_gemm, "tiles_of", lambda kernel, *rest: asked.add(kernel) or tiles(kernel, *rest))
    configurations("sm_90", 768, torch.bfloat16)
    assert asked == set(SHIPPED) | set(tile_table.SHIPPED)


def inspected(kernel, rows: int, width: int, warps: int, **constants: int):
    """What the check says of a kernel that copies rows in its own way."""
    from onepeace_fast.kernels.launch import Configuration
    from tools.compile_kernels import inspect

    x, y = (torch.empty(rows, width) for _ in range(2))
    return inspect(Configuration(kernel, {"x": x, "y": y}, constants, warps), "sm_90", width, rows)


@pytest.fixture
def planted():
    from support import planted

    return planted


def test_a_plain_copy_has_no_fault(planted):
    result = inspected(planted.copy, 1024, 1024, 4, START=0)
    assert result.faults == () and result.bytes_per_element == 8 and result.registers > 0 and result.programs > 8


def test_a_spill_is_a_fault(planted):
    (fault,) = inspected(planted.hold, 128, 1024, 4, ROWS=128, COLUMNS=1024).faults
    assert fault.startswith("spills: ")


def test_narrow_accesses_to_row_tensors_are_faults_that_name_the_tensor(planted):
    assert inspected(planted.copy, 1024, 1024, 4, START=1).faults == ("load of x: 4 bytes wide, not 16",)


def test_more_shared_memory_than_a_program_may_have_is_a_fault(planted):
    faults = inspected(planted.transpose, 256, 256, 32, SIZE=256).faults
    assert any(fault.startswith("shared memory: 262144 bytes") for fault in faults), faults


def test_a_matrix_product_without_tensor_cores_or_descriptors_is_a_fault(planted):
    def missing(precision: str) -> set[str]:
        faults = inspected(planted.multiply, 64, 64, 4, SIZE=64, PRECISION=precision).faults
        return {fault for fault in faults if "matrix product" in fault}

    assert missing("ieee") == {"no HGMMA in a matrix product", "no UTMALDG in a matrix product"}
    assert missing("tf32") == {"no UTMALDG in a matrix product"}


def test_a_fault_or_an_empty_architecture_ends_with_code_1_and_one_summary_line(planted, capsys):
    from tools.compile_kernels import report

    good, bad = (inspected(planted.copy, 1024, 1024, 4, START=start) for start in (0, 1))
    old = good._replace(architecture="sm_80")
    assert report([good, old]) == 0 and counts(capsys.readouterr().out) == [1, 1, 0]
    assert report([old, bad]) == 1 and counts(capsys.readouterr().out) == [1, 1, 1]
    assert report([good]) == 1 and counts(capsys.readouterr().out) == [0, 1, 0]
