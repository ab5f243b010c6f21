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
    monkeypatch.setattr("onepeace_fast.models.choice.COST_OF_PACKING", 0)  # or so small a model is never packed
    monkeypatch.setattr(stack, "encode_padded", lambda *a: (seen.append("reference"), padded(*a))[1])
    monkeypatch.setattr(stack, "split", lambda *a: (seen.append("fused"), split(*a))[1])

    def backend_of(model):
        seen.clear()
        with torch.no_grad():
            model.encode(text=text_batch([3, 2]))
        (name,) = seen
        return name

    return backend_of


def test_a_block_decides_over_the_argument_that_over_the_environment_and_that_over_the_device(ran, monkeypatch):
    models = {name: small_model(name) for name in (None, *BACKENDS)}
    assert {name: ran(model) for name, model in models.items()} == {name: name or "fused" for name in models}
    for chosen in BACKENDS:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, chosen)
        assert {name: ran(model) for name, model in models.items()} == {name: name or chosen for name in models}
        with use_backend(chosen):
            assert {ran(model) for model in models.values()} == {chosen}


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_stacks_run_by_the_models_argument(backend, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr("onepeace_fast.models.choice.COST_OF_PACKING", 0)  # or so small a model is never packed
    model = small_model(backend)
    assert [s.resolved_backend for s in model.modules() if isinstance(s, stack.Stack)] == [backend, backend]
