"""What `bootstrap.py gpu` does: tests, sanitizers and benchmarks in this Python, without a network."""

import os
import shutil
import subprocess
import sys

import pytest
from installation._machine import SCRIPT, one_line


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


GPU_PIP = "HOST -m pip install --no-input --quiet --no-build-isolation --no-deps --no-index"


def test_gpu_installs_offline_and_runs_tests_and_benchmarks_in_this_python(bootstrap, gpu, tmp_path):
    out = tmp_path / "out"
    assert gpu.started("gpu", "-x") == [
        f"{GPU_PIP} --editable .",
        f"HOST -m pytest -m gpu tests --junitxml={out / 'gpu-tests.xml'} -x",
        f"HOST {bootstrap.ROOT / 'benchmarks' / 'gpu.py'} --out {out}",
    ]
    assert out.is_dir() and not bootstrap.VENV.exists()


def test_gpu_without_compute_sanitizer_says_that_it_is_left_out(gpu, capsys):
    assert not any("--tool" in line for line in gpu.started("gpu"))
    assert "compute-sanitizer is neither on PATH nor in CUDA_HOME" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME"])
@pytest.mark.parametrize("failing", ["--tool memcheck", "--tool racecheck"])
def test_gpu_checks_attention_under_compute_sanitizer_and_fails_by_it(
    bootstrap, gpu, monkeypatch, tmp_path, place, failing
):
    program = tmp_path / "bin" / "compute-sanitizer"
    if place == "PATH":
        monkeypatch.setattr(bootstrap.shutil, "which", lambda name: str(program) if name == program.name else None)
    else:
        program.parent.mkdir()
        program.touch()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    gpu.codes[failing] = 99
    commands = gpu.started("gpu", code=99)
    assert len(commands) == 5 and commands[-1].startswith("HOST ") and "gpu.py" in commands[-1]
    for tool, line in zip(("memcheck", "racecheck"), commands[2:4], strict=True):
        checked = f"{program} --tool {tool} --kernel-name kns=onepeace_fast --error-exitcode 99 HOST -m pytest -q "
        assert line.startswith(checked) and line.endswith("-m gpu -k follow_the and bfloat16 and not slower")
    for file in bootstrap.SANITIZED[:2]:
        assert file in commands[2] and (SCRIPT.parent / file).is_file()


def test_gpu_results_go_to_the_benchmarks_without_out(bootstrap, gpu, monkeypatch):
    monkeypatch.delenv("OUT")
    assert gpu.started("gpu")[-1].endswith(f"--out {bootstrap.ROOT / 'benchmarks' / 'results'}")


def test_gpu_installs_for_the_user_where_site_packages_is_not_writable(bootstrap, gpu, monkeypatch):
    monkeypatch.setattr(bootstrap.os, "access", lambda *_: False)
    assert gpu.started("gpu")[0] == f"{GPU_PIP} --user --editable ."


@pytest.mark.parametrize("failing", ["-m pytest", "gpu.py --out"])
def test_gpu_runs_tests_and_benchmarks_and_fails_if_either_fails(gpu, failing):
    gpu.codes[failing] = 3
    assert len(gpu.started("gpu", code=3)) == 3


@pytest.mark.parametrize("version", ["0", "76.1.0"])
def test_gpu_with_an_old_setuptools_exits_2_with_one_line(bootstrap, gpu, monkeypatch, capsys, version):
    monkeypatch.setattr(bootstrap, "setuptools_version", lambda: version)
    assert gpu.started("gpu", code=2) == []
    assert "needs setuptools 77" in one_line(capsys.readouterr().err)


def test_gpu_stops_where_the_checkout_cannot_be_installed(gpu, capsys):
    gpu.codes["pip install"] = 4
    assert gpu.started("gpu", code=4) == [f"{GPU_PIP} --editable ."]
    assert one_line(capsys.readouterr().err).startswith("pip could not install the checkout")
