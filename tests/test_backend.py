"""Which backend is in force: ``use_backend``, then the argument, then the environment, then the device."""

import threading

import pytest
import torch

from onepeace_fast import use_backend
from onepeace_fast.backend import ENVIRONMENT_VARIABLE, check_backend, resolve_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_the_device_decides_last():
    assert resolve_backend(None, CPU) == "fused"
    assert resolve_backend(None, GPU) in ("fused", "reference")


@pytest.mark.parametrize("device", (CPU, GPU), ids=str)
@pytest.mark.parametrize("winner, loser", [("fused", "reference"), ("reference", "fused")])
def test_precedence(monkeypatch, device, winner, loser):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, winner)
    assert resolve_backend(None, device) == winner
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, loser)
    assert resolve_backend(winner, device) == winner
    with use_backend(winner):
        assert resolve_backend(None, device) == winner
        assert resolve_backend(loser, device) == winner


def test_an_empty_environment_variable_counts_as_none(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert resolve_backend(None, CPU) == "fused"


def test_blocks_nest_and_end_also_by_an_exception():
    with use_backend("reference"):
        with use_backend("fused"):
            assert resolve_backend("reference", CPU) == "fused"
        with pytest.raises(KeyError), use_backend("fused"):
            raise KeyError
        assert resolve_backend("fused", CPU) == "reference"
    assert resolve_backend(None, CPU) == "fused"


def test_a_block_holds_in_its_own_thread_only():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve_backend(None, CPU)))
        thread.start()
        thread.join()
    assert seen == ["fused"]


@pytest.mark.parametrize("bad", ("", "Fused", "triton", "reference "))
def test_bad_names_are_refused_in_one_line(bad):
    with pytest.raises(ValueError, match=r"^backend: expected one of reference, fused, got .*$"):
        check_backend(bad)
    with pytest.raises(ValueError, match=r"^backend: expected one of reference, fused, got .*$"), use_backend(bad):
        pass
    with pytest.raises(ValueError, match=r"expected one of reference, fused, got"):
        resolve_backend(bad, CPU)
    assert resolve_backend(None, CPU) == "fused"


def test_a_bad_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(ValueError, match=f"^{ENVIRONMENT_VARIABLE}: expected one of reference, fused, got 'triton'$"):
        resolve_backend(None, CPU)
    assert resolve_backend("reference", CPU) == "reference"
