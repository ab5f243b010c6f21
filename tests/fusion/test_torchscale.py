"""torchscale's encoder, on a stand-in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from onepeace_fast import fuse, use_backend
from onepeace_fast.fusion.family import TOO_LITTLE_PADDING
from tests.fusion._checks import (
    Case,
    check_changed_part,
    check_copies,
    check_training,
    check_values_and_undo,
    run,
)
from tests.fusion._torchscale import LAYERS, LENGTH, SAMPLES, SPLIT, WIDTH, Model, Pair, Real, batch, make, real

WAYS: dict[str, dict[str, Any]] = {
    "as in BEiT-3": {"bias": False},
    "with a bias, a projection and all states": {"output": True},
    "post-norm with alpha, no Sub-LN, relu": {
        "normalize_before": False, "subln": False, "alpha": 1.5, "activation_fn": F.relu,
    },
    "silu, and scores of their own scale": {"activation_fn": F.silu, "scaling": 0.2},
    "not Multiway": {"multiway": False},
}  # fmt: skip


def case(arguments: Callable[[int], dict[str, Any]] = batch, one_copy: bool = False, **settings: Any) -> Case:
    """``one_copy``: all keys take one bias, whose gradient is then rounding alone, so it has none here."""

    def made() -> Real:
        model = make(**settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (one_copy and "k_proj" in name and name.endswith("bias")))
        return Real(model)

    return Case(make=made, batch=arguments, parts=("model.encoder",))


def fused_and_plain(model: Model, **arguments: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of the call, fused and by the model's own code."""
    plain = real(copy.deepcopy(model)(**arguments))
    handle = fuse(model)
    with use_backend("fused"):
        found = real(model(**arguments))
    assert handle.report().parts[0].fused_calls == 1, str(handle.report())
    return found, plain


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def own_reason(model: Model, **arguments: Any) -> str:
    """Why a call is not fused; its outputs are then the model's own, bit for bit."""
    plain, handle = copy.deepcopy(model), fuse(model)
    with use_backend("fused"):
        torch.manual_seed(0)
        found = model(**arguments)
        torch.manual_seed(0)
        assert torch.equal(found["encoder_out"], plain(**arguments)["encoder_out"])
    (reason,) = handle.report().parts[0].own_calls
    return reason


@pytest.mark.parametrize("way", WAYS)
def test_values_gradients_and_undo(way: str) -> None:
    settings = WAYS[way]
    hidden = {"return_all_hiddens": True} if "states" in way else {}
    one_copy = not settings.get("multiway", True)
    check_values_and_undo(case(lambda seed: batch(seed) | hidden, one_copy, **settings))


@pytest.mark.parametrize("left_out", ["text", "image"])
def test_a_modality_that_is_not_there_has_no_gradients(left_out: str) -> None:
    def one(seed: int) -> dict[str, Any]:
        given: dict[str, Any] = batch(seed)
        length = LENGTH - SPLIT if left_out == "image" else SPLIT
        given["padding"] = torch.arange(length) >= torch.tensor([length, 2, 1]).repeat(SAMPLES // 3)[:, None]
        return given | {left_out: None}

    check_values_and_undo(case(one, one_copy=True))


def test_copies_have_their_own_parameters() -> None:
    check_copies(case())


def test_training_is_the_same_run_with_drop_path() -> None:
    check_training(case(drop_path_rate=0.5))


def test_drop_path_draws_the_models_own_numbers() -> None:
    settings = {"drop_path_rate": 0.5, "embedding_dropout": 0.3}
    model, arguments = Real(make(**settings)).train(), batch(0)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(run(case(), model, arguments))
    fuse(model)
    with use_backend("fused"):
        for seed, expected in enumerate(found):
            torch.manual_seed(seed)
            for name, value in run(case(), model, arguments).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert not torch.equal(found[0]["output out"], found[1]["output out"])


@pytest.mark.parametrize("path", ["layers.1.ffn.B.fc1", "layers.0.self_attn.q_proj.A", "layer_norm.B"])
def test_a_hook_makes_the_model_run_its_own_code(path: str) -> None:
    check_changed_part(case(), f"model.encoder.{path}")


@pytest.mark.parametrize("split", [1, SPLIT, LENGTH])
def test_every_split_position(split: int) -> None:
    found, plain = fused_and_plain(make(), **batch(0), multiway_split_position=split, return_all_hiddens=True)
    assert_close(found, plain)
    assert len(found) == 3 + LAYERS


def test_a_call_without_a_position_takes_the_last_one() -> None:
    """As torchscale does, which keeps the position in its modules; fused calls and others see the same one."""
    model, plain, arguments = make(), make(), batch(0)
    handle = fuse(model)
    for position, backend in ((None, "fused"), (3, "fused"), (None, "fused"), (5, "reference"), (None, "fused")):
        with use_backend(backend):
            given = arguments | {"multiway_split_position": position}
            assert_close(real(model(**given)), real(plain(**given)))
    assert handle.report().parts[0].fused_calls == 4
    handle.undo()
    given = arguments | {"multiway_split_position": None}
    assert torch.equal(model(**given)["encoder_out"], plain(**given)["encoder_out"])
    with use_backend("fused"):
        fuse(model)
        model(**arguments, multiway_split_position=2)
    pairs = [part for part in model.modules() if isinstance(part, Pair)]
    assert {part.split_position for part in pairs} == {2} and model.encoder.embed_positions in pairs


def test_padding_comes_out_as_zero() -> None:
    model, arguments = make(output=True), batch(0)
    fuse(model)
    with use_backend("fused"):
        output = model(**arguments, return_all_hiddens=True)
    for value in (output["encoder_out"], *output["encoder_states"]):
        assert not value[arguments["padding"]].any() and value[~arguments["padding"]].any()
    assert output["l_aux"] == [None] * LAYERS and output["encoder_padding_mask"] is arguments["padding"]
    with use_backend("fused"):
        assert model(**arguments, features_only=True)["encoder_out"].shape[-1] == WIDTH


@pytest.mark.parametrize(
    "kind", ["no mask", "integers", "an empty sample", "one token", "tokens", "positions", "no token is real"]
)
def test_shapes(kind: str) -> None:
    arguments: dict[str, Any] = batch(0)
    model = make()
    if kind == "no mask":
        del arguments["padding"]
    elif kind == "integers":
        arguments["padding"] = arguments["padding"].long()
    elif kind == "an empty sample":
        arguments["padding"][1] = True
    elif kind == "no token is real":
        arguments["padding"][:] = True
    elif kind == "one token":
        arguments = {"text": arguments["text"][:1, :1]}
    else:
        tokens, padding = torch.randint(0, 11, (2, 7)), torch.arange(7) >= torch.tensor([[7], [3]])
        given: dict[str, Any] = {"src_tokens": tokens, "encoder_padding_mask": padding, "multiway_split_position": 2}
        if kind == "positions":
            given |= {"positions": torch.arange(7).flip(0)[None], "multiway_split_position": 0}
        assert_close(*fused_and_plain(model.encoder, **given))
        return
    assert_close(*fused_and_plain(model, **arguments))


@pytest.mark.parametrize(
    ("settings", "arguments", "reason"),
    [
        ({}, {"attn_mask": torch.zeros(LENGTH, LENGTH)}, "attn_mask was given"),
        ({}, {"incremental_state": [{}, {}]}, "incremental_state was given"),
        ({}, {"unknown": 1}, "keyword arguments were given that this family does not know"),
        ({"dropout": 0.1}, {}, "dropout in training"),
        ({"activation_dropout": 0.1}, {}, "dropout in training"),
    ],
)
def test_declined_calls(settings: dict[str, Any], arguments: dict[str, Any], reason: str) -> None:
    model = make(**settings).train()
    assert own_reason(model, **batch(0), **arguments) == reason


def test_calls_that_torchscales_code_fails_keep_its_error() -> None:
    for settings, position, error in (({}, LENGTH + 1, RuntimeError), ({"multiway": False}, SPLIT, AssertionError)):
        model = make(**settings)
        handle = fuse(model)
        with use_backend("fused"), pytest.raises(error):
            model(**batch(0), multiway_split_position=position)
        (reason,) = handle.report().parts[0].own_calls
        assert reason == "there is no split position in the tokens that all layers share"


def test_positions_that_differ_between_modules_are_theirs() -> None:
    model = make()
    model.encoder.layers[1].ffn.split_position = 2
    reason = own_reason(model, **batch(0), multiway_split_position=None)
    assert reason == "there is no split position in the tokens that all layers share"


def test_dropout_runs_fused_in_evaluation() -> None:
    assert_close(*fused_and_plain(make(dropout=0.5, activation_dropout=0.5), **batch(0)))


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("layers.1.ffn.A", "activation_fn", F.elu),
        ("layers.0.self_attn", "scaling", 1.0),
        ("layers.0", "alpha", 2.0),
        ("layer_norm.B", "eps", 0.1),
        ("layers.1.self_attn", "xpos", nn.Identity()),
        ("relative_position", "num_buckets", 4),
    ],
)
def test_settings_that_changed_since_are_obeyed(path: str, name: str, value: Any) -> None:
    model, changed = make(), make()
    handle = fuse(model)
    for one in (model, changed):
        setattr(one.encoder.get_submodule(path), name, value)
    with use_backend("fused"):
        assert torch.equal(model(**batch(0))["encoder_out"], changed(**batch(0))["encoder_out"])
    (reason,) = handle.report().parts[0].own_calls
    assert reason == "a setting of the encoder is not what it was when it was fused"


def test_a_layer_that_was_added_since_is_obeyed() -> None:
    model, longer = make(), make()
    handle = fuse(model)
    for one in (model, longer):
        one.encoder.layers.append(make(bias=False).encoder.layers[0])
    with use_backend("fused"):
        assert torch.equal(model(**batch(0))["encoder_out"], longer(**batch(0))["encoder_out"])
    (reason,) = handle.report().parts[0].own_calls
    assert reason == "there are not as many layers as when it was fused"


def test_settings_of_the_configuration_are_obeyed_too() -> None:
    model = make()
    fuse(model)
    model.encoder.args.flash_attention = True
    assert "a setting" in model.encoder.__dict__["forward"].fusion.declines(token_embeddings=torch.ones(1, 2, WIDTH))


def test_the_automatic_choice_keeps_batches_with_little_padding() -> None:
    model = make()
    handle = fuse(model)
    model(**batch(0))
    (reason,) = handle.report().parts[0].own_calls
    assert reason == TOO_LITTLE_PADDING
    model(**{name: value.repeat(500, *[1] * (value.dim() - 1)) for name, value in batch(0).items()})
    part = handle.report().parts[0]
    assert (part.fused_calls, part.padded_tokens, part.computed_tokens) == (
        1,
        500 * SAMPLES * LENGTH,
        500 * SAMPLES // 3 * (9 + 6 + 4),
    )


@pytest.mark.parametrize("way", CheckpointImpl)
def test_layers_that_are_wrapped_after_fuse_are_checkpointed(way: CheckpointImpl) -> None:
    model, calls = Real(make(drop_path_rate=0.5)).train(), []
    torch.manual_seed(3)
    expected = run(case(), model, batch(0))
    handle = fuse(model)
    layers = model.model.encoder.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer, checkpoint_impl=way)
    fusion = handle.parts["model.encoder"]
    layer_call, fusion.layer = fusion.layer, lambda *args: calls.append(1) or layer_call(*args)
    torch.manual_seed(3)
    with use_backend("fused"):
        found = run(case(), model, batch(0))
    assert handle.report().parts[0].fused_calls == 1, str(handle.report())
    assert len(calls) == 2 * LAYERS
    for name, value in found.items():
        plain = expected[name.replace("_checkpoint_wrapped_module.", "")]
        torch.testing.assert_close(value, plain, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, arguments = make(), batch(0)
    exact = real(model(**arguments))["out"]

    def error(backend: str) -> float:
        with use_backend(backend), torch.autocast("cpu", dtype):
            out = real(model(**arguments))["out"]
        return float((out - exact).detach().abs().max())

    plain = error("reference")
    handle = fuse(model)
    assert 0 < error("fused") < 2 * plain
    assert handle.report().parts[0].fused_calls == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, arguments = make().to(dtype), batch(0)
    arguments["image"] = arguments["image"].to(dtype)
    exact = real(make().double()(**batch(0) | {"image": arguments["image"].double()}))["out"]
    found, plain = fused_and_plain(model, **arguments)
    assert found["out"].dtype == dtype
    within = 1e-12 if dtype == torch.float64 else 2 * float((plain["out"] - exact).detach().abs().max())
    assert float((found["out"] - exact).detach().abs().max()) < within


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    with mode():
        assert_close(*fused_and_plain(make(), **batch(0)))


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_batches() -> None:
    model = make()
    plain = copy.deepcopy(model)
    handle = fuse(model)
    for layer in model.encoder.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    with use_backend("fused"):
        for seed, length in enumerate((9, 11, 14, 10, 17)):
            arguments = batch(seed, length)
            with torch._dynamo.config.patch(error_on_recompile=seed >= 2):
                found = real(model(**arguments))
            assert_close(found, real(plain(**arguments)))
    assert handle.report().parts[0].fused_calls == 5
    torch._dynamo.reset()
