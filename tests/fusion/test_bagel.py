"""``fuse`` on BAGEL's packed training."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from onepeace_fast import fuse, use_backend
from onepeace_fast.fusion.families import bagel
from onepeace_fast.fusion.family import BACKEND, ON_A_CPU
from onepeace_fast.tolerance import assert_within_rule
from tests.fusion import _checks as checks
from tests.fusion._bagel import CASE, WIDTH, Layer, batch, make


def own_calls(model: nn.Module, given: checks.Batch, backend: str = "fused") -> dict[str, int]:
    """The reasons after a call of a fused model."""
    handle = fuse(model)
    with use_backend(backend):
        model(**given)
    return handle.report().parts[0].own_calls


def test_values_and_undo():
    checks.check_values_and_undo(CASE)


def test_copies():
    checks.check_copies(CASE)


def test_training():
    checks.check_training(CASE)


def test_a_hook_on_a_norm_runs():
    checks.check_changed_part(CASE, "layers.1.post_attention_layernorm_moe_gen")


@pytest.mark.parametrize("gen", (None, torch.empty(0, dtype=torch.int64)))
def test_understanding_alone_leaves_the_other_expert_s_gradients_as_they_were(gen):
    given = {**batch(0), "packed_und_token_indexes": torch.arange(20), "packed_gen_token_indexes": gen}
    model = make()
    plain = checks.run(CASE, model, given)
    handle = fuse(model)
    with use_backend("fused"):
        fused = checks.run(CASE, model, given)
    assert handle.report().parts[0].fused_calls == 1
    for name, value in plain.items():
        assert (value is None) == (fused[name] is None), name
        if value is not None:
            torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("lengths", ((1,), (1, 1), (6, 1)))
def test_few_tokens_and_lists_in_any_order(lengths):
    given = dict(batch(1, lengths))
    given["packed_und_token_indexes"] = given["packed_und_token_indexes"].flip(0)
    model = make()
    plain = model(**given)
    fuse(model)
    with use_backend("fused"):
        torch.testing.assert_close(model(**given), plain, rtol=1e-5, atol=1e-5)


def test_attention_is_called_and_may_be_changed():
    model = make()
    handle, seen = fuse(model), []
    model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    model.layers[1].self_attn.q_proj_moe_gen = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with use_backend("fused"):
        fused = model(**batch(0))
    assert handle.report().parts[0].fused_calls == 1 and seen
    handle.undo()
    torch.testing.assert_close(fused, model(**batch(0)), rtol=1e-5, atol=1e-5)


def test_evaluation_and_single_layers_are_the_model_s_own():
    model = make()
    x, given = torch.randn(4, WIDTH), dict(batch(0))
    cos_sin = tuple(one.squeeze(0) for one in model.rotary_emb(x, given.pop("packed_position_ids")[None]))
    expected = model.layers[0](**given, packed_position_embeddings=cos_sin)
    inferred = model.eval()(x)
    handle = fuse(model)
    with use_backend("fused"):
        assert torch.equal(model(x), inferred)
        assert torch.equal(model.train().layers[0](**given, packed_position_embeddings=cos_sin), expected)
    assert handle.report().parts[0].own_calls == {bagel.EVALUATION: 1}


def test_calls_that_are_not_fused_say_why():
    given, model = dict(batch(0)), make()
    model.config.freeze_und = True
    assert own_calls(model, given) == {bagel.FROZEN: 1}
    model = make()
    model.layers[1].freeze_und = True
    assert own_calls(model, given) == {bagel.FROZEN: 1}
    model = make()
    model.layers[1].training = False
    kind = type(model.layers[1])
    model.layers[1].__class__ = type("Layer", (kind,), {"forward_inference": kind.forward_train})
    assert own_calls(model, given) == {bagel.PART_IN_EVALUATION: 1}
    handle = fuse(model := make())
    model.norm_moe_gen.variance_epsilon = 0.5
    with use_backend("fused"):
        model(**given)
    assert handle.report().parts[0].own_calls == {bagel.CHANGED_EPS: 1}
    assert own_calls(make(), given, "reference") == {BACKEND: 1}
    handle = fuse(model := make())
    model(**given)
    assert handle.report().parts[0].own_calls == {ON_A_CPU: 1}


@pytest.mark.parametrize("und", ([0, 1, 1, 4], [0, 1, 2]))
def test_tokens_that_are_in_no_list_or_in_two_are_the_model_s_own(und):
    given = batch(0, (5,)) | {
        "packed_und_token_indexes": torch.tensor(und), "packed_gen_token_indexes": torch.tensor([3]),
    }  # fmt: skip
    assert own_calls(make(), given) == {bagel.NO_PARTITION: 1}


def test_other_dtypes_are_the_model_s_own():
    given = batch(0) | {"packed_sequence": batch(0)["packed_sequence"].double()}
    with pytest.raises(RuntimeError):
        make()(**given)
    handle = fuse(model := make())
    with pytest.raises(RuntimeError), use_backend("fused"):
        model(**given)
    assert handle.report().parts[0].own_calls == {bagel.KINDS: 1}


def changed(path: str, module: nn.Module | None) -> nn.Module:
    model = make()
    parent, name = path.rsplit(".", 1) if "." in path else ("", path)
    setattr(model.get_submodule(parent), name, module)
    return model


class OtherNorm(nn.Module):
    """Of Gemma's kind, which scales by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(WIDTH)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


@pytest.mark.parametrize(
    "path, module, reason",
    (
        ("layers.1.mlp.act_fn", nn.ReLU6(), "layers.1.mlp.act_fn: expected SiLU, got a ReLU6"),
        ("layers.0.mlp_moe_gen.up_proj", nn.Linear(WIDTH, 40, bias=False),
         "layers.0.mlp_moe_gen.up_proj: expected a weight [48, 32], as the first expert has, got [40, 32]"),
        ("layers.0.mlp.down_proj", nn.Linear(48, WIDTH),
         "layers.0.mlp.down_proj: expected a Linear without a bias, got the other"),
        ("layers.0.mlp.down_proj", nn.Identity(), "layers.0.mlp.down_proj: expected a plain Linear, got a Identity"),
        ("layers.1.input_layernorm_moe_gen", nn.LayerNorm(WIDTH),
         "layers.1.input_layernorm_moe_gen: expected an RMSNorm with variance_epsilon, got a LayerNorm"),
        ("layers.1.input_layernorm_moe_gen", None,
         "layers.1.input_layernorm_moe_gen: expected an RMSNorm with variance_epsilon, got none"),
        ("norm_moe_gen", OtherNorm(), "norm_moe_gen: expected an RMSNorm's values, got others from a OtherNorm"),
        ("rotary_emb", None, "rotary_emb: expected a module, got none"),
    ),
)  # fmt: skip
def test_look_alikes_are_refused(path, module, reason):
    assert refusal(changed(path, module)) == f"model: resembles BAGEL, but {reason}"


def refusal(model: nn.Module) -> str:
    try:
        fuse(model)
    except ValueError as reason:
        return str(reason)
    return "none"


def test_another_eps_is_refused():
    model = make()
    model.layers[0].input_layernorm_moe_gen.variance_epsilon = 1e-5
    assert refusal(model).endswith("expected variance_epsilon 1e-06, as the first expert has, got 1e-05")


@pytest.mark.parametrize("how", CheckpointImpl)
def test_checkpointed_layers(how):
    given, model = batch(0), make()
    plain = checks.run(CASE, model, given)
    handle = fuse(model)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=how),
        check_fn=lambda module: isinstance(module, Layer),
    )  # fmt: skip
    with use_backend("fused"):
        found = checks.run(CASE, model, given)
    assert handle.parts and handle.report().parts[0].fused_calls == 1
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name.replace("_checkpoint_wrapped_module.", "")], rtol=1e-4, atol=1e-4)


def test_autocast():
    """As the public code runs it: all in bfloat16, under autocast; twice the error of the model's own code at most."""
    given, model = batch(0), make()
    truth = model(**given)
    half = dict(given, packed_sequence=given["packed_sequence"].bfloat16())
    fuse(model.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**half)
        with use_backend("fused"):
            fused = model(**half)
    assert fused.dtype == plain.dtype == torch.bfloat16
    assert_within_rule("output", fused, plain, truth)


def test_layers_in_two_wrappers():
    """As FSDP goes around the checkpoint wrapper."""
    model = make()
    plain, handle = model(**batch(0)), fuse(model)
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(checkpoint_wrapper(layer))
    with use_backend("fused"):
        torch.testing.assert_close(model(**batch(0)), plain, rtol=1e-5, atol=1e-5)
    assert handle.report().parts[0].fused_calls == 1


@pytest.mark.slow
def test_compiled_layers_are_not_compiled_for_each_batch():
    """The lists of lengths and masks are the model's own: another number of samples compiles again."""
    torch._dynamo.reset()
    model = make()
    batches = [batch(seed, lengths) for seed, lengths in enumerate(((7, 2, 12), (5, 9, 3), (3, 4, 6), (8, 2, 9)))]
    for given in batches:
        given["packed_sequence"].requires_grad_()
    plain = [model(**given) for given in batches]
    handle = fuse(model)
    for layer in model.layers:
        layer.self_attn.forward = torch.compiler.disable(layer.self_attn.forward)
        layer.compile(backend="aot_eager", dynamic=True)
    with use_backend("fused"):
        for seed, given in enumerate(batches):
            with torch._dynamo.config.patch(error_on_recompile=seed > 1):
                torch.testing.assert_close(model(**given), plain[seed], rtol=1e-4, atol=1e-5)
    assert handle.report().parts[0].fused_calls == 4
