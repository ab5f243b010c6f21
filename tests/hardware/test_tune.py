"""``onepeace-fast tune`` without a GPU: which candidates it tries, what it keeps, and the file that it writes."""

import json

import pytest
import torch

from onepeace_fast import cli
from onepeace_fast.hardware import tune
from onepeace_fast.kernels import launch_table
from onepeace_fast.kernels.launch_table import SHIPPED

KERNEL = "layer_norm_backward"


@pytest.fixture
def one_entry(monkeypatch):
    """The shipped table with one kernel and one entry."""
    entry = {"block_rows": 4, "num_warps": 8, "programs_per_multiprocessor": 2}
    table = {KERNEL: {"sm_80": {"2": {"1024": entry}}}}
    monkeypatch.setattr(tune, "SHIPPED", table)
    return entry


def test_candidates_are_the_entry_and_its_neighbours_within_what_a_gpu_can_run(one_entry):
    tried = list(tune.candidates(one_entry))
    assert tried[0] == one_entry and len(tried) == 8
    for other in tried[1:]:
        (changed,) = {name for name in other if other[name] != one_entry.get(name)}
        assert changed == "held_in" or other[changed] in (one_entry[changed] // 2, one_entry[changed] * 2)
    widest = {"block_rows": 1, "num_warps": 32, "programs_per_multiprocessor": None, "held_in": "memory"}
    assert [
        {**widest, **change} for change in ({}, {"block_rows": 2}, {"num_warps": 16}, {"held_in": "registers"})
    ] == [*tune.candidates(widest)]


def test_the_fastest_candidate_is_kept_for_this_architecture_alone(one_entry):
    asked, lines = [], []

    def time(kernel, size, width, table):
        entry = table[kernel]["sm_120"][size][str(width)]
        asked.append((kernel, size, width))
        return 1e-6 if entry["num_warps"] == 4 else 2e-6

    assert tune.measure("sm_120", time, lines.append) == {
        KERNEL: {"sm_120": {"2": {"1024": {**one_entry, "num_warps": 4}}}}
    }
    assert set(asked) == {(KERNEL, "2", 1024)} and len(asked) == 8
    assert "1.0 us, 2.00x" in lines[0]


def test_a_candidate_that_cannot_run_is_left_out_and_a_shipped_one_that_cannot_is_an_error(one_entry):
    def only_shipped(kernel, size, width, table):
        if table[kernel]["sm_90"][size][str(width)] != one_entry:
            raise RuntimeError("out of resources")
        return 1e-6

    measured = tune.measure("sm_90", only_shipped, lambda line: None)
    assert measured[KERNEL]["sm_90"]["2"]["1024"] == one_entry
    with pytest.raises(RuntimeError, match=f"{KERNEL}: the shipped launch parameters do not run on sm_90"):
        tune.measure("sm_90", lambda *_: (_ for _ in ()).throw(RuntimeError("out of resources")), lambda line: None)


def test_every_entry_of_the_shipped_table_has_a_case_that_times_it():
    make = tune.empty_tensors(torch.device("meta"))
    for kernel in SHIPPED:
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


@pytest.fixture
def gpu(monkeypatch, one_entry):
    """A GPU of an architecture that no table has, whose shipped launch parameters are the fastest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.kernels, "unavailable_reason", lambda: None)
    monkeypatch.setattr(tune, "architecture_and_multiprocessors", lambda device: ("sm_120", 170))
    monkeypatch.setattr(tune, "device_time", lambda *_: 1e-6)
    return one_entry


def test_the_table_goes_where_the_kernels_look_for_it_and_they_read_it(monkeypatch, tmp_path, gpu):
    path = tmp_path / "new" / "table.json"
    monkeypatch.setenv(launch_table.ENVIRONMENT_VARIABLE, str(path))
    assert cli.main(["tune"]) == 0
    assert [*path.parent.iterdir()] == [path]
    assert json.loads(path.read_text()) == {KERNEL: {"sm_120": {"2": {"1024": gpu}}}}
    launch_table._measured.cache_clear()
    try:
        assert launch_table.table_in_force() == f"measured here: {path}"
    finally:
        launch_table._measured.cache_clear()


def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_measured(monkeypatch, tmp_path, gpu, capsys):
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "table.json"):
        assert cli.main(["tune", "--output", str(place)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_measurement_that_fails_leaves_the_old_table_as_it_was(monkeypatch, tmp_path, gpu, capsys):
    def fail(*_):
        raise RuntimeError("out of resources")

    path = tmp_path / "table.json"
    path.write_text("{}")
    monkeypatch.setattr(tune, "device_time", fail)
    assert cli.main(["tune", "--output", str(path)]) == 2
    assert "do not run on sm_120" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "{}"
