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


def counts(output: str) -> tuple[dict[str, int], int]:
    """Configurations of each GPU, and faults."""
    line, _, faults = output.splitlines()[-1].rpartition("; ")
    found = {gpu: int(n) for gpu, n in re.findall(r"(sm_\d+): (\d+) configurations", line)}
    return found, int(faults.removesuffix(" faults"))


ROWS = ["--only", "rows", "--width", "256", "--width", "6144"]
# The arguments, the GPUs that they stand for, and faults that are known.
COMPILED = {
    "every kernel of the models' width": (["--width", "1536"], ["sm_80", "sm_90"], []),
    "products on cards with 99 KiB of shared memory": (
        ["--gpu", "sm_89", "--gpu", "sm_120", "--only", "products", "--width", "1536"], ["sm_89", "sm_120"], [],
    ),
    "rows of sm_89": (["--gpu", "sm_89", *ROWS], ["sm_89"], []),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, gpus, known",
    [pytest.param(*of, marks=[] if "1536" in of[0][:2] else [pytest.mark.longest]) for of in COMPILED.values()],
    ids=COMPILED,
)
def test_kernels_keep_within_their_chips(arguments, gpus, known):
    result = compile_kernels(*arguments)
    found, faults = counts(result.stdout)
    lines = [line for line in result.stdout.splitlines() if line.startswith("FAULT")]
    assert len(lines) == faults == len(known) and result.returncode == bool(known), result.stdout + result.stderr
    assert all(re.fullmatch(*pair) for pair in zip(known, lines, strict=True)), lines
    assert [*found] == gpus and len(set(found.values())) == 1 and found[gpus[0]] > 0


@pytest.mark.sweep
def test_every_configuration_keeps_within_every_chip():
    from tools.cubin import CHIPS

    result = compile_kernels()
    found, faults = counts(result.stdout)
    assert set(found) == set(CHIPS) and found["sm_80"] == found["sm_90"] > found["sm_89"] > 0
    assert len({found[gpu] for gpu in ("sm_86", "sm_89", "sm_100", "sm_120")}) == 1
    assert faults == 0 and result.returncode == 0, result.stdout + result.stderr


def test_the_widths_that_are_compiled_have_one_in_each_class_and_every_chip_has_its_products():
    from onepeace_fast.kernels.launch_heuristic import WIDTHS as CLASSES
    from onepeace_fast.kernels.launch_heuristic import width_class
    from tools.compile_kernels import WIDTHS, jobs
    from tools.cubin import CHIPS, PRODUCT_INSTRUCTIONS

    assert {width_class(width) for width in WIDTHS} == set(CLASSES)
    assert {job.architecture for job in jobs() if job.part == "products"} == set(CHIPS) == set(PRODUCT_INSTRUCTIONS)
    rows = {(job.architecture, job.width) for job in jobs() if job.part == "rows"}
    assert rows == {(gpu, width) for gpu in ("sm_80", "sm_90") for width in WIDTHS}


def test_the_interpreter_is_refused_since_it_compiles_nothing():
    result = compile_kernels(TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stdout and len(result.stdout.splitlines()) == 1


def test_each_kernel_of_the_heuristic_and_of_the_tiles_is_launched_by_a_case(monkeypatch):
    from onepeace_fast.kernels import grouped_gemm, launch, launch_heuristic, tile_table
    from tools.compile_kernels import configurations

    asked = set()
    entry, tiles = launch.launch_parameters, grouped_gemm.tiles_of
    monkeypatch.setattr(launch, "launch_parameters", lambda kernel, *rest: asked.add(kernel) or entry(kernel, *rest))
    monkeypatch.setattr(grouped_gemm, "tiles_of", lambda kernel, *rest: asked.add(kernel) or tiles(kernel, *rest))
    configurations("sm_90", 768, torch.bfloat16)
    assert asked == set(launch_heuristic.KERNELS) | set(tile_table.KERNELS)


def inspected(kernel, rows: int, width: int, warps: int, gpu: str = "sm_90", **constants: int):
    """What the check says of a kernel that copies rows in its own way."""
    from onepeace_fast.kernels.launch import Configuration
    from tools.compile_kernels import inspect

    x, y = (torch.empty(rows, width) for _ in range(2))
    return inspect(Configuration(kernel, {"x": x, "y": y}, constants, warps), gpu, width, rows)


@pytest.fixture
def planted():
    from support import planted

    return planted


def test_a_plain_copy_has_no_fault(planted):
    result = inspected(planted.copy, 1024, 1024, 4, START=0)
    assert result.faults == () and result.bytes_per_element == 8 and result.registers > 0 and result.programs > 8


@pytest.mark.slow
def test_a_spill_is_a_fault(planted):
    (fault,) = inspected(planted.hold, 128, 1024, 4, ROWS=128, COLUMNS=1024).faults
    assert fault.startswith("spills: ")


def test_narrow_accesses_to_row_tensors_are_faults_that_name_the_tensor(planted):
    assert inspected(planted.copy, 1024, 1024, 4, START=1).faults == ("load of x: 4 bytes wide, not 16",)


@pytest.mark.parametrize("gpu", ("sm_80", "sm_90"))
def test_a_loop_that_waits_for_the_row_it_asked_for_is_a_fault(planted, gpu):
    def faults(stages, really):
        return inspected(planted.copy_rows, 1024, 1024, 4, gpu, ROWS=1024, STAGES=stages, REALLY=really).faults

    idle = "no copy is under way while a row is computed"
    assert faults(3, 3) == faults(1, 1) == ()
    assert faults(3, 2) == (idle,)
    assert faults(3, 1) == ("load of x: not copied ahead", idle)


def test_what_one_form_of_a_product_lacks_is_named(planted):
    faults = inspected(planted.multiply, 64, 64, 4, SIZE=64, PRECISION="tf32").faults
    assert [fault for fault in faults if "matrix product" in fault] == [
        "no UTMALDG in a matrix product", "no asynchronous HGMMA in a matrix product",
    ]  # fmt: skip


def test_products_that_wait_for_one_another_are_a_fault(planted):
    free, waiting = (
        inspected(planted.multiply_and_add, 64, 256, 4, SIZE=64, STEPS=4, READ=read).faults for read in (0, 1)
    )
    assert free == () and waiting == ("no asynchronous HGMMA in a matrix product",)


@pytest.mark.parametrize("gpu", ("sm_89", "sm_90", "sm_100", "sm_120"))
def test_each_chip_is_held_to_its_own_instructions_and_shared_memory(planted, gpu):
    from tools.cubin import PRODUCT_INSTRUCTIONS

    found = inspected(planted.multiply, 64, 64, 4, gpu, SIZE=64, PRECISION="ieee").faults
    assert {fault for fault in found if "matrix product" in fault} == {
        f"no {name} in a matrix product" for name in PRODUCT_INSTRUCTIONS[gpu]
    }
    most = (227 if gpu in ("sm_90", "sm_100") else 99) * 1024
    big = inspected(planted.transpose, 256, 256, 32, gpu, SIZE=256).faults
    assert f"shared memory: 262144 bytes, of at most {most}" in big, big


def test_a_fault_or_an_empty_architecture_ends_with_code_1_and_one_summary_line(planted, capsys):
    from tools.compile_kernels import report

    good, bad = (inspected(planted.copy, 1024, 1024, 4, START=start) for start in (0, 1))
    old, both = good._replace(architecture="sm_80"), ("sm_80", "sm_90")
    assert report([good, old], both) == 0 and counts(capsys.readouterr().out) == ({"sm_80": 1, "sm_90": 1}, 0)
    assert report([old, bad], both) == 1 and counts(capsys.readouterr().out) == ({"sm_80": 1, "sm_90": 1}, 1)
    assert report([good], both) == 1 and counts(capsys.readouterr().out) == ({"sm_80": 0, "sm_90": 1}, 0)
