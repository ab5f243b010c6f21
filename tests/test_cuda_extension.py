"""What the library finds out about its CUDA extension."""

import importlib
from types import SimpleNamespace

import pytest

from onepeace_fast import cuda_extension


@pytest.fixture
def fresh():
    """The extension is looked for anew."""
    for function in (cuda_extension._import, cuda_extension.unavailable_reason):
        function.cache_clear()
    yield
    for function in (cuda_extension._import, cuda_extension.unavailable_reason):
        function.cache_clear()


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
    for function in (cuda_extension._import, cuda_extension.unavailable_reason):
        function.cache_clear()
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
    assert serves("compute_90", 12, 0) and serves("sm_80,compute_90", 10, 0) and not serves("compute_90", 8, 9)
