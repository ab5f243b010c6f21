"""A model runs the backend that is in force at each call."""

import pytest
import torch
from models._small import BACKENDS, small_model, text_batch

from onepeace_fast import use_backend
from onepeace_fast.backend import ENVIRONMENT_VARIABLE
from onepeace_fast.models import stack


@pytest.fixture
def ran(monkeypatch):
    """Names the backend that a model runs."""
    seen = []
    padded, split = stack.encode_padded, stack.split
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(stack, "encode_padded", lambda *a: (seen.append("reference"), padded(*a))[1])
    monkeypatch.setattr(stack, "split", lambda *a: (seen.append("fused"), split(*a))[1])

    def backend_of(model):
        seen.clear()
        with torch.no_grad():
            model.encode(text=text_batch([3, 2]))
        (name,) = seen
        return name

    return backend_of


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_the_argument_decides_over_the_environment(name, ran, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fused" if name == "reference" else "reference")
    assert ran(small_model(name)) == name


def test_the_environment_decides_over_the_device(ran, monkeypatch):
    model = small_model(None)
    assert ran(model) == "fused"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert ran(model) == "reference"


def test_the_context_manager_decides_over_all_and_ends(ran):
    model = small_model("fused")
    with use_backend("reference"):
        assert ran(model) == "reference"
        with use_backend("fused"):
            assert ran(model) == "fused"
        assert ran(model) == "reference"
    assert ran(model) == "fused"


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_stacks_run_by_the_models_argument(backend, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    model = small_model(backend)
    assert [s.resolved_backend for s in model.modules() if isinstance(s, stack.Stack)] == [backend, backend]
