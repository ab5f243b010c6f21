"""``onepeace-fast selftest``: what it covers, and that a wrong result is a fault."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from onepeace_fast import backend, cli, info, progress, routed_ffn
from onepeace_fast.hardware import cases, selftest, tune
from onepeace_fast.hardware.cases import Case
from onepeace_fast.kernels import measured as files
from onepeace_fast.tolerance import DTYPES


@pytest.fixture
def results(monkeypatch):
    """Rows of a self-test of the smallest size on the CPU."""
    monkeypatch.setattr(selftest, "SMALL", ((7, 64),))
    return lambda: list(selftest.check(torch.device("cpu")))


def test_every_operation_is_tested_in_every_dtype_and_passes(results):
    found = results()
    assert {r.operation for r in found} == set(info.OPERATIONS)
    assert {r.dtype for r in found} == set(DTYPES)
    assert all(r.kept for r in found)


def test_a_wrong_gradient_is_a_fault_with_code_1(monkeypatch, capsys):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.2 * grad

    def two_cases(rows, width, dtype, make, device):
        right = len(made) % 2 == 0
        made.append(device)
        yield Case("copy", "plain", torch.clone if right else Wrong.apply, {"x": make(rows, width, dtype=dtype)})

    made = []
    monkeypatch.setattr(selftest, "SMALL", ((7, 64),))
    monkeypatch.setattr(selftest, "kernel_cases", two_cases)
    monkeypatch.setattr(selftest, "specified_cases", lambda *_: iter(()))
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    head = lines.index(next(line for line in lines if line.startswith("operation")))
    assert [line.split()[-1] for line in lines[head + 1 : -1]] == ["NO"] * len(DTYPES)
    assert lines[-1].endswith(f"{len(DTYPES)} faults")


@pytest.mark.parametrize(
    "interpreted, device, said",
    [
        (False, "cpu", ["every operation's reference in PyTorch", "No Triton or CUDA kernel runs here"]),
        (True, "cpu", ["in Triton's interpreter", "not in bfloat16", "No kernel runs on a GPU here"]),
        (False, "cuda", ["selftest on A GPU", "Rows marked kernel ran on this GPU"]),
    ],
)
def test_what_can_be_shown_on_this_device_is_said_first(monkeypatch, capsys, interpreted, device, said):
    def looked(device):
        first.append(capsys.readouterr().out)
        return iter(())

    first = []
    monkeypatch.setattr(selftest.kernels, "INTERPRETED", interpreted)
    monkeypatch.setattr(selftest, "gpu_name", lambda device: "A GPU")
    monkeypatch.setattr(selftest, "approve", lambda device: "a file")
    monkeypatch.setattr(selftest, "check", looked)
    assert selftest._test(torch.device(device)) == 0
    assert [words for words in said if words not in first[0]] == []


def test_progress_counts_every_group_of_cases(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(selftest, "SMALL", ((1, 64), (7, 63)))
    for name in ("kernel_cases", "specified_cases", "product_cases"):
        monkeypatch.setattr(selftest, name, lambda *_: iter(()))
    list(selftest.check(torch.device("cpu")))
    lines, groups = capsys.readouterr().err.splitlines(), 3 * len(selftest._dtypes(torch.device("cpu")))
    assert not selftest.kernels.INTERPRETED and len(lines) == groups
    assert lines[-1].startswith(f"selftest: {groups} of {groups} groups in ") and lines[-1].endswith("dtype=bfloat16")


@pytest.mark.parametrize("error, allowed, kept", [(1.0, 2.0, True), (2.0, 1.0, False), (float("nan"), 1.0, False)])
def test_an_error_past_the_bound_or_that_is_no_number_is_a_fault(error, allowed, kept):
    result = selftest.Result("copy", "plain", torch.float32, False, "x", error, allowed)
    assert result.kept == kept and (result.closeness <= 1) == kept


def test_a_gpu_that_is_not_there_is_one_line_and_code_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["selftest", "--device", "cuda"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
@pytest.mark.longest
def test_in_the_interpreter_the_kernels_are_tested():
    command = [sys.executable, "-m", "onepeace_fast.cli", "selftest", "--device", "cpu"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    rows = [line.split() for line in result.stdout.splitlines()[4:-1]]
    assert result.returncode == 0, result.stdout + result.stderr
    assert {row[0] for row in rows if "kernel" in row} >= {
        "layer_norm",
        "residual",
        "residual_layer_norm",
        "gated_sub_ln",
    }


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU on which every comparison is kept, or not, and "grouped" and "hybrid" take the time that is set."""
    state = {"error": 1.0, "architecture": "sm_90", "grouped": 1.0, "hybrid": 1.0}

    def rows(device):
        assert device == GPU
        if isinstance(state["error"], Exception):
            raise state["error"]
        yield selftest.Result("layer_norm", "plain", torch.float32, True, "out0", state["error"], 2.0)

    def seconds(strategy, rows, width, device):
        more = {"per_modality": 0, "grouped": 1e-3, "hybrid": 2e-3}[strategy]
        return state.get(strategy, 1.0) * (1e-3 * rows + more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for module in (selftest, tune):
        monkeypatch.setattr(module, "architecture_and_multiprocessors", lambda device: (state["architecture"], 132))
        monkeypatch.setattr(module, "gpu_name", lambda device: "A GPU")
    monkeypatch.setattr(backend, "gpu_name", lambda device: "A GPU")
    monkeypatch.setattr(selftest, "check", rows)
    monkeypatch.setattr(selftest, "seconds_of_strategy", seconds)
    monkeypatch.setenv(files.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setattr(files, "SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    files.measured_for.cache_clear()
    yield state
    files.measured_for.cache_clear()


def test_a_gpu_that_passes_gets_its_file_and_the_fused_backend(gpu, tmp_path, capsys):
    assert backend.resolve_backend(None, GPU) == "reference"
    assert cli.main(["selftest"]) == 0
    assert backend.resolve_backend(None, GPU) == "fused"
    path = tmp_path / "own" / "a_gpu.json"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{path} says so: from now on the fused backend is automatic on A GPU; to send its file in")
    measured = files.measured_for("A GPU")
    assert (measured.name, measured.architecture, measured.parity) == ("A GPU", "sm_90", True)
    assert set(measured.versions) == {"torch", "triton", "cuda", "driver", "onepeace_fast"}
    assert measured.strategies == {"routed_ffn": [{"width": None, "rows": None, "strategy": "per_modality"}]}


def test_the_strategy_of_each_class_of_rows_is_the_faster_one_there(gpu):
    # 1 and 2 ms more at any size: slower for few rows, faster for many.
    gpu["grouped"], gpu["hybrid"] = 0.9995, 0.9993
    shapes = ((1000, 1536), (4000, 1536), (16000, 1536))
    assert selftest.timed_strategies(GPU, shapes) == [
        {"width": None, "rows": 2000, "strategy": "per_modality"}, {"width": None, "rows": 8000, "strategy": "grouped"},
        {"width": None, "rows": None, "strategy": "hybrid"},
    ]  # fmt: skip
    assert tuple(sorted(selftest.TIMED)) == selftest.TIMED


def test_launch_parameters_and_other_operations_strategies_stay(gpu):
    launches = {"layer_norm": {"2": {"1024": {"block_rows": 2, "num_warps": 4, "programs_per_multiprocessor": 1}}}}
    others = {"another": [{"strategy": "grouped"}]}
    before = files.MeasuredGPU("A GPU", "sm_90", {}, "2026-01-01", False, others, launches)
    files.write_measured(before, files.user_folder())
    assert cli.main(["selftest"]) == 0
    after = files.measured_for("A GPU")
    assert after.launch_parameters == launches and set(after.strategies) == {"another", "routed_ffn"}
    assert after.parity and after.date > before.date


@pytest.mark.parametrize("error", [3.0, float("nan"), RuntimeError("an illegal memory access was encountered")])
@pytest.mark.parametrize("folder", ["own", "shipped", None])
def test_a_gpu_that_fails_gets_no_file_and_loses_what_an_older_one_said(gpu, tmp_path, capsys, error, folder):
    if folder:
        passed = files.MeasuredGPU("A GPU", "sm_90", {}, "2026-01-01", True, {}, {})
        files.write_measured(passed, tmp_path / folder)
        assert backend.resolve_backend(None, GPU) == "fused"
    gpu["error"] = error
    if isinstance(error, Exception):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            cli.main(["selftest"])
    else:
        assert cli.main(["selftest"]) == 1
    assert backend.resolve_backend(None, GPU) == "reference"
    said, path = capsys.readouterr(), tmp_path / "own" / "a_gpu.json"
    assert path.exists() == bool(folder)
    assert (f"{path} no longer makes the fused backend automatic" in said.out + said.err) == bool(folder)


def test_a_gpu_that_is_too_old_or_has_a_damaged_file_is_one_line_and_code_2(gpu, tmp_path, capsys):
    gpu["architecture"] = "sm_75"
    assert cli.main(["selftest"]) == 2
    assert "expected a GPU of compute capability 8.0 or later, got 7.5" in (line := capsys.readouterr().err)
    assert len(line.splitlines()) == 1
    gpu["architecture"] = "sm_80"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a_gpu.json").write_text("{")
    assert cli.main(["selftest"]) == 2
    assert "a_gpu.json: " in (line := capsys.readouterr().err) and len(line.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line_and_code_2(gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv(files.ENVIRONMENT_VARIABLE, str(tmp_path / "file"))
    assert cli.main(["selftest"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_cpu_writes_nothing(results, tmp_path, monkeypatch):
    monkeypatch.setenv(files.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setattr(selftest, "check", lambda device: iter(()))
    assert cli.main(["selftest", "--device", "cpu"]) == 0 and not (tmp_path / "own").exists()


@pytest.mark.parametrize("strategy", ["grouped", "hybrid", "per_modality"])
def test_all_strategies_are_timed_forward_and_backward_with_the_counts_on_the_host(monkeypatch, strategy):
    seen = []

    def launched(z, *arguments, row_counts, **how):
        seen.append((how["strategy"], row_counts))
        return routed_ffn(z, *arguments, row_counts=row_counts, **{**how, "strategy": None})

    def once(calls):
        (call,) = calls
        assert len(call()) > 10
        return 1.5

    monkeypatch.setattr(cases, "routed_ffn", launched)
    monkeypatch.setattr(selftest, "median_time", once)
    assert selftest.seconds_of_strategy(strategy, 40, 16, torch.device("cpu")) == 1.5
    assert seen == [(strategy, [12, 0, 25])] * 2
