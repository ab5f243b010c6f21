"""A layer under torch.compile, and models under autocast and in other dtypes."""

import pytest
import torch
from models._small import (
    BACKENDS,
    Dtypes,
    assert_close,
    at_tokens,
    batch_of,
    gradients_of,
    layer_inputs,
    small_model,
    valid_tokens,
    weighted_sum,
    with_gradients,
)

from onepeace_fast.drop_path import branches
from onepeace_fast.layers import transformer


@pytest.mark.parametrize("drop_path", [False, True])
def test_compiled_layer_and_its_gradients_equal_the_eager_ones(drop_path):
    torch.compiler.reset()
    model = small_model("fused", dtype=torch.float32)
    layer = model.encoder_wrapper.fusion_model.layers[0]
    batch = batch_of(text=[7, 2, 5], image=(3, 3), audio=[9, 4, 6], dtype=torch.float32)
    factors = torch.tensor([[[0.0, 1.25, 1.25], [1.25, 0.0, 1.25]]])
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x, plan, bias = layer_inputs(model, batch)
        x, *bias = (value.clone().requires_grad_() for value in (x, *bias))
        model.zero_grad(set_to_none=True)
        out = run(x, branches(plan.with_drop_path(factors))[0] if drop_path else plan, bias)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append({"out": out.detach(), "x": x.grad, **{f"bias {i}": v.grad for i, v in enumerate(bias)}})
        results[-1] |= {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    assert len(results[0]) > 20
    assert_close(results[1], results[0], 1e-6)


def half_precision_error(kind, backend, want, batch, valid):
    """Largest error of outputs and gradients against float32, relative to each tensor's largest magnitude."""
    model = small_model(backend, dtype=torch.float32)
    if kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model.encode(**batch)
    else:
        model = model.bfloat16()
        outputs = model.encode(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()})
    outputs = {name: value.float() for name, value in outputs.items()}
    got = {**at_tokens(outputs, valid), **gradients_of(model, weighted_sum(outputs, valid))}
    assert set(got) == set(want)
    return {
        name: ((got[name].float() - value).abs().max() / value.abs().max().clamp(min=1e-6)).item()
        for name, value in want.items()
    }


@pytest.mark.parametrize("kind", ["autocast", "bfloat16 model"])
def test_bfloat16_is_as_near_to_float32_packed_as_padded(kind):
    batch = batch_of(text=[7, 2, 5], image=(3, 3), audio=[9, 4, 6], dtype=torch.float32)
    valid, model = valid_tokens(batch), small_model("reference", dtype=torch.float32)
    want = with_gradients(model, batch)
    reference, fused = (half_precision_error(kind, backend, want, batch, valid) for backend in BACKENDS)
    epsilon = torch.finfo(torch.bfloat16).eps
    worse = {n: (fused[n], reference[n]) for n in want if not fused[n] <= 2 * reference[n] + 4 * epsilon}
    assert not worse, worse
    assert max(fused.values()) > 1e-4, "nothing ran in bfloat16"


def test_autocast_runs_attention_and_ffn_in_bfloat16_and_keeps_the_residual_stream():
    model, batch = small_model("fused", dtype=torch.float32), batch_of(text=[7, 2], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = weighted_sum(model.encode(**batch), valid_tokens(batch))
        with Dtypes() as dtypes:
            model.encode(**batch)
    assert dtypes.seen["routed_ffn"] == dtypes.seen["relative_bias_attention"] == {torch.bfloat16}
    assert dtypes.seen["linear_residual"] == {torch.float32}
    assert {gradient.dtype for gradient in gradients_of(model, loss).values()} == {torch.float32}


@pytest.mark.parametrize("drop_path", [False, True])
@pytest.mark.parametrize("hooked", ["", "self_attn.q_proj", "self_attn", "text_ffn.3"])
def test_autocast_rounds_a_norm_once_and_not_in_front_of_what_a_hook_sees(hooked, drop_path, monkeypatch):
    model = small_model("fused", dtype=torch.float32)
    layer = model.encoder_wrapper.fusion_model.layers[0]
    x, plan, bias = layer_inputs(model, batch_of(text=[7, 2, 5], image=(3, 3), dtype=torch.float32))
    route = branches(plan.with_drop_path(torch.tensor([[[0.0, 1.25, 1.25], [1.25, 0.0, 1.25]]])))[0]
    route, norms, inputs = route if drop_path else plan, [], []
    original = transformer.normalized_and_stream

    def recorded(*given):
        norms.append(original(*given))
        return norms[-1]

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return layer(x, route, bias)

    if hooked:
        layer.get_submodule(hooked).register_forward_pre_hook(lambda module, given: inputs.append(given[0].dtype))
    monkeypatch.setattr(transformer, "normalized_and_stream", recorded)
    got, dtypes = run(), [z.dtype for z, _ in norms]
    rounded = [not hooked.startswith("self_attn"), "ffn" not in hooked][: 1 + drop_path]
    assert dtypes == [torch.bfloat16 if one else torch.float32 for one in rounded]
    assert not hooked.startswith("self_attn") or set(inputs) == {torch.float32}
    monkeypatch.setattr(transformer, "normalized_and_stream", lambda *given: original(*given[:3]))
    torch.testing.assert_close(got, run(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_in_another_dtype_keeps_it_from_input_to_gradient(backend, dtype):
    model = small_model(backend, dtype=dtype)
    batch = batch_of(text=[7, 2], image=(2, 3), audio=[5, 3], dtype=dtype)
    outputs = model.encode(**batch)
    assert {value.dtype for value in outputs.values()} == {dtype}
    gradients = gradients_of(model, weighted_sum(outputs, valid_tokens(batch)))
    assert {value.dtype for value in gradients.values()} == {dtype}
    assert {value.dtype for value in model.to_upstream_state_dict().values()} == {dtype}
