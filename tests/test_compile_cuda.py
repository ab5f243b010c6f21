"""The compile-only check of the CUDA kernels: its gates bite, and where slow tests run it compiles all of them."""

import ctypes
import shutil
from collections import Counter
from importlib.util import find_spec

import pytest

from tools import compile_cuda
from tools.compile_cuda import Kernel, Plan

TOOLKIT = compile_cuda.find_toolkit()


def compiles(test):
    """A test that compiles the kernels, which takes minutes; `make kernels` does the same."""
    test = pytest.mark.skipif(TOOLKIT is None, reason="no nvcc is found (set CUDA_HOME, or put it on PATH)")(test)
    has_disassembler = find_spec("triton") is not None
    reason = "Triton, whose wheel has cuobjdump, is not installed"
    return pytest.mark.longest(pytest.mark.slow(pytest.mark.skipif(not has_disassembler, reason=reason)(test)))


NAME = "_ZN13onepeace_fast{length}{kernel}{parameters}Ev"
FORWARD = NAME.format(length=24, kernel="attention_forward_kernel", parameters="I6__halfLi64ELi64ELb0ELb0E")
COMPACT = NAME.format(length=25, kernel="attention_backward_kernel", parameters="I13__nv_bfloat16Li128ELi64ELb1ELb0E")
WIDE = NAME.format(length=25, kernel="attention_backward_kernel", parameters="I13__nv_bfloat16Li128ELi128ELb0ELb1E")
QUERIES = NAME.format(length=28, kernel="attention_sum_queries_kernel", parameters="I6__halfLi128EE")
SUMS = "_ZN13onepeace_fast28attention_sum_entries_kernelENS_21RelativeBiasAttentionE"


def test_kernels_are_known_by_their_mangled_names():
    assert compile_cuda.describe(FORWARD) == Kernel("attention_forward_kernel", "half", 64, 64)
    assert compile_cuda.describe(COMPACT) == Kernel("attention_backward_kernel", "nv_bfloat16", 128, 64, compact=True)
    assert compile_cuda.describe(WIDE) == Kernel("attention_backward_kernel", "nv_bfloat16", 128, 128, large=True)
    assert compile_cuda.describe(QUERIES) == Kernel("attention_sum_queries_kernel", "half", 128)
    assert compile_cuda.describe(SUMS) == Kernel("attention_sum_entries_kernel")
    assert compile_cuda.describe(WIDE).label == "attention_backward_kernel nv_bfloat16 128 large"
    assert compile_cuda.describe(COMPACT).label == "attention_backward_kernel nv_bfloat16 128/64 compact"


def inspected(monkeypatch, architecture, symbol, plan, launched=True, registers=100, local=0, code="HMMA.16816.F32"):
    """The faults of one kernel, by what the disassembler says of it and how it is launched."""
    lines = {
        "-sass": f"arch = {architecture}\n\tFunction : {symbol}\n  {code} R0\n",
        "--dump-resource-usage": f"arch = {architecture}\n Function {symbol}:\n"
        f"  REG:{registers} STACK:{local} SHARED:0 LOCAL:0\n",
    }
    monkeypatch.setattr(compile_cuda, "cuobjdump", lambda library, option: lines[option])
    monkeypatch.setattr(compile_cuda, "plan", lambda library, kernel, chip: (plan, launched))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)
    (result,) = compile_cuda.inspect("kernels.so")
    assert (result.architecture, result.registers, result.local) == (architecture, registers, local)
    return result.faults


def test_every_fault_of_a_kernel_is_named(monkeypatch):
    fits, large = Plan(288, 2, 48 * 1024), Plan(128, 1, 120 * 1024)
    for architecture in compile_cuda.ARCHITECTURES:
        assert inspected(monkeypatch, architecture, FORWARD, fits) == ()
        assert inspected(monkeypatch, architecture, SUMS, Plan(256, 1, 0), code="FADD") == ()
        assert inspected(monkeypatch, architecture, FORWARD, fits, local=8) == ("8 bytes of local memory",)
        assert inspected(monkeypatch, architecture, FORWARD, fits, code="FADD") == ("no matrix instruction",)
        assert inspected(monkeypatch, architecture, FORWARD, fits, registers=128) == ("planned for 2 at once",)
        assert inspected(monkeypatch, architecture, WIDE, large, launched=False) == ()
    for architecture in ("sm_80", "sm_90a", "sm_100"):
        assert inspected(monkeypatch, architecture, WIDE, large) == ()
    for architecture in ("sm_89", "sm_120"):
        expected = ("122880 bytes of shared memory, of 101376", "planned for 1 at once")
        assert inspected(monkeypatch, architecture, WIDE, large) == expected


@pytest.mark.parametrize("name", ["sm_70", "sm_80,sm_75"])
def test_an_architecture_that_is_not_checked_is_refused_in_one_line(capsys, name):
    with pytest.raises(SystemExit):
        compile_cuda.main(["--architectures", name])
    assert "--architectures: expected some of sm_80,sm_89," in capsys.readouterr().err.splitlines()[-1]


COMPILED = ("sm_90a",)  # `make kernels` compiles for all


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_cuda.compile_library(TOOLKIT.nvcc, tmp_path_factory.mktemp("cuda"), COMPILED)


@compiles
def test_every_kernel_keeps_to_its_plan(library):
    results = compile_cuda.inspect(library)
    of_types = len(compile_cuda.HEAD_SIZES) * 2
    expected = {"forward": 3 * of_types, "row_sums": 3 * of_types, "backward": 4 * of_types - 4}  # 32: no compact one
    expected |= {"sum_queries": 2 * len({head_dim for head_dim, _ in compile_cuda.HEAD_SIZES}), "sum_entries": 1}
    for architecture in COMPILED:
        names = [result.name.split("_kernel")[0] for result in results if result.architecture == architecture]
        assert Counter(names) == {f"attention_{name}": count for name, count in expected.items()}
    assert not [result for result in results if result.faults]
    assert all(result.local == 0 for result in results)
    launched = [result for result in results if result.at_once and not result.name.startswith("attention_sum_")]
    shapes = {result.name.replace(" compact", "").replace(" large", "") for result in launched}
    assert len(shapes) == 3 * of_types and all(result.matrix_instructions for result in launched)


@compiles
def test_a_sample_that_one_thread_block_holds_is_read_once(library):
    rows = compile_cuda.moved(library, compile_cuda.ARCHITECTURES["sm_90a"])
    found = {(shape, size): (float(moved), float(least)) for shape, size, moved, least in rows}
    assert len(found) == len(rows) == len(compile_cuda.SHAPES) * len(compile_cuda.HEAD_SIZES)
    for size in ("32", "64"):
        moved, least = found["64 x 257 tokens", size]
        assert least < moved <= 1.1 * least  # codes, and what thread blocks leave of the vectors' gradients
    assert all(moved > 2 * least for (shape, _), (moved, least) in found.items() if shape.startswith("2 x"))


@compiles
def test_local_memory_is_a_fault(tmp_path, monkeypatch):
    source = tmp_path / "csrc" / "relative_bias_attention_forward.cu"
    shutil.copytree(compile_cuda.CSRC, source.parent, ignore=shutil.ignore_patterns("*_backward*.cu"))
    text = source.read_text()
    bounds = "COMPACT>::AT_ONCE))\nattention_forward_kernel"
    assert text.count(bounds) == 1
    source.write_text(text.replace(bounds, bounds.replace("AT_ONCE", "AT_ONCE + 1")))  # too few registers for each
    monkeypatch.setattr(compile_cuda, "CSRC", source.parent)
    faults = {
        r.name: r.faults
        for r in compile_cuda.inspect(compile_cuda.compile_library(TOOLKIT.nvcc, tmp_path, ["sm_90a"]))
        if r.faults
    }
    assert "bytes of local memory" in faults["attention_forward_kernel nv_bfloat16 64"][0]


def test_a_machine_without_nvcc_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(compile_cuda, "find_toolkit", lambda: None)
    assert compile_cuda.main([]) == 0
    assert capsys.readouterr().out.startswith("CUDA kernels: not compiled, there is no nvcc")
