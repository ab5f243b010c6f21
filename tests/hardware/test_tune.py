"""``onepeace-fast tune`` without a GPU: which candidates it tries, what it keeps, and the file that it writes."""

import dataclasses
import time

import pytest
import torch

from onepeace_fast import cli
from onepeace_fast.hardware import tune
from onepeace_fast.kernels import measured as files
from onepeace_fast.kernels.launch_heuristic import KERNELS, WIDTHS, Parameters, heuristic, widest
from onepeace_fast.kernels.measured import MeasuredGPU, measured_for, write_measured

KERNEL = "layer_norm_backward"
MINE = heuristic(KERNEL, 1024)
KNOWN = MeasuredGPU(
    "A GPU", "sm_120", {}, "2026-11-28", True, {"routed_ffn": [{"strategy": "grouped"}]},
    {KERNEL: {"2": {"1024": {"block_rows": 1, "num_warps": 1, "programs_per_multiprocessor": 1}}}},
)  # fmt: skip


def test_candidates_are_the_launch_and_its_neighbours_within_what_a_gpu_can_run():
    tried = list(tune.candidates(MINE))
    assert tried[0] == MINE and len(tried) == 7
    for other in tried[1:]:
        (changed,) = {name for name in MINE._fields if getattr(other, name) != getattr(MINE, name)}
        now = getattr(other, changed)
        assert now in (getattr(MINE, changed) // 2, getattr(MINE, changed) * 2)
    most = Parameters(1024, 1, 32, None)
    assert [*tune.candidates(most)] == [most, most._replace(block_rows=2), most._replace(num_warps=16)]


def test_every_class_of_every_kernel_is_measured_or_those_of_the_widths_that_were_asked_for():
    assert len([*tune.todo(WIDTHS)]) == 2 * sum(width <= widest(kernel) for kernel in KERNELS for width in WIDTHS)
    asked = [*tune.todo([1536, 1100, 768])]
    assert len(asked) == len(KERNELS) * 2 * 2 and {width for _, _, width in asked} == {768, 1536}


def test_the_fastest_candidate_is_kept():
    asked, lines = [], []

    def timer(kernel, size, width, parameters):
        asked.append((kernel, size, width))
        return 1e-6 if parameters.num_warps == 4 else 2e-6

    (found,) = tune.measure([(KERNEL, "2", 1000)], timer, say=lines.append)
    assert found.parameters == MINE._replace(num_warps=4) and found.width == 1000
    assert set(asked) == {(KERNEL, "2", 1000)} and len(asked) == 7
    assert "1.0 us, 2.00x" in lines[0]


def test_a_candidate_that_cannot_run_is_left_out_and_a_heuristic_that_cannot_is_an_error():
    def only_mine(kernel, size, width, parameters):
        if parameters != MINE:
            raise RuntimeError("out of resources")
        return 1e-6

    (found,) = tune.measure([(KERNEL, "2", 1024)], only_mine, say=lambda line: None)
    assert found.parameters == MINE
    with pytest.raises(RuntimeError, match=f"{KERNEL}: the heuristic's launch parameters do not run: out of resources"):
        [*tune.measure([(KERNEL, "2", 1024)], lambda *_: only_mine(KERNEL, "2", 1024, None), say=lambda line: None)]


def test_nothing_is_begun_after_the_deadline():
    work = [(KERNEL, "2", width) for width in WIDTHS]
    assert not [*tune.measure(work, lambda *_: 1e-6, stop=time.monotonic(), say=lambda line: None)]
    later = tune.measure(work, lambda *_: 1e-6, stop=time.monotonic() + 3600, say=lambda line: None)
    assert len([*later]) == len(work)


def test_only_what_differs_from_the_heuristic_is_written_and_replaces_what_was_there():
    found = tune.Measurement(KERNEL, "2", 1024, MINE._replace(num_warps=4), 1e-6, 2e-6)
    same = found._replace(parameters=Parameters(1024, 1, 1, 1))
    wide = found._replace(size="4", width=1500, parameters=heuristic(KERNEL, 1500)._replace(num_warps=4))
    both = tune.with_measurement(tune.with_measurement(KNOWN, found), wide)
    assert both == dataclasses.replace(KNOWN, launch_parameters=both.launch_parameters, parity=False)
    assert tune.with_measurement(both, wide) == both and tune.with_measurement(KNOWN, same).parity
    assert both.parameters(KERNEL, 2, 1024) == found.parameters and both.parameters(KERNEL, 4, 1500) == wide.parameters
    assert "parts" not in both.launch_parameters[KERNEL]["2"]["1024"]
    assert tune.with_measurement(KNOWN, found._replace(parameters=MINE)).launch_parameters == {}
    assert KNOWN.launch_parameters[KERNEL]["2"]["1024"]["num_warps"] == 1, "the file that was read is left alone"


def test_every_kernel_has_a_case_that_times_it():
    make = tune.empty_tensors(torch.device("meta"))
    for kernel in KERNELS:
        assert kernel in tune.case_of(kernel, 256, torch.bfloat16, make, torch.device("cpu")).entries


@pytest.mark.parametrize("kernel", ["layer_norm", KERNEL])
def test_calls_of_a_kernel_rotate_through_more_memory_than_the_cache(monkeypatch, kernel):
    monkeypatch.setattr(tune, "ROWS", 40)
    calls = list(tune.rotated_calls(kernel, torch.float32, 64, torch.device("cpu"), cache=50_000))
    assert len(calls) == 14  # 3 * 50,000 bytes, by (40 + 2) * 64 * 4 of one input
    first, second = (calls[i]() for i in (0, 1))
    if kernel == KERNEL:
        assert [tuple(gradient.shape) for gradient in first] == [(40, 64), (64,), (64,)]
        first, second = first[0], second[0]
    assert first.shape == (40, 64) and not torch.equal(first, second)


def test_without_a_gpu_one_line_says_so_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err == "tune needs a CUDA device, and torch sees none here\n"


@pytest.mark.parametrize("width", ["0", "20000", "wide"])
def test_a_width_that_no_kernel_takes_is_refused(width, capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--width", width])
    assert f"expected a width from 1 to {WIDTHS[-1]}, got {width}" in capsys.readouterr().err


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that was not measured, on which twice the rows of the heuristic's are the fastest; the user's folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.kernels, "unavailable_reason", lambda: None)
    monkeypatch.setattr(tune, "architecture_and_multiprocessors", lambda device: ("sm_120", 170))
    monkeypatch.setattr(tune, "gpu_name", lambda device: "A GPU")
    monkeypatch.setattr(tune, "device_time", lambda kernel, size, width, parameters: 1e-6 / parameters.block_rows)
    monkeypatch.setenv(files.ENVIRONMENT_VARIABLE, str(tmp_path / "new"))
    measured_for.cache_clear()
    yield tmp_path / "new"
    measured_for.cache_clear()


def test_the_file_of_the_gpu_has_what_was_measured_and_proves_no_parity(gpu, capsys):
    assert cli.main(["tune", "--width", "1000", "--width", "1024"]) == 0
    assert [*gpu.iterdir()] == [gpu / "a_gpu.json"]
    measured = measured_for("A GPU")
    assert measured.architecture == "sm_120" and not measured.parity and measured.strategies == {}
    assert set(measured.launch_parameters) == set(KERNELS)
    for kernel in KERNELS:
        for size in (2, 4):
            assert measured.parameters(kernel, size, 600).block_rows == 2 * heuristic(kernel, 600).block_rows
            assert measured.parameters(kernel, size, 2048) is None
    assert "once `onepeace-fast selftest` has passed" in capsys.readouterr().out


def test_the_rest_of_a_file_that_was_there_stays(gpu, capsys):
    write_measured(KNOWN, gpu)
    assert cli.main(["tune", "--width", "3000"]) == 0
    measured = measured_for("A GPU")
    assert dataclasses.replace(measured, launch_parameters=KNOWN.launch_parameters, parity=True) == KNOWN
    assert measured.launch_parameters[KERNEL]["2"]["1024"] == KNOWN.launch_parameters[KERNEL]["2"]["1024"]
    assert measured.parameters(KERNEL, 2, 3000).block_rows == 2
    assert not measured.parity and "selftest" in capsys.readouterr().out


def test_what_was_measured_before_a_fault_or_the_deadline_is_kept(gpu, monkeypatch, capsys):
    def fail_later(kernel, size, width, parameters):
        if kernel != "layer_norm":
            raise RuntimeError("out of resources")
        return 1e-6 / parameters.block_rows

    monkeypatch.setattr(tune, "device_time", fail_later)
    assert cli.main(["tune", "--width", "512"]) == 2
    assert "do not run: out of resources" in capsys.readouterr().err
    assert measured_for("A GPU").parameters("layer_norm", 4, 512) is not None
    assert cli.main(["tune", "--minutes", "0"]) == 0
    assert f"0 measured, {len([*tune.todo(WIDTHS)])} were left out" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_or_a_damaged_file_is_one_line_before_anything_is_measured(
    monkeypatch, tmp_path, gpu, capsys
):
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured"))
    gpu.mkdir()
    (gpu / "a_gpu.json").write_text("{")
    assert cli.main(["tune"]) == 2
    assert "delete the file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv(files.ENVIRONMENT_VARIABLE, str(tmp_path / "file"))
    assert cli.main(["tune"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
