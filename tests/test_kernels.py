"""The kernels in Triton's interpreter, which needs a process of its own: see ``tests/kernels/conftest.py``."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_in_the_interpreter(marked: str, say) -> None:
    options = ["-q", "-m", marked, "-p", "no:cacheprovider", "-n", "auto"]
    command = [sys.executable, "-m", "pytest", "tests/kernels", *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed
    with say():
        print(f"\n{passed} tests of the kernels passed in Triton's interpreter")


@needs_triton
def test_the_kernels_pass_their_quick_tests_in_the_interpreter(capsys):
    run_in_the_interpreter("not slow", capsys.disabled)


@needs_triton
@pytest.mark.slow
@pytest.mark.longest
def test_the_kernels_pass_their_slow_tests_in_the_interpreter(capsys):
    run_in_the_interpreter("slow", capsys.disabled)
