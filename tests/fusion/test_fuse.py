"""``fuse`` itself, on a family made for the tests: what it refuses, what it notices later, copies, and the way back."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from onepeace_fast import FusedModel, fuse
from tests.fusion._sums import Around, Encoder, Layer, Model, Sums, X, ways


@pytest.fixture(autouse=True)
def _family(monkeypatch):
    monkeypatch.setattr(sys.modules["onepeace_fast.fusion.fuse"], "FAMILIES", (Sums,))


def refusal(model: Any) -> str:
    with pytest.raises(ValueError) as caught:
        fuse(model)
    return str(caught.value)


def test_the_model_is_fused_in_place_and_comes_back():
    model = Model()
    before, names = model(X), list(model.state_dict())
    handle = fuse(model)
    assert [*handle.parts] == ["encoder"]
    torch.testing.assert_close(model(X), before)
    assert model.way == "fused" and list(model.state_dict()) == names
    assert ways(Model()) == "own"  # no class was changed
    handle.undo()
    assert torch.equal(model(X), before) and model.way == "own"
    assert all("forward" not in module.__dict__ for module in model.modules())
    fuse(model)
    assert ways(model) == "fused"


def test_a_report_counts_calls_tokens_and_reasons():
    model = Model()
    handle = fuse(model)
    model(X), model(X), model(X, scale=2.0)
    (part,) = handle.report().parts
    assert part[:4] == ("encoder", "sums", 2, {"a scale was asked for": 1})
    assert part[4:] == (8, 4)
    text = str(handle.report())
    assert "encoder, 1 calls by its own code: a scale was asked for" in text


def test_a_report_with_a_batch_compares_the_model_with_what_it_was():
    model = Model()
    handle = fuse(model)
    gain = handle.report(X, rounds=2).gain
    assert gain.names == ("before", "fused")
    assert set(gain.gradients) == {name for name, _ in model.named_parameters()}
    assert all(one.absolute < 1e-5 for one in (*gain.outputs.values(), *gain.gradients.values()))
    assert ways(model) == "fused"


def test_a_wrapper_that_was_put_around_the_forward_stays_and_calls_what_there_is():
    model = Model()
    handle = fuse(model)
    fused, seen = model.encoder.forward, []

    def wrapper(*arguments, **keywords):
        output = fused(*arguments, **keywords)
        seen.append(output[1])
        return output

    model.encoder.forward = wrapper
    assert ways(model) == "fused" and handle.report(X, rounds=2).gain is not None
    assert {*seen} == {"fused", "own"} and model.encoder.forward is wrapper and ways(model) == "fused"
    handle.undo()
    assert ways(model) == "own" and model.encoder.forward is wrapper


def test_copies_compute_with_their_own_parameters_and_come_back():
    model = Model()
    fuse(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in other.encoder.parameters():
                parameter.zero_()
        assert torch.equal(other(X), other.head(X)) and other.way == "fused"
        FusedModel(other).undo()
        assert ways(other) == "own" and ways(model) == "fused"


def test_parameters_that_are_replaced_are_read():
    model = Model()
    fuse(model)
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()}, assign=True)
    assert not model(X).any() and model.way == "fused"


class Quantised(Tensor):
    """A tensor whose class decides what a product is."""


def wrap(layer: Layer) -> None:
    layer.linear = Around(layer.linear)


def hook(layer: Layer) -> None:
    layer.linear.register_forward_hook(lambda *_: None)


def hook_before(layer: Layer) -> None:
    layer.register_forward_pre_hook(lambda *_: None)


def own_forward(layer: Layer) -> None:
    layer.linear.forward = lambda x: 2 * x


def quantise_parameter(layer: Layer) -> None:
    layer.linear.weight = nn.Parameter(layer.linear.weight.data.as_subclass(Quantised))


class Scaled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def add_module(layer: Layer) -> None:
    layer.norm = nn.LayerNorm(3)


def add_parameter(layer: Layer) -> None:
    layer.scale = nn.Parameter(torch.ones(3))


def drop_parameter(layer: Layer) -> None:
    layer.linear.bias = None


def become_another_class(layer: Layer) -> None:
    layer.__class__ = Scaled


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_module, "layers.1: expected no module norm, got LayerNorm"),
        (add_parameter, "layers.1: expected no parameter scale, got one"),
        (drop_parameter, "layers.1.linear: expected a parameter bias, got none"),
        (become_another_class, "expected the forward of Layer, got that of Scaled"),
        (wrap, "layers.1.linear: expected the Linear that was fused, got Around"),
        (hook, "layers.1.linear: expected no hooks, got some"),
        (hook_before, "layers.1: expected no hooks, got some"),
        (own_forward, "layers.1.linear: expected the class's forward, got one of its own"),
        (quantise_parameter, "layers.1.linear: expected plain parameters, got Quantised"),
    ],
)
def test_what_was_changed_since_runs_as_the_models_own_code(change, reason):
    model = Model()
    handle = fuse(model)
    assert ways(model) == "fused"
    change(model.encoder.layers[1])
    assert ways(model) == "own"
    (part,) = handle.report().parts
    assert part.own_calls == {reason: 1}


def test_a_layer_more_or_a_module_beside_layers_runs_the_models_own_code():
    model = Model()
    handle = fuse(model)
    model.encoder.layers.append(Layer())
    assert ways(model) == "own"
    del model.encoder.layers[2]
    model.encoder.pooler = Layer()
    assert ways(model) == "own"
    assert [*handle.report().parts[0].own_calls] == [
        "layers: expected no module 2, got Layer", "expected no module pooler, got Layer"
    ]  # fmt: skip


def test_a_class_that_adds_no_forward_is_fused():
    model = Model()
    fuse(model)
    layer = model.encoder.layers[0]
    layer.__class__ = type("Sharded", (Layer,), {})
    assert ways(model) == "fused"


@pytest.mark.parametrize("kind", [Encoder, Layer, nn.Linear])
def test_a_class_that_was_patched_since_runs_the_models_own_code(kind, monkeypatch):
    model = Model()
    handle = fuse(model)
    own = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda *arguments, **keywords: own(*arguments, **keywords))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = copy.deepcopy(model), torch.load(file, weights_only=False)
        assert [ways(one) for one in (model, *copies)] == ["own"] * 3
    (part,) = handle.report().parts
    assert part.own_calls == {f"expected the forward that {kind.__name__} had when it was fused, got another": 1}
    assert ways(model) == "fused"


def test_a_changed_setting_runs_the_models_own_code():
    model = Model()
    (part,) = fuse(model).parts.values()
    part.structure.watch("norm", model.encoder.norm, "eps")
    assert ways(model) == "fused"
    model.encoder.norm.eps = 0.5
    assert ways(model) == "own"
    assert part.calls["norm.eps: expected 1e-05, as when it was fused, got 0.5"] == 1


def test_hooks_for_all_modules_run_the_models_own_code():
    model = Model()
    handle = fuse(model)
    hooked = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert ways(model) == "own"
    finally:
        hooked.remove()
    assert handle.report().parts[0].own_calls == {"hooks are registered for all modules": 1}
    assert ways(model) == "fused"


def test_what_torch_puts_around_a_called_layer_runs():
    model = Model()
    handle = fuse(model)
    layers = model.encoder.layers
    layers[0] = checkpoint_wrapper(layers[0])
    model(X).sum().backward()
    assert model.way == "fused"
    layers[1] = Around(layers[1])
    assert ways(model) == "own"
    assert [*handle.report().parts[0].own_calls] == ["layers.1: expected the Layer that was fused, got Around"]


def test_hooks_of_the_root_run_as_they_are():
    model, seen = Model(), []
    fuse(model)
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    assert ways(model) == "fused" and seen == ["fused"]


def test_what_cannot_be_fused_is_refused_and_left_as_it_was():
    assert refusal("model").startswith("model: expected a torch.nn.Module, got str 'model'")
    assert refusal(nn.Linear(2, 2)) == ("model: expected a part of these families: sums; got Linear with none of them")
    assert refusal(Model(width=4)) == "encoder: resembles sums, but norm: expected width 3, got 4"
    assert refusal(torch.compile(Model(), backend="eager")).startswith(
        "model: expected a module that is not compiled, got a compiled one; compile it after fuse"
    )
    compiled = Model()
    compiled.encoder.compile(backend="eager")
    assert refusal(compiled).startswith("encoder: expected a module that is not compiled")
    assert refusal(nn.DataParallel(Model())).startswith(
        "model: expected a model that is not wrapped, got DataParallel; wrap it after fuse"
    )
    with torch.device("meta"):
        assert refusal(Model()) == (
            "encoder.layers.0.linear.weight: expected a parameter in memory, got one on meta; load the model first"
        )
    tied = Model()
    tied.encoder.layers[1].linear.weight = tied.encoder.layers[0].linear.weight
    assert refusal(tied) == (
        "encoder: resembles sums, but layers.1.linear.weight: expected a parameter of its own, got one tied to "
        "layers.0.linear.weight"
    )
    assert ways(tied) == "own"
    twice = Model()
    fuse(twice)
    assert refusal(twice).startswith("encoder: expected a model that is not fused, got a fused part")
    assert ways(twice) == "fused"
    with pytest.raises(ValueError, match="model: expected one with fused parts, got Model with none"):
        FusedModel(Model())


def test_what_is_fused_beside_what_is_refused_is_reported():
    model = nn.ModuleDict({"a": Model(), "b": Model(width=4)})
    handle = fuse(model)
    assert [*handle.parts] == ["a.encoder"]
    assert handle.report().refused == (("b.encoder", "sums", "norm: expected width 3, got 4"),)
    assert "b.encoder is not fused: like sums, but norm: expected width 3, got 4" in str(handle.report())


def test_what_is_inside_a_fused_part_is_not_fused_again():
    encoder = Encoder()
    encoder.layers.append(Layer())
    encoder.layers[2].inner = Encoder()
    handle = fuse(encoder)
    assert [*handle.parts] == [""]
    assert encoder(X)[1] == "fused" and encoder.layers[2].inner(X)[1] == "own"
    assert str(handle.report()).splitlines()[1].split()[:2] == ["model", "sums"]
