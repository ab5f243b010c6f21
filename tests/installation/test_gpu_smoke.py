"""The smoke checks on a CPU, and how `make gpu` builds the extension into the checkout."""

import subprocess
import sys
import types

import pytest
import torch

from onepeace_fast import kernels
from onepeace_fast.hardware import selftest
from onepeace_fast.hardware.cases import empty_tensors
from onepeace_fast.ops.kernel_choice import force_kernels
from tools.gpu_run import extension, plan, smoke, smoke_kernels
from tools.gpu_run.plugin import DEVICE_LOST

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*plan.SMOKE, *plan.SANITIZED])
def test_every_check_has_cases(name):
    check = smoke.checks(full=False)[name]
    held = [case for case in check.cases(empty_tensors(CPU), CPU) if check.holds(case)]
    assert held and len({case.operation.partition("_")[0] for case in held}) == 1


def test_attention_s_checks_have_the_lengths_that_they_name():
    for name in ("attention_33", "attention_72", "attention_257"):
        check = smoke.checks(full=True)[name]
        (case,) = (case for case in check.cases(empty_tensors(CPU), CPU) if check.holds(case))
        assert case.leaves["qkv"].shape[0] == int(name.rpartition("_")[2]) + smoke.INERT


@pytest.mark.parametrize("tensor", ["out0", "weight", None])
def test_a_fault_in_an_output_or_a_gradient_is_found(monkeypatch, capsys, tensor):
    whole, calls = selftest.outputs_and_gradients, []

    def faulty(case, *rest):
        found, given = whole(case, *rest)
        calls.append(case)
        if len(calls) == 1 and tensor:  # the device's, of the first case
            found[tensor].view(-1)[3] += 10.0
        return found, given

    monkeypatch.setattr(selftest, "outputs_and_gradients", faulty)
    assert smoke.main(["layer_norm", "--device", "cpu"]) == int(tensor is not None)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7 and ("FAULT in" in said[0] and f": {tensor}, " in said[0]) == (tensor is not None)
    assert all(": ok; 0 launches; nearest to its bound: " in line for line in said[1:])


@pytest.mark.parametrize("raises", [True, False])
def test_a_lost_device_is_told_apart_from_a_fault(monkeypatch, capsys, raises):
    def faults(*_):
        if raises:
            raise RuntimeError("CUDA error: an illegal\nmemory access")
        return 1

    monkeypatch.setattr(smoke, "faults", faults)
    assert smoke.main(["layer_norm", "--device", "cpu"]) == 1
    monkeypatch.setattr(smoke, "device_lost", lambda: True)
    assert smoke.main(["layer_norm", "--device", "cpu"]) == DEVICE_LOST
    reason = "RuntimeError: CUDA error: an illegal memory access" if raises else "seen after the last case"
    assert capsys.readouterr().out == f"the device answers no more: {reason}\n"


def test_each_case_must_answer_in_time(monkeypatch):
    restarts = []
    monkeypatch.setattr(smoke, "Watchdog", lambda: types.SimpleNamespace(restart=lambda: restarts.append(len(said))))
    said = []
    assert smoke.faults(smoke.checks(full=False)["layer_norm"], CPU, said.append) == 0
    assert restarts == list(range(len(said) + 1)) and len(said) == 7


needs_compiler = pytest.mark.skipif(
    kernels.INTERPRETED or kernels.unavailable_reason() is not None, reason="Triton compiles nothing here"
)


@needs_compiler
def test_the_kernels_of_all_activations_and_modalities_are_compiled_before_the_checks():
    with force_kernels(True):
        found = smoke_kernels.needed(CPU, "sm_90")
    constants = [dict(kernel.constants) for kernel in found]
    activations = {one["ACTIVATION"] for one in constants if "ACTIVATION" in one}
    assert {3} <= {one["MODALITIES"] for one in constants if "MODALITIES" in one} and len(activations) == 4
    assert len(set(found)) == len(found) > 40
    assert {"routed_ffn_norm_gradient_kernel", "residual_backward_kernel"} <= {kernel.name for kernel in found}


def test_half_of_the_cores_compile_for_this_gpu_and_where_triton_is_missing_one_line_says_so(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(smoke_kernels.kernels, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(smoke_kernels.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(smoke_kernels, "needed", lambda device, architecture: [device.type, architecture])
    monkeypatch.setattr(smoke_kernels, "compile_all", lambda *given: asked.append(given[:3]))
    assert smoke_kernels.main() == 0 and asked == [(["cuda", "sm_90"], "sm_90", 8)]
    monkeypatch.setattr(smoke_kernels.kernels, "unavailable_reason", lambda: "Triton is not installed")
    assert smoke_kernels.main() == plan.LEFT_OUT and len(asked) == 1
    assert capsys.readouterr().out == "no kernel is compiled: Triton is not installed\n"


ON_EMULATED_GPU = """
from tools.rehearsal.driver import Driver
from tools.rehearsal.emulation import emulated_gpu

driver = Driver("sm_90", compiling=False)
with emulated_gpu(driver):
    import torch
    from onepeace_fast.hardware import selftest, warmup
    from onepeace_fast.hardware.cases import empty_tensors
    from tools.gpu_run import plan, smoke, smoke_kernels

    device, small = torch.device("cuda"), smoke.checks(full=False)  # the vendor's products are computed
    smoke_kernels.checks = lambda full: small
    for check in (small[name] for name in plan.SMOKE if not name.startswith("attention")):
        for case in check.cases(empty_tensors(device), device):
            if check.holds(case):
                selftest.outputs_and_gradients(case)
    launched = set(driver.programs)
    driver.programs.clear()
    for kernel in smoke_kernels.needed(device, "sm_90"):
        warmup._compile(90, kernel)
    print(len(launched), len(launched - set(driver.programs)), len(set(driver.programs) - launched))
"""


@needs_compiler
@pytest.mark.slow
def test_every_program_that_a_check_launches_is_compiled_before_it_and_no_other():
    command = [sys.executable, "-c", ON_EMULATED_GPU]
    done = subprocess.run(command, cwd=extension.ROOT, capture_output=True, text=True, timeout=300)
    launched, missing, more = map(int, done.stdout.split())
    assert launched > 40 and (missing, more) == (0, 0), done.stderr


@pytest.fixture
def build(monkeypatch, tmp_path):
    """The extension's module in a checkout of its own; returns what was recorded and compiled."""
    compilation, toolkit = (pytest.importorskip(name) for name in ("compilation", "cuda_toolkit"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "onepeace_fast").mkdir()
    done = []

    def decide(reason):
        monkeypatch.setattr(toolkit, "decide", lambda: toolkit.Decision(None, (), reason, False))
        return done

    def compiled(decision, output):
        output.parent.mkdir(parents=True)
        output.write_text("compiled")
        done.append(output)

    monkeypatch.setattr(compilation, "compile_extension", compiled)
    return decide


def test_the_extension_is_put_beside_the_package_in_one_step(build, tmp_path):
    done = build(None)
    assert extension.main() == 0
    (output,) = done
    (module,) = (tmp_path / "onepeace_fast").iterdir()
    assert module.name.startswith("_cuda.") and module.name == output.name and module.read_text() == "compiled"
    assert output.parent == tmp_path / "build" / "cuda"


def test_where_it_cannot_be_built_the_reason_is_the_last_line(build, tmp_path, capsys):
    done = build("neither nvcc nor an NVIDIA driver is found")
    assert extension.main() == plan.LEFT_OUT and not done
    assert capsys.readouterr().out.splitlines()[-1].endswith("left out: neither nvcc nor an NVIDIA driver is found")
    (reason,) = (tmp_path / "onepeace_fast").iterdir()
    assert reason.read_text() == "neither nvcc nor an NVIDIA driver is found\n"
