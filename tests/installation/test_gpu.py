"""What `bootstrap.py gpu` checks before it runs the stages, and which commands the stages are made of."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from installation._machine import SCRIPT, one_line

from tools.gpu_run import plan
from tools.gpu_run.plugin import DEVICE_LOST
from tools.gpu_run.processes import CUT, FAILED, PASSED, UNAVAILABLE
from tools.gpu_run.schedule import Result, State

ROOT = SCRIPT.parent


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise ImportError('libcudart')", "cannot import torch"),
        ("__version__ = '2.8'\nclass cuda: is_available = lambda: False", f"torch 2.8 of {sys.executable} sees none"),
    ],
)
def test_gpu_without_a_gpu_exits_2_with_one_line(tmp_path, torch, said):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(torch)
    script = shutil.copy(SCRIPT, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, script, "gpu"], capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stdout == ""
    assert said in one_line(result.stderr)


def test_gpu_runs_the_stages_in_this_python_and_passes_on_arguments_and_exit_code(bootstrap, gpu):
    gpu.codes["tools.gpu_run"] = 1
    command = "HOST -m tools.gpu_run --minutes 3 --stages smoke"
    assert gpu.started("gpu", "--minutes", "3", "--stages", "smoke", code=1) == [command]
    assert not bootstrap.VENV.exists()


STAGES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("on", flush=True)
time.sleep(20)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal for it")
def test_who_ends_bootstrap_ends_the_run(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.11'\nclass cuda: is_available = lambda: True")
    (tmp_path / "tools" / "gpu_run").mkdir(parents=True)
    (tmp_path / "tools" / "gpu_run" / "__main__.py").write_text(STAGES)
    command = [sys.executable, shutil.copy(SCRIPT, tmp_path), "gpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "on\n"
        process.terminate()
        assert process.wait(60) == 143


@pytest.mark.parametrize("version", ["0", "76.1.0"])
def test_gpu_with_an_old_setuptools_exits_2_with_one_line(bootstrap, gpu, monkeypatch, capsys, version):
    monkeypatch.setattr(bootstrap, "setuptools_version", lambda: version)
    assert gpu.started("gpu", code=2) == []
    assert "needs setuptools 77" in one_line(capsys.readouterr().err)


def test_the_stages_are_listed_where_there_is_no_gpu(machine):
    assert machine.started("gpu", "--list") == ["HOST -m tools.gpu_run --list"]


def machine_of(tmp_path, device: str = "cuda", **how) -> plan.Machine:
    return plan.Machine(device, tmp_path / "out", "2030-01-02T0304", tmp_path, cores=16, **how)


def jobs_of(machine: plan.Machine, name: str, state: State | None = None) -> list[list]:
    """The jobs of a stage, phase by phase."""
    (stage,) = (stage for stage in plan.stages(machine) if stage.name == name)
    return [list(phase(state or State())) for phase in stage.phases]


def command_of(job, seconds: float = 100.0) -> str:
    return (
        " ".join(job.command(seconds)).replace(sys.executable, "HOST").replace(f"{ROOT}/benchmarks", "ROOT/benchmarks")
    )


def test_the_stages_stand_in_order_and_only_a_device_that_smoke_lost_ends_the_run(tmp_path):
    stages = plan.stages(machine_of(tmp_path))
    names = ["build", "smoke", "parity", "benchmarks", "tests", "peers", "sanitizers"]
    assert [stage.name for stage in stages] == names
    for name in names:
        for job in (job for phase in jobs_of(machine_of(tmp_path), name) for job in phase):
            ends = [code for code in (0, 1, 2, plan.LEFT_OUT, DEVICE_LOST, -9, None) if job.ends_run(code)]
            assert ends == ([DEVICE_LOST, -9, None] if name == "smoke" else []), job.name


def test_build_installs_offline_and_compiles_the_extension_beside_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.os, "access", lambda *_: True)
    (install,), (extension, smoke, kernels) = jobs_of(machine_of(tmp_path), "build")
    offline = "--no-input --quiet --no-build-isolation --no-deps --no-index"
    assert command_of(install) == f"HOST -m pip install {offline} --editable ." and install.needed
    assert install.environment["ONEPEACE_FAST_CUDA_ARCHITECTURES"] == "none"
    assert command_of(extension) == "HOST -m tools.gpu_run.extension" and not extension.needed
    assert command_of(smoke) == "HOST -m tools.gpu_run.smoke_kernels" and not smoke.needed
    assert "gpu.py --out" in command_of(kernels) and command_of(kernels).endswith(
        "--device cuda --part headline --date 2030-01-02T0304 --budget-seconds 97.0 --warm"
    )
    assert not kernels.needed and kernels.most_seconds == 60.0
    monkeypatch.setattr(plan.os, "access", lambda *_: False)
    assert "--no-index --user --editable" in command_of(jobs_of(machine_of(tmp_path), "build")[0][0])


def test_a_machine_that_cannot_build_the_extension_says_why_and_a_compiler_s_error_is_a_failure():
    line = "onepeace_fast: all is installed but the CUDA extension, which is left out: neither nvcc nor a driver"
    assert plan._or_unavailable(plan.LEFT_OUT, ["first", line]) == (UNAVAILABLE, line)
    assert plan._or_unavailable(1, ["ninja: stopped"]) == (FAILED, "exit code 1: ninja: stopped")
    assert plan._or_unavailable(0, ["built"]) == (PASSED, "")


def test_smoke_runs_each_check_in_its_own_process_and_says_how_to_look_closer(tmp_path):
    (jobs,) = jobs_of(machine_of(tmp_path), "smoke")
    assert [command_of(job) for job in jobs] == [f"HOST -m tools.gpu_run.smoke {n} --device cuda" for n in plan.SMOKE]
    assert {"attention_72", "attention_257"} <= set(plan.SMOKE) and {job.most_seconds for job in jobs} == {45.0}
    blocking, sanitizer = plan.closer_look("attention_72")
    run = f"{sys.executable} -m tools.gpu_run.smoke attention_72"
    assert blocking == f"CUDA_LAUNCH_BLOCKING=1 {run}" and sanitizer.endswith(f"compute-sanitizer {run}")


@pytest.mark.parametrize("keyword", ["", "norm"])
def test_every_file_of_tests_has_a_process_of_its_own_and_what_parity_ran_is_not_run_again(tmp_path, keyword):
    (parity,) = jobs_of(machine_of(tmp_path, keyword=keyword), "parity")
    record = tmp_path / "parity-tests.models.test_parity.py.jsonl"
    assert str(record) in {job.environment["GPU_RUN_TESTS"] for job in parity}
    record.write_text("")
    (tests,) = jobs_of(machine_of(tmp_path, keyword=keyword), "tests")
    for jobs in (parity, tests):
        assert all(command_of(job).startswith("HOST -m pytest -p tools.gpu_run.plugin ") for job in jobs)
        assert all(" -m gpu " in command_of(job) for job in jobs)
        files = [command_of(job).split()[-1] for job in jobs]
        assert {"tests/models/test_parity.py", "tests/kernels/test_layer_norm.py"} <= set(files)
        assert "tests/test_config.py" not in files and all((ROOT / file).is_file() for file in files)
        assert len({job.environment["GPU_RUN_TESTS"] for job in jobs}) == len(jobs)
        assert {job.most_seconds for job in jobs} == {60.0}
        died = [jobs[0].again(code) for code in (0, 1, 2, 3, 5, DEVICE_LOST, -9, -11)]
        assert died == [False] * 5 + [True] * 3
    chosen = f"({plan.PARITY}) and (norm)" if keyword else f"({plan.PARITY})"
    assert all(f"-k {chosen} " in command_of(job) for job in parity)
    assert all(("-k (norm) " in command_of(job)) == bool(keyword) for job in tests)
    assert {job.environment["GPU_RUN_TESTED"] for job in parity} == {""}
    assert {job.environment["GPU_RUN_TESTED"] for job in tests} == {str(record)}
    shards = [job.environment["GPU_RUN_SHARD"] for job in tests if "kernels/test_layer_norm" in command_of(job)]
    assert shards == ["1/3", "2/3", "3/3"]
    whole = [command_of(job).split()[-1] for job in parity if job.environment["GPU_RUN_SHARD"] == "1/1"]
    first = [(command_of(job).split()[-1], job.environment["GPU_RUN_SHARD"]) for job in parity[:3]]
    assert first == [(plan.ENCODER, shard) for shard in shards] and len(whole) == len(parity) - 3
    assert "tests/kernels/test_rms_norm.py" not in whole  # which has no test of parity
    assert tests[0].judge(plan.NOTHING_COLLECTED, []) == (PASSED, "no test is left for it")
    assert tests[0].judge(1, ["1 failed"]) == (FAILED, "exit code 1: 1 failed")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_parity_finds_tests_of_agreement_and_of_repeats():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-k", plan.PARITY]
    files = ["tests/models/test_parity.py", "tests/models/test_on_gpu.py"]
    files += ["tests/ops/test_relative_bias_attention_real_sizes.py"]
    found = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    assert all(f"{file}::" in found for file in files) and "bit_for_bit" in found and "test_repeats" in found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_every_file_that_has_a_test_of_parity_has_a_process(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "", "-k", plan.PARITY]
    command += plan.files_of_gpu_tests()
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    (parity,) = jobs_of(machine_of(tmp_path), "parity")
    files = {line.partition("::")[0] for line in found.splitlines() if "::" in line}
    assert files - {command_of(job).split()[-1] for job in parity} == set()
    assert plan.ENCODER in files and len(files) > 8


def test_parity_that_nothing_has_passed_is_none_and_a_failure_of_an_earlier_process_counts(tmp_path):
    stages = {stage.name: stage for stage in plan.stages(machine_of(tmp_path))}
    parity, tests = stages["parity"], stages["tests"]
    assert "no test has passed" in parity.check(False) and tests.check(False) is parity.check(True) is None
    record = tmp_path / "parity-one.jsonl"
    record.write_text('{"test": "a", "outcome": "skipped"}\n{"test": "c", "began": true}\n')
    assert "no test has passed" in parity.check(False) and parity.check(True) is None
    record.write_text(record.read_text() + '{"test": "b", "outcome": "passed"}\n')
    assert parity.check(False) is None
    (tmp_path / "tests-one.jsonl").write_text('{"test": "d", "outcome": "failed"}\n')
    assert tests.check(False) == tests.check(True) == "1 tests have failed" and parity.check(False) is None


def test_benchmarks_go_on_after_a_crash_and_end_before_they_are_ended(tmp_path):
    (job,), proposal = jobs_of(machine_of(tmp_path), "benchmarks")
    assert command_of(job, 50.0) == (
        f"HOST ROOT/benchmarks/gpu.py --out {tmp_path / 'out'} --device cuda --part headline --date 2030-01-02T0304"
        " --budget-seconds 35.0"
    )
    assert [job.again(code) for code in (0, 1, 2, 3, -9, -11)] == [False, False, False, True, True, True]
    assert proposal == [] and job.most_seconds == 60.0
    (kernels,), (job,) = jobs_of(machine_of(tmp_path), "peers")
    assert "--part rest" in command_of(job) and command_of(job, 50.0).endswith("--budget-seconds 47.0")
    assert command_of(kernels, 50.0).endswith("--budget-seconds 22.0 --warm")


@pytest.mark.parametrize(
    "smoke, parity, expected",
    [
        (PASSED, PASSED, 1),
        (PASSED, FAILED, 0),
        (PASSED, CUT, 0),
        (CUT, PASSED, 0),
        (FAILED, PASSED, 0),
        (PASSED, None, 0),
        (None, PASSED, 0),
    ],
)
def test_a_file_for_the_gpu_is_proposed_only_where_smoke_and_parity_passed(tmp_path, smoke, parity, expected):
    machine = machine_of(tmp_path)
    machine.out.mkdir()
    (machine.out / "gpu_other_2020.json").touch()
    path = machine.out / f"gpu_H200_{machine.date}.json"
    path.touch()
    states = {"smoke": smoke, "parity": parity}
    state = State([Result(name, state) for name, state in states.items() if state])
    jobs = jobs_of(machine, "benchmarks", state)[1]
    assert [command_of(job) for job in jobs] == [f"HOST -m tools.gpu_run.proposal {path} {machine.out}"] * expected
    chosen = machine_of(tmp_path, keyword="norm")  # some tests of parity alone show no parity
    assert not jobs_of(chosen, "benchmarks", state)[1]


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME"])
def test_sanitizers_look_at_two_short_shapes(tmp_path, monkeypatch, place):
    program = tmp_path / "bin" / "compute-sanitizer"
    monkeypatch.setattr(plan.shutil, "which", lambda name: str(program) if place == "PATH" else None)
    if place == "CUDA_HOME":
        program.parent.mkdir()
        program.touch()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (jobs,) = jobs_of(machine_of(tmp_path), "sanitizers")
    checked = [command_of(job) for job in jobs]
    assert [line.split("smoke ")[1] for line in checked] == [
        f"{check} --device cuda" for check in ("attention_72",) * 2 + ("attention_33",) * 2
    ]
    for tool, line in zip(("memcheck", "racecheck") * 2, checked, strict=True):
        assert line.startswith(f"{program} --tool {tool} --kernel-name kns=onepeace_fast --error-exitcode 99 HOST ")
    assert all(job.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for job in jobs)
    assert {job.most_seconds for job in jobs} == {None}  # a race's check takes hundreds of times longer


def test_without_compute_sanitizer_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    ((job,),) = jobs_of(machine_of(tmp_path), "sanitizers")
    done = subprocess.run(job.command(1.0), capture_output=True, text=True)
    state, note = job.judge(done.returncode, done.stdout.splitlines())
    assert (state, note) == (UNAVAILABLE, "compute-sanitizer is neither on PATH nor in CUDA_HOME")


@pytest.mark.parametrize(
    "code, lines, state",
    [
        (0, ["========= ERROR SUMMARY: 0 errors"], PASSED),
        (99, ["========= Invalid __global__ write of size 4 bytes", "ERROR SUMMARY: 1 error"], FAILED),
        (99, ["========= Error: Race reported between Write access", "========= RACECHECK SUMMARY: 1 hazard"], FAILED),
        (1, ["========= Error: Device not supported", "CUDA error: unknown error 999"], UNAVAILABLE),
        (99, ["========= Device not supported. Please refer to", "ERROR SUMMARY: 3 errors"], UNAVAILABLE),
        (99, ["========= Device not supported", "========= RACECHECK SUMMARY: 0 hazards displayed"], UNAVAILABLE),
        (99, ["========= Device not supported", "========= Invalid __shared__ read of size 16 bytes"], FAILED),
        (1, ["relative_bias_attention: FAULT in 3 of 90 comparisons"], FAILED),
    ],
)  # fmt: skip
def test_a_sanitizer_that_refuses_the_device_has_found_nothing(code, lines, state):
    found, note = plan._sanitizer_judge(code, lines)
    assert found == state and (note != "") == (state != PASSED)
    assert ("refuses: " in note) == (state == UNAVAILABLE)


def test_a_rehearsal_on_a_cpu_installs_and_compiles_nothing(tmp_path):
    machine = machine_of(tmp_path, "cpu")
    assert [len(jobs) for jobs in jobs_of(machine, "build")] == [0, 1]
    assert "--quick" in command_of(jobs_of(machine, "benchmarks")[0][0])
    assert jobs_of(machine, "peers")[0] == []
    assert not {job.name for job in jobs_of(machine, "smoke")[0]} & set(plan.NEEDS_KERNELS)
