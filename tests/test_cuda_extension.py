"""What the library finds out about its CUDA extension."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from onepeace_fast import cuda_extension


def forget():
    """Have the extension looked for anew."""
    for function in (cuda_extension._import, cuda_extension.unavailable_reason):
        function.cache_clear()


@pytest.fixture
def fresh():
    forget()
    yield
    forget()


def find(monkeypatch, found: object) -> None:
    def import_module(name):
        assert name == "onepeace_fast._cuda"
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_an_extension_that_was_left_out_tells_the_build_s_reason(fresh, monkeypatch, tmp_path):
    record = tmp_path / "cuda_left_out.txt"
    monkeypatch.setattr(cuda_extension, "_LEFT_OUT", record)
    find(monkeypatch, ModuleNotFoundError("onepeace_fast._cuda"))
    assert cuda_extension.unavailable_reason() == "the CUDA extension was not built: install onepeace_fast again"
    record.write_text("no nvcc\n")
    forget()
    assert cuda_extension.unavailable_reason() == "the CUDA extension was not built: no nvcc"
    assert cuda_extension.extension() is None


def test_an_extension_that_does_not_load_is_reported_in_one_line(fresh, monkeypatch):
    find(monkeypatch, ImportError("libstdc++.so.6:\n version not found"))
    expected = "the CUDA extension cannot be imported: libstdc++.so.6: version not found"
    assert cuda_extension.unavailable_reason() == expected and cuda_extension.extension() is None


def test_an_extension_that_loads_knows_whether_the_driver_runs_it(fresh, monkeypatch):
    found = SimpleNamespace(unavailable_reason=lambda: "no NVIDIA driver is found")
    find(monkeypatch, found)
    assert cuda_extension.extension() is found
    assert cuda_extension.unavailable_reason() == "no NVIDIA driver is found"


def test_its_binaries_run_where_nvidia_says(monkeypatch):
    def serves(built, *capability):
        monkeypatch.setattr(cuda_extension, "extension", lambda: SimpleNamespace(ARCHITECTURES=built))
        return cuda_extension.unsupported_reason(capability) is None

    assert serves("sm_80", 8, 0) and serves("sm_80", 8, 9) and not serves("sm_80", 9, 0) and not serves("sm_86", 8, 0)
    assert serves("sm_90a", 9, 0) and not serves("sm_90a", 9, 1) and not serves("sm_90a", 10, 0)
    assert serves("sm_100", 10, 3) and not serves("sm_100", 12, 0) and serves("sm_120", 12, 1)
    assert serves("compute_90", 12, 0) and serves("sm_80,compute_90", 10, 0) and not serves("compute_90", 8, 9)


def test_a_gpu_too_old_for_any_build_is_told_so_and_another_how_to_install(monkeypatch):
    monkeypatch.setattr(cuda_extension, "extension", lambda: SimpleNamespace(ARCHITECTURES="sm_90a"))
    found = {capability: cuda_extension.unsupported_reason(capability) for capability in ((7, 5), (8, 9))}
    assert found[7, 5] == "expected a GPU of compute capability 8.0 or later, got 7.5"
    assert found[8, 9].endswith("; install again with ONEPEACE_FAST_CUDA_ARCHITECTURES=sm_89")
    assert "was built (sm_90a), got" in found[8, 9] and "\n" not in found[8, 9]


ASK = "from onepeace_fast import cuda_extension; print(cuda_extension.unavailable_reason())"
needs_extension = pytest.mark.skipif(cuda_extension.extension() is None, reason="the CUDA extension is not built")


@needs_extension
@pytest.mark.requires_compiler
def test_a_driver_too_old_is_named_in_one_line(tmp_path):
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 11080; return 0; }\n")
    compiler = os.environ.get("CXX", "g++")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", tmp_path / "driver.c", "-o", library], check=True)
    built = cuda_extension.extension().TOOLKIT
    options = {"capture_output": True, "text": True, "env": os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}}
    assert subprocess.run([sys.executable, "-c", ASK], check=True, **options).stdout.strip() == (
        f"the NVIDIA driver runs CUDA 11.8 and the CUDA extension was built by CUDA {built}: update the driver, or "
        "install again with an nvcc of CUDA 11 on PATH"
    )
