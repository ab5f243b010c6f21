"""What an adapter remembers of the last width serves every later call as if nothing had been remembered."""

import pytest
import torch
from models._small import BACKENDS, assert_close, batch_of, layer_inputs, small_model, with_gradients

BATCHES = ({"text": [7], "image": (1, 3)}, {"text": [5, 2], "image": (2, 2)}, {"text": [7], "image": (1, 3)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_first_ran_in_inference_mode_trains(backend):
    batch = batch_of(**BATCHES[0])
    model, fresh = small_model(backend), small_model(backend)
    with torch.inference_mode():
        model.encode(**batch)
    assert_close(with_gradients(model, batch), with_gradients(fresh, batch), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_other_widths_take_turns(backend):
    model = small_model(backend)
    for sizes in BATCHES:
        batch = batch_of(**sizes)
        assert_close(with_gradients(model, batch), with_gradients(small_model(backend), batch), 1e-12)


@pytest.mark.usefixtures("modules_on_a_cpu")
@pytest.mark.parametrize("sizes", [{"text": [5, 5]}, {"text": [5, 2]}])
def test_what_attention_keeps_of_a_plan_in_inference_mode_serves_training(sizes):
    model, batch = small_model("fused"), batch_of(**sizes)
    x, plan, bias = layer_inputs(model, batch)
    transformer = model.encoder.fusion_model
    with torch.inference_mode():
        want = transformer(x, plan, [bias])
    got = transformer(x.requires_grad_(), plan, [bias])
    torch.testing.assert_close(got, want.clone())
    got.sum().backward()
    assert x.grad.isfinite().all()


def test_what_a_graph_captures_is_not_remembered(monkeypatch):
    model, batch = small_model("reference"), batch_of(**BATCHES[0])
    kept = [module._remembered for module in model.modules() if hasattr(module, "_remembered")]
    with monkeypatch.context() as capture:
        for question in ("is_initialized", "is_current_stream_capturing"):
            capture.setattr(torch.cuda, question, lambda: True)
        model.encode(**batch)
    assert kept and not any(kept)
    model.encode(**batch)
    assert any(kept)
