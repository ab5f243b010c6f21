"""When benchmarks/gpu.py waits for a kernel's answer, on a CPU; test_gpu_processes.py has the watchdog itself."""

import signal
import subprocess

import pytest
import torch

from benchmarks import gpu
from benchmarks.support import sections
from benchmarks.support.variants import Variant


class Dog:
    """Stands in for the watchdog: whether it waits for an answer, and how often it began to."""

    waits, restarts = False, 0

    def restart(self) -> None:
        self.waits, self.restarts = True, self.restarts + 1

    def stop(self) -> None:
        self.waits = False


NAMES = ("reference", "fused_drop_path", "peer", "strategy_grouped")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """gpu.py's command line over one section, its watchdog, and by variant whether that waited at each call."""
    dog, seen = Dog(), {}

    def variant(name: str):
        def call(_):
            seen.setdefault(name, []).append(dog.waits)
            return torch.ones(2)

        return lambda: Variant(call, lambda index: (call(index),))

    prepared = sections.Prepared({name: variant(name) for name in NAMES}, "reference", lambda records: {"rows": 1})
    section = sections.Section("first", "layer", lambda setting: prepared, warmed=("fused_drop_path", "peer"))
    monkeypatch.setattr(gpu, "sections_of", lambda *_: [section])
    monkeypatch.setattr(gpu, "Watchdog", lambda: dog)
    monkeypatch.setattr(gpu, "ceilings", lambda *_, **__: {"copy": {}, "product": {"side": 1, "dtype": "none"}})
    return ["--out", str(tmp_path), "--device", "cpu", "--quick", "--date", "once"], dog, seen


def test_the_library_s_kernels_must_answer_in_time_and_a_peer_may_compile(measured):
    options, dog, seen = measured
    assert gpu.main(options) == 0
    assert [seen[name][0] for name in NAMES] == [False, True, False, True]
    assert all(waits[-1] for waits in seen.values()) and not dog.waits
    assert dog.restarts >= 2 + 1 + 3  # before the first runs of two, before all rounds, and after each


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled_beforehand_must_answer_in_time(measured, name):
    options, _, seen = measured
    assert gpu.main([*options, "--warm-one", "first", name]) == 0
    assert seen[name] == [name in ("fused_drop_path", "strategy_grouped")] * 2


def test_a_kernel_that_hangs_while_all_are_compiled_is_a_failure(measured, monkeypatch, capsys):
    hung = subprocess.CompletedProcess([], -signal.SIGALRM, "", "the end of a stack\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: hung)
    assert gpu.main([*measured[0], "--warm"]) == 1
    said = capsys.readouterr().out
    assert "first, fused_drop_path: FAILED with -14: no answer: a kernel may hang, " in said
