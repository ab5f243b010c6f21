"""A fused model and what surrounds it: handles, replicas, backends, compiled and recorded programs."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

from onepeace_fast import FusedModel, fuse, use_backend
from onepeace_fast.fusion.family import TRACED
from tests.fusion._sums import Around, Encoder, Model, Sums, X, ways


@pytest.fixture(autouse=True)
def _family(monkeypatch):
    monkeypatch.setattr(sys.modules["onepeace_fast.fusion.fuse"], "FAMILIES", (Sums,))


def test_a_replica_of_data_parallel_is_refused():
    """It would share the replaced methods, and with them the parameters of the first device."""
    model = Model()
    handle = fuse(model)
    with pytest.raises(ValueError) as caught:
        model.encoder._replicate_for_data_parallel()
    assert str(caught.value) == (
        "model: expected a fused model on one device, got replicas of torch.nn.DataParallel; take "
        "DistributedDataParallel, or FusedModel(model).undo()"
    )
    handle.undo()
    assert [*model.encoder._replicate_for_data_parallel()._modules] == ["layers", "norm"]


def test_a_handle_leaves_a_later_fusion_alone():
    model = Model()
    earlier = fuse(model)
    earlier.undo()
    later = fuse(model)
    earlier.undo()
    assert ways(model) == "fused" and [*FusedModel(model).parts] == ["encoder"]
    later.undo()
    later.undo()
    assert ways(model) == "own"


def test_a_report_with_a_batch_leaves_an_undone_model_undone():
    model = Model()
    handle = fuse(model)
    handle.undo()
    handle.report(X, rounds=1)
    assert ways(model) == "own"
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_the_arguments_are_the_models_own():
    model = Model()
    handle = fuse(model)
    assert inspect.signature(model.encoder.forward) == inspect.signature(Encoder().forward)
    with pytest.raises(TypeError) as caught:
        model.encoder(X, nonsense=1)
    assert str(caught.value) == "Encoder.forward() got an unexpected keyword argument 'nonsense'"
    assert handle.report().parts[0].own_calls == {"arguments: others than the fused computation knows": 1}


def test_the_reference_backend_runs_the_models_own_code():
    model = Model()
    handle = fuse(model)
    with use_backend("reference"):
        assert ways(model) == "own"
    assert handle.report().parts[0].own_calls == {"use_backend('reference') asks for it": 1}


def test_compiled_code_sees_what_was_changed_before():
    model = Model()
    fuse(model)
    model.encoder.layers[1] = Around(model.encoder.layers[1])
    expected = model(X)
    assert model.way == "own"
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(X), expected) and model.way == "own"


@pytest.mark.filterwarnings("ignore:.*TracerWarning", "ignore::DeprecationWarning")
def test_a_recorded_program_holds_the_models_own_code():
    model = Model()
    handle = fuse(model)
    torch.export.export(model, (X,), strict=False)
    assert model.way == "own"
    model.way = ""
    torch.jit.trace(model, X, check_trace=False)  # which calls the model again
    assert model.way == "own"
    assert handle.report().parts[0].own_calls == {TRACED: 2}
    assert ways(model) == "fused"
