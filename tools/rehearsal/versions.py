"""The rehearsal with other versions of torch and Triton, each in an environment of its own beside this checkout.

After the rehearsal the tests run that depend on these versions most; what they showed goes into
`benchmarks/results/rehearsal.json`.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tools.rehearsal.native import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "rehearsal.json"
MOST_SECONDS = 1800


class Versions(NamedTuple):
    """What an environment holds; another Python is taken where this one is not found."""

    torch: str
    triton: str
    python: str


VERSIONS = {
    "2.11": Versions("2.11.0", "3.6.0", "3.12"),
    "oldest": Versions("2.8.0", "3.4.0", "3.10"),  # the oldest that pyproject.toml promises
}
PACKAGES = [
    "numpy", "safetensors", "setuptools>=77.0.3", "wheel", "pybind11", "ninja", "pytest>=8", "pytest-randomly",
    "pytest-xdist", "hypothesis",
]  # fmt: skip
# Without Triton's interpreter, and in it.
TESTS = [
    "tests/ops/test_kernel_choice.py", "tests/kernels/test_routed_ffn.py", "tests/ops/test_autocast_inside.py",
    "tests/ops/test_synchronization.py", "tests/models/test_compile_and_autocast.py",
    "tests/ops/test_relative_bias_attention_forms.py", "tests/layers/test_routed_modules.py",
]  # fmt: skip
INTERPRETED_TESTS = [
    "tests/kernels/test_layer_norm.py", "tests/kernels/test_routed_ffn.py", "tests/kernels/test_grouped_gemm.py",
    "tests/kernels/test_encoder.py", "tests/kernels/test_routed_linear.py",
]  # fmt: skip


def find_python(version: str) -> str:
    """An interpreter of this version, on PATH or pyenv's, else this one."""
    if found := shutil.which(f"python{version}"):
        works = subprocess.run([found, "-c", ""], capture_output=True).returncode == 0  # pyenv's shims may not
        if works:
            return found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    return str(next(iter(sorted(pyenv.glob(f"{version}.*/bin/python"))), sys.executable))


def prepare(name: str) -> Path:
    """Return the interpreter of an environment with these versions, made if need be."""
    versions, folder = VERSIONS[name], ROOT / f".venv-{name}"
    python, stamp = folder / "bin" / "python", folder / "rehearsal.json"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == list(versions):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"==> Making {folder}: torch {versions.torch}, Triton {versions.triton}", flush=True)
    subprocess.run([find_python(versions.python), "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--no-input", "--quiet"]
    pins = [f"torch=={versions.torch}", f"triton=={versions.triton}"]
    subprocess.run([*pip, *pins, *PACKAGES], check=True, timeout=MOST_SECONDS)
    environment = {**os.environ, "ONEPEACE_FAST_CUDA_ARCHITECTURES": "none"}
    command = [*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    subprocess.run(command, check=True, env=environment)
    stamp.write_text(json.dumps(versions), encoding="utf-8")
    return python


def _tests(python: Path, files: list[str], **environment: str) -> dict[str, Any]:
    """Run tests in the environment; how many passed and failed, and which failed."""
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow and not gpu", "--tb=line", "-p", "no:cacheprovider"]
    start = time.monotonic()
    result = subprocess.run(
        [*command, *files], cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True
    )
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", result.stdout)}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S.*)$", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1):
        failures.append(f"exit code {result.returncode}: {(result.stdout + result.stderr).strip().splitlines()[-1]}")
    return {"files": files, **counts, "failures": failures, "seconds": round(time.monotonic() - start)}


def _versions_in(python: Path) -> dict[str, str]:
    code = "import json, platform, torch, triton"
    code += "; print(json.dumps([platform.python_version(), torch.__version__, triton.__version__]))"
    found = json.loads(subprocess.check_output([str(python), "-c", code], text=True))
    return dict(zip(("python", "torch", "triton"), found, strict=True))


def main(name: str, short: bool) -> int:
    """Rehearse with these versions; return 1 where something failed."""
    start = time.monotonic()
    python = prepare(name)
    versions = _versions_in(python)
    print(f"==> Python {versions['python']}, torch {versions['torch']}, Triton {versions['triton']}", flush=True)
    command = [str(python), "-m", "tools.rehearsal", *(["--short"] if short else [])]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    result: dict[str, Any] = {
        **versions,
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "form": "short" if short else "full",
        "rehearsal": lines[-1] if lines else "no output",
        "faults": [line for line in lines if line.startswith("fault: ")],
    }
    failed = []
    for form, files, environment in (
        ("tests", TESTS, {}), ("tests in the interpreter", INTERPRETED_TESTS, {"TRITON_INTERPRET": "1"}),
    ):  # fmt: skip
        _write(name, result, start)
        result[form] = _tests(python, files, **environment)
        failed += result[form]["failures"]
    _write(name, result, start)
    for failure in failed:
        print(f"failed: {failure}")
    print(f"{name}: {result['rehearsal']}; {len(failed)} other tests failed; written to {RESULTS}", flush=True)
    return 1 if process.returncode or failed else 0


def _write(name: str, result: dict[str, Any], start: float) -> None:
    """Put what is known so far into the file of results, beside what other versions showed."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[name] = {**result, "seconds": round(time.monotonic() - start)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
