"""The compile-only check of the CUDA kernels: it compiles all of them, and its gates bite."""

import shutil
from collections import Counter
from importlib.util import find_spec

import pytest

from tools import compile_cuda

TOOLKIT = compile_cuda.find_toolkit()
pytestmark = [
    pytest.mark.skipif(TOOLKIT is None, reason="no nvcc is found (set CUDA_HOME, or put it on PATH)"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton, whose wheel has cuobjdump, is not installed"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_cuda.compile_library(TOOLKIT.nvcc, tmp_path_factory.mktemp("cuda"))


def test_every_kernel_keeps_to_its_plan_on_both_chips(library):
    results = compile_cuda.inspect(library)
    of_types = len(compile_cuda.HEAD_SIZES) * 2
    expected = {"forward": 2 * of_types, "row_sums": 2 * of_types, "backward": 2 * of_types}
    expected |= {"sum_queries": of_types, "sum_entries": len(compile_cuda.HEAD_SIZES)}
    for architecture in compile_cuda.ARCHITECTURES:
        names = [result.name.split("_kernel")[0] for result in results if result.architecture == architecture]
        assert Counter(names) == expected
    assert not [result for result in results if result.faults]
    assert all(result.local == 0 for result in results)
    assert all(result.matrix_instructions or result.name.startswith("sum_") for result in results)


def test_a_sample_that_one_thread_block_holds_is_read_once(library):
    rows = compile_cuda.moved(library, compile_cuda.CHIPS["sm_90"])
    found = {(shape, int(size)): (float(moved), float(least)) for shape, size, moved, least in rows}
    assert len(found) == len(rows) == len(compile_cuda.SHAPES) * len(compile_cuda.HEAD_SIZES)
    for size in (32, 64):
        moved, least = found["64 x 257 tokens", size]
        assert least < moved <= 1.1 * least  # codes, and what thread blocks leave of the vectors' gradients
    assert all(moved > 2 * least for (shape, _), (moved, least) in found.items() if shape.startswith("2 x"))


def test_more_shared_memory_than_planned_is_a_fault(library, monkeypatch):
    monkeypatch.setattr(compile_cuda, "PLANNED_ENTRIES", 7000)
    faults = {result.name: result.faults for result in compile_cuda.inspect(library) if result.faults}
    assert faults and {fault for of_kernel in faults.values() for fault in of_kernel} <= {
        "planned for 1 at once",
        "planned for 2 at once",
    }


@pytest.mark.slow
def test_local_memory_is_a_fault(tmp_path, monkeypatch):
    source = tmp_path / "csrc" / "relative_bias_attention_forward.cuh"
    shutil.copytree(compile_cuda.CSRC, source.parent)
    text = source.read_text()
    assert text.count("windowed ? 1 : 2") == 1
    source.write_text(text.replace("windowed ? 1 : 2", "windowed ? 1 : 3"))  # which leaves too few registers for each
    monkeypatch.setattr(compile_cuda, "CSRC", source.parent)
    faults = {
        r.name: r.faults for r in compile_cuda.inspect(compile_cuda.compile_library(TOOLKIT.nvcc, tmp_path)) if r.faults
    }
    assert "bytes of local memory" in faults["forward_kernel nv_bfloat16 64"][0]


def test_a_machine_without_nvcc_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(compile_cuda, "find_toolkit", lambda: None)
    assert compile_cuda.main() == 0
    assert capsys.readouterr().out.startswith("CUDA kernels: not compiled, there is no nvcc")
