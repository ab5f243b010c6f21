"""``onepeace-fast selftest``: what it covers, and that a wrong result is a fault."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from onepeace_fast import cli, info
from onepeace_fast.hardware import selftest
from onepeace_fast.hardware.cases import Case
from onepeace_fast.tolerance import DTYPES


@pytest.fixture
def results(monkeypatch):
    """Rows of a self-test of the smallest size on the CPU."""
    monkeypatch.setattr(selftest, "SMALL", ((7, 64),))
    return lambda: list(selftest.check(torch.device("cpu")))


def test_every_operation_is_tested_in_every_dtype_and_passes(results):
    found = results()
    assert {
        (r.operation.removesuffix("_layer_norm") if r.operation.startswith("residual") else r.operation) for r in found
    } == set(info.OPERATIONS)
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

    def cases(rows, width, dtype, make, device):
        right = len(made) % 2 == 0
        made.append(device)
        yield Case("copy", "plain", torch.clone if right else Wrong.apply, {"x": make(rows, width, dtype=dtype)})

    made = []
    monkeypatch.setattr(selftest, "SMALL", ((7, 64),))
    monkeypatch.setattr(selftest, "kernel_cases", cases)
    monkeypatch.setattr(selftest, "specified_cases", lambda *_: iter(()))
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == ["NO"] * len(DTYPES)
    assert lines[-1].endswith(f"{len(DTYPES)} faults")


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
def test_in_the_interpreter_the_kernels_are_tested():
    command = [sys.executable, "-m", "onepeace_fast.cli", "selftest", "--device", "cpu"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    rows = [line.split() for line in result.stdout.splitlines()[1:-1]]
    assert result.returncode == 0, result.stdout + result.stderr
    assert {row[0] for row in rows if "kernel" in row} >= {
        "layer_norm",
        "residual",
        "residual_layer_norm",
        "gated_sub_ln",
    }
