"""The file of measurements of a GPU: what it may hold, which one is in force, and that a damaged one is told."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onepeace_fast import backend
from onepeace_fast.backend import resolve_backend
from onepeace_fast.kernels import measured as module
from onepeace_fast.kernels.launch_heuristic import heuristic
from onepeace_fast.kernels.launch_parameters import launch_parameters
from onepeace_fast.kernels.measured import (
    MeasuredGPU,
    file_name,
    first_class,
    measured_file,
    measured_for,
    write_measured,
)

NAME = "NVIDIA H100 80GB HBM3"
ENTRY = {"block_rows": 2, "num_warps": 16, "programs_per_multiprocessor": 3}
CLASSES = [{"width": 768, "rows": None, "strategy": "per_modality"}, {"rows": 1000, "strategy": "per_modality"},
           {"width": "any", "rows": None, "strategy": "grouped"}]  # fmt: skip
MEASURED = MeasuredGPU(
    NAME,
    "sm_90",
    {"torch": "2.11"},
    "2026-11-28",
    True,
    {"routed_ffn": CLASSES},
    {"layer_norm": {"2": {"1024": ENTRY}}},
)


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """The user's folder and the shipped one, both empty, in a process that has read nothing yet."""
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(module, "SHIPPED_FOLDER", tmp_path / "shipped")
    forget()
    yield tmp_path / "own", tmp_path / "shipped"
    forget()


def forget() -> None:
    for cached in (measured_for, launch_parameters):
        cached.cache_clear()


def test_a_file_comes_back_as_it_was_written_under_the_gpu_s_name(folders):
    path = write_measured(MEASURED, folders[0])
    assert path == folders[0] / "nvidia_h100_80gb_hbm3.json" and [*folders[0].iterdir()] == [path]
    assert MeasuredGPU.from_json(path.read_text()) == MEASURED == measured_for(NAME)


def test_the_user_s_file_comes_before_the_shipped_one_and_none_is_none(folders):
    assert measured_for(NAME) is None and measured_file(NAME) is None and measured_for("") is None
    shipped = write_measured(MEASURED, folders[1])
    assert measured_for(NAME) == MEASURED and measured_file(NAME) == shipped
    own = write_measured(dataclasses.replace(MEASURED, parity=False), folders[0])
    assert not measured_for(NAME).parity and measured_file(NAME) == own
    assert measured_for("NVIDIA A100") is None


def test_the_user_s_folder_is_in_the_configuration(monkeypatch, tmp_path):
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert module.user_folder() == tmp_path / "onepeace_fast" / "measured"
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.user_folder() == tmp_path / ".config" / "onepeace_fast" / "measured"


def test_the_first_class_that_holds_the_shape_decides():
    def strategy(rows, width):
        return first_class(MEASURED.classes("routed_ffn"), rows, width)

    assert [strategy(9500, 768), strategy(9500, 769), strategy(1000, 1536), strategy(1001, 1536)] == [
        "per_modality", "grouped", "per_modality", "grouped",
    ]  # fmt: skip
    assert first_class(MEASURED.classes("layer_norm"), 1, 1) is None


def test_measured_launch_parameters_replace_the_heuristic_s_of_that_class_alone(folders):
    write_measured(MEASURED, folders[0])
    got = launch_parameters("layer_norm", NAME, 2, 1000)
    assert (got.block_width, got.block_rows, got.num_warps, got.programs_per_multiprocessor) == (1024, 2, 16, 3)
    for kernel, name, size, width in (
        ("layer_norm", NAME, 4, 1000), ("layer_norm", NAME, 2, 1025), ("residual", NAME, 2, 1000),
        ("layer_norm", "", 2, 1000), ("layer_norm", "NVIDIA A100", 2, 1000),
    ):  # fmt: skip
        assert launch_parameters(kernel, name, size, width) == heuristic(kernel, width)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"name": " "}, "name: expected the name of a GPU"),
        ({"architecture": "hopper"}, "architecture: expected one like sm_90, got 'hopper'"),
        ({"parity": "yes"}, "parity: expected bool, got 'yes'"),
        ({"versions": {"torch": 2}}, "versions: expected text for torch, got 2"),
        ({"strategies": {"routed_ffn": []}}, "strategies: routed_ffn: expected a list of classes"),
        ({"strategies": {"routed_ffn": [{"rows": 5, "strategy": "grouped"}]}}, "expected a last class for any width"),
        ({"strategies": {"routed_ffn": [{"rows": -5, "strategy": "grouped"}, *CLASSES]}}, "whole numbers or null"),
        ({"strategies": {"routed_ffn": [{"row": 5, "strategy": "grouped"}]}}, "expected width and rows"),
        ({"launch_parameters": {"layernorm": {}}}, "got 'layernorm'"),
        ({"launch_parameters": {"layer_norm": {"8": {}}}}, "expected one of 2, 4, got '8'"),
        ({"launch_parameters": {"layer_norm": {"2": {"1000": {}}}}}, "got '1000'"),
        ({"launch_parameters": {"layer_norm": []}}, "expected an object at layer_norm"),
        ({"launch_parameters": {"layer_norm": {"2": {"1024": {"block_rows": 2}}}}}, "num_warps"),
        ({"launch_parameters": {"layer_norm": {"2": {"1024": {**ENTRY, "num_warps": 3}}}}}, "powers of two"),
        ({"launch_parameters": {"layer_norm": {"2": {"1024": {**ENTRY, "stages": 3}}}}}, "expected block_rows, "),
    ],
)
def test_a_file_that_could_not_be_followed_is_one_line_that_says_what_to_do(folders, change, complaint):
    with pytest.raises(ValueError) as refused:
        dataclasses.replace(MEASURED, **change)
    folders[0].mkdir()
    path = folders[0] / file_name(NAME)
    path.write_text(json.dumps({**json.loads(MEASURED.to_json()), **change}))
    with pytest.raises(ValueError) as caught:
        measured_for(NAME)
    message = str(caught.value)
    assert message.startswith(f"{path}: {refused.value}; delete the file") and complaint in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("[", "Expecting value"),
        ("[]", "expected the fields name, "),
        ("{}", "got none"),
        (MEASURED.to_json().replace(NAME, "NVIDIA H200"), f"expected the GPU {NAME}, got 'NVIDIA H200'"),
        (MEASURED.to_json().replace('"date"', '"day"'), "expected the fields "),
    ],
)
def test_a_damaged_file_of_the_user_is_told_and_not_passed_over_for_the_shipped_one(folders, text, complaint):
    write_measured(MEASURED, folders[1])
    folders[0].mkdir()
    path = folders[0] / file_name(NAME)
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        measured_for(NAME)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and complaint in message and "run `onepeace-fast selftest`" in message
    assert len(message.splitlines()) == 1


def test_a_gpu_s_backend_is_fused_where_a_file_says_that_it_keeps_parity(folders, monkeypatch):
    monkeypatch.setattr(backend, "gpu_name", lambda device: NAME)
    gpu = torch.device("cuda")
    assert resolve_backend(None, gpu) == "reference"
    write_measured(MEASURED, folders[1])
    assert resolve_backend(None, gpu) == "fused"
    path = write_measured(dataclasses.replace(MEASURED, parity=False), folders[0])
    assert resolve_backend(None, gpu) == "reference", "the user's own measurement comes first"
    path.write_text("{")
    forget()
    with pytest.raises(ValueError, match="delete the file"):
        resolve_backend(None, gpu)
    assert resolve_backend("fused", gpu) == "fused" and resolve_backend(None, torch.device("cpu")) == "fused"


def test_reading_measurements_loads_no_triton():
    code = "import sys, onepeace_fast.kernels.measured as m; m.measured_for('A GPU'); print('triton' in sys.modules)"
    loaded = "import sys, torch; print('triton' in sys.modules)"
    with_it, without = (
        subprocess.run([sys.executable, "-c", each], capture_output=True, text=True, check=True).stdout
        for each in (code, loaded)
    )
    assert with_it == without


def test_the_shipped_files_can_be_read_and_the_folder_says_what_it_is():
    shipped = Path(module.__file__).with_name("measured")
    assert "onepeace-fast selftest" in (shipped / "README.md").read_text(encoding="utf-8")
    for path in shipped.glob("*.json"):
        measured = MeasuredGPU.from_json(path.read_text(encoding="utf-8"))
        assert path.name == file_name(measured.name) and measured.parity


def test_a_user_without_a_home_folder_or_with_a_closed_one_has_no_file(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    class Closed(type(Path())):
        def is_file(self):
            raise PermissionError(13, "Permission denied", str(self))

    for folder in (unknown, lambda: Closed("/closed")):
        monkeypatch.setattr(module, "user_folder", folder)
        measured_for.cache_clear()
        assert measured_file("Some GPU") is None and measured_for("Some GPU") is None


@pytest.mark.parametrize("width, parts", [("6144", 1), ("1024", 3)])
def test_parts_that_are_no_power_of_two_of_columns_are_refused(width, parts):
    entry = {"block_rows": 1, "num_warps": 8, "programs_per_multiprocessor": 2, "parts": parts}
    with pytest.raises(ValueError, match=f"launch_parameters: layer_norm 2 {width}: expected parts of a power of two"):
        MeasuredGPU("A GPU", "sm_90", {}, "today", True, {}, {"layer_norm": {"2": {width: entry}}})
