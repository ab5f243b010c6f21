"""What bootstrap.py does with an environment, without a network: every command that it would start is recorded."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import ensurepip
except ModuleNotFoundError:
    ensurepip = None

from installation._machine import CHECKS, SCRIPT, offer, one_line

BUNDLED = Path(ensurepip.__file__).parent / "_bundled" if ensurepip else Path()

PIP = "VENV -m pip install --no-input"
NEW = ["HOST -m venv {venv}", PIP + " torch==2.13.0 --editable .[demo]", "VENV -m onepeace_fast.cli demo"]


def new(bootstrap) -> list[str]:
    """Return the commands of a first `demo`."""
    return [command.format(venv=bootstrap.VENV) for command in NEW]


def test_first_demo_builds_an_environment_installs_the_pinned_torch_and_runs_from_it(bootstrap, machine, capsys):
    commands = machine.started("demo", "--steps", "3")
    assert commands == [*new(bootstrap)[:2], "VENV -m onepeace_fast.cli demo --steps 3"]
    said = capsys.readouterr().out
    assert "torch 2.13.0 (200 MB for CPUs, gigabytes with CUDA" in said and "scikit-learn" in said


def test_what_the_build_left_out_is_said_after_the_installation(bootstrap, machine, capsys):
    machine.started("demo")
    assert "without the CUDA extension" not in capsys.readouterr().out
    shutil.rmtree(bootstrap.VENV)
    bootstrap.LEFT_OUT.parent.mkdir()
    bootstrap.LEFT_OUT.write_text("no nvcc\n")
    machine.started("demo")
    assert "==> Installed without the CUDA extension: no nvcc\n" in capsys.readouterr().out


def test_second_demo_calls_no_pip(bootstrap, machine):
    machine.started("demo")
    assert machine.started("demo") == ["VENV -m onepeace_fast.cli demo"]


def test_demo_after_test_calls_no_pip_and_test_after_demo_adds_its_tools_to_the_same_environment(bootstrap, machine):
    machine.started("demo")
    machine.torches[str(bootstrap.PYTHON)] = ("2.13.0+cpu", False, "site-packages/torch")
    assert machine.started("test")[:2] == [PIP + " --editable .[demo,train,docs,dev]", f"VENV {CHECKS[0]}"]
    assert machine.started("demo") == ["VENV -m onepeace_fast.cli demo"]
    assert machine.started("test")[0] == f"VENV {CHECKS[0]}"


def test_slow_tests_add_transformers_once_and_the_quick_ones_then_call_no_pip(bootstrap, machine):
    machine.started("test")
    machine.torches[str(bootstrap.PYTHON)] = ("2.13.0+cpu", False, "site-packages/torch")
    assert machine.started("test-all")[0] == PIP + " --editable .[demo,train,docs,dev,transformers]"
    assert len(machine.started("test-all")) == 1
    assert machine.started("test")[0] == f"VENV {CHECKS[0]}"


def write(name):
    """Change a file of the checkout."""

    def change(bootstrap, monkeypatch):
        (bootstrap.ROOT / name).parent.mkdir(exist_ok=True)
        (bootstrap.ROOT / name).write_text("# changed\n")

    return change


CHANGES = {name: write(name) for name in ("pyproject.toml", "setup.py", "build_backend/backend.py", "csrc/kernel.cuh")}
for variable in ("CUDA_HOME", "ONEPEACE_FAST_CUDA_ARCHITECTURES"):
    CHANGES[variable] = lambda _, monkeypatch, variable=variable: monkeypatch.setenv(variable, "another")
CHANGES["nvcc"] = lambda bootstrap, patch: offer(bootstrap, patch, "venv", "ensurepip", programs=("nvcc",))


@pytest.mark.parametrize("name", CHANGES)
def test_changed_packaging_source_or_compiler_installs_again_into_the_same_environment(
    bootstrap, machine, monkeypatch, name
):
    machine.started("demo")
    CHANGES[name](bootstrap, monkeypatch)
    assert machine.started("demo") == new(bootstrap)[1:]
    assert machine.started("demo") == new(bootstrap)[2:]


@pytest.mark.parametrize("key", ["python", "prefix", "checkout", "damaged stamp", "no interpreter"])
def test_environment_of_another_python_or_folder_or_a_damaged_one_is_built_anew(bootstrap, machine, key):
    machine.started("demo")
    stamp = json.loads(bootstrap.STAMP.read_text())
    if key in stamp["identity"]:
        stamp["identity"][key] = "another"
        bootstrap.STAMP.write_text(json.dumps(stamp))
    elif key == "damaged stamp":
        bootstrap.STAMP.write_text('{"complete": tr')
    else:
        bootstrap.PYTHON.unlink()
    assert machine.started("demo") == new(bootstrap)


@pytest.mark.parametrize("step", ["-m venv", "pip install"])
def test_interruption_prints_one_line_and_the_next_run_builds_anew(bootstrap, machine, capsys, step):
    machine.interrupted_at = step
    machine.started("demo", code=130)
    assert one_line(capsys.readouterr().err) == "Interrupted; run the same command again to go on."
    leftover = bootstrap.VENV / "leftover"
    leftover.touch()
    machine.interrupted_at = ""
    assert machine.started("demo") == new(bootstrap)
    assert not leftover.exists()


def test_interruption_of_an_addition_to_a_whole_environment_makes_the_next_run_build_anew(bootstrap, machine):
    machine.started("demo")
    machine.interrupted_at = "pip install"
    machine.started("test", code=130)
    machine.interrupted_at = ""
    assert machine.started("demo") == new(bootstrap)


def test_failing_pip_ends_in_one_line_with_its_code_and_the_next_run_tries_again(bootstrap, machine, capsys):
    machine.codes["pip install"] = 7
    assert machine.started("demo", code=7) == new(bootstrap)[:2]
    assert one_line(capsys.readouterr().err).startswith("pip failed")
    machine.codes.clear()
    assert machine.started("demo") == new(bootstrap)


def test_failing_pip_leaves_a_whole_environment_whole(bootstrap, machine):
    machine.started("demo")
    machine.codes["pip install"] = 1
    machine.started("test", code=1)
    assert machine.started("demo") == new(bootstrap)[2:]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_environment_made_by_others_is_refused_and_left_alone(bootstrap, machine, capsys, kind):
    mine = bootstrap.VENV / "pyvenv.cfg" if kind == "folder" else bootstrap.VENV
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert machine.started("demo", code=1) == []
    assert "was not made by this script" in one_line(capsys.readouterr().err)
    assert mine.read_text() == "mine"


def test_torch_of_this_python_is_shared_if_it_is_recent_enough(bootstrap, machine):
    torch = ("2.10.1+cu130", True, str(bootstrap.ROOT))
    machine.torches = {sys.executable: torch, str(bootstrap.PYTHON): torch}
    commands = machine.started("demo")
    assert commands[:2] == [f"HOST -m venv --system-site-packages {bootstrap.VENV}", PIP + " --editable .[demo]"]


def test_torch_of_this_python_that_is_too_old_is_not_shared(bootstrap, machine):
    machine.torches[sys.executable] = ("2.7.1", True, str(bootstrap.ROOT))
    assert machine.started("demo") == new(bootstrap)


def test_torch_of_an_active_environment_is_shared_by_its_folder(bootstrap, machine, monkeypatch, tmp_path):
    packages = tmp_path / "other" / "site-packages"
    (packages / "torch").mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "other"))
    torch = ("2.11.0", True, str(packages / "torch"))
    machine.torches = {sys.executable: torch, str(bootstrap.PYTHON): torch}
    assert machine.started("demo")[:2] == [f"HOST -m venv {bootstrap.VENV}", PIP + " --editable .[demo]"]
    (shared,) = bootstrap.VENV.rglob("host_torch.pth")
    assert shared.read_text() == f"{packages}\n"


def test_environment_whose_shared_torch_is_gone_is_built_anew(bootstrap, machine, tmp_path):
    folder = tmp_path / "torch"
    folder.mkdir()
    torch = ("2.11.0", True, str(folder))
    machine.torches = {sys.executable: torch, str(bootstrap.PYTHON): torch}
    machine.started("demo")
    folder.rmdir()
    machine.torches.clear()
    assert machine.started("demo") == new(bootstrap)


def test_active_environment_is_not_deleted_under_its_own_interpreter(bootstrap, machine, monkeypatch, capsys):
    machine.interrupted_at = "pip install"
    machine.started("demo", code=130)
    capsys.readouterr()
    monkeypatch.setattr(sys, "prefix", str(bootstrap.VENV))
    assert machine.started("demo", code=1) == []
    assert "`deactivate`" in one_line(capsys.readouterr().err) and bootstrap.PYTHON.exists()


@pytest.mark.skipif(not list(BUNDLED.glob("pip-*.whl")), reason="no wheel of pip lies on this machine")
def test_without_ensurepip_the_pip_of_this_python_fills_the_environment(bootstrap, monkeypatch):
    offer(bootstrap, monkeypatch, "venv", "pip")
    make, fill = bootstrap.creation_commands()
    subprocess.run(make, check=True)
    offline = ["--no-index", "--find-links", str(BUNDLED), "--quiet"]
    subprocess.run([*fill, *offline], check=True, capture_output=True)
    version = subprocess.run([bootstrap.PYTHON, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
    assert f"from {bootstrap.VENV}" in version.stdout


@pytest.mark.parametrize(
    ("modules", "programs", "expected"),
    [
        (["venv", "virtualenv"], (), [sys.executable, "-m", "virtualenv"]),
        (["venv"], ("virtualenv", "uv"), ["virtualenv", "--python", sys.executable]),
        ([], ("uv",), ["uv", "venv", "--seed"]),
    ],
)
def test_without_ensurepip_and_pip_another_tool_makes_the_environment(
    bootstrap, monkeypatch, modules, programs, expected
):
    monkeypatch.setattr(bootstrap, "find_spec", lambda name: name in modules)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: name if name in programs else None)
    (command,) = bootstrap.creation_commands("--system-site-packages")
    assert command[:3] == expected and command[-2:] == ["--system-site-packages", str(bootstrap.VENV)]


def test_without_any_way_to_make_an_environment_one_line_says_what_to_type(bootstrap, machine, monkeypatch, capsys):
    offer(bootstrap, monkeypatch, "venv")
    assert machine.started("demo", code=1) == []
    assert "`sudo apt install python3-venv`" in one_line(capsys.readouterr().err)
    assert not bootstrap.VENV.exists()


PARALLEL = "VENV -m pytest -n auto --dist loadfile"
# The last commands that each starts: of `test` the checks and then the quick tests, on all cores.
LAST = {
    "test": [*(f"VENV {check}" for check in CHECKS), PARALLEL],
    "test tests/ops -k norm": [f"{PARALLEL} tests/ops -k norm"],
    "test --coverage -x": [f"{PARALLEL} --cov --cov-report=term-missing:skip-covered --cov-fail-under=90 -x"],
    "test-all -x": [f"{PARALLEL} --no-loadscope-reorder -m slow and not gpu -x"],
    "mutants --all": ["VENV -m tools.mutants --all"],
    "rehearse --short": ["VENV -m tools.rehearsal --short"],
    "kernels --all": [
        "VENV -m tools.compile_kernels --all", "VENV -m tools.kernel_model", "VENV -m tools.layer_traffic",
        "VENV -m tools.compile_cuda",
    ],
}  # fmt: skip


@pytest.mark.parametrize("line", LAST)
def test_commands_pass_their_arguments_on(machine, line):
    expected = LAST[line]
    assert machine.started(*line.split())[-len(expected) :] == expected


@pytest.mark.parametrize("tool", ("compile_kernels", "kernel_model", "layer_traffic", "compile_cuda"))
def test_a_fault_of_any_kind_of_kernel_is_passed_through(machine, tool):
    machine.codes[f"-m tools.{tool}"] = 1
    machine.started("kernels", code=1)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_complains_ends_test_with_its_code(bootstrap, machine, check):
    machine.codes[check] = 5
    assert machine.started("test", code=5)[-1] == f"VENV {check}"


@pytest.mark.parametrize(
    ("command", "part"), [("demo", "cli demo"), ("test", "-m pytest"), ("bench", "-m pytest benchmarks")]
)
def test_exit_code_of_the_command_is_passed_through(bootstrap, machine, command, part):
    machine.codes[part] = 42
    machine.started(command, code=42)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["test", "--help"], ["demo", "-h"]])
def test_help_names_every_command_and_starts_nothing(bootstrap, machine, capsys, arguments):
    assert machine.started(*arguments) == []
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in bootstrap.COMMANDS)


def test_unknown_command_ends_in_one_line(bootstrap, machine, capsys):
    assert machine.started("tset", code=2) == []
    assert (
        "choose one of demo, demo-unival, demo-mico, test, test-all, bench, docs, kernels, mutants, rehearse, gpu"
        in one_line(capsys.readouterr().err)
    )


def test_old_python_gets_one_line():
    pretend = f"import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert one_line(result.stderr) == f"onepeace_fast needs Python 3.10 or later; {sys.executable} is 3.9"


def test_old_python_can_parse_the_script():
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "command"),
    [(name, name) for name in ("demo", "test", "test-all", "bench", "docs", "gpu")] + [("help", "--help")],
)
def test_make_targets_only_call_bootstrap(target, command):
    call = ["make", "--dry-run", "--no-print-directory", "PYTHON=python3", target]
    lines = subprocess.run(call, cwd=SCRIPT.parent, capture_output=True, text=True, check=True).stdout
    assert one_line(lines) == f"python3 bootstrap.py {command}"
