"""Both pretraining tasks under autocast and activation checkpointing."""

import pytest
import torch
from models._small import BACKENDS, assert_close, gradients_of, small_config, small_model
from models.test_passes import TASKS


def step(backend, task, kind=None, **encoder):
    name, inputs = task()
    inputs = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    model = small_model(backend, small_config(drop_path_rate=0.3, **encoder), dtype=torch.float32).train()
    torch.manual_seed(0)
    with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
        losses = model(name, **inputs)
    return {k: v.detach() for k, v in losses.items()} | gradients_of(model, losses["loss"])


@TASKS
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_losses_under_autocast_stay_near_float32_and_float32_themselves(task, kind):
    want = step("reference", task)
    gradients = {name: want[name] for name, _ in small_model("reference").named_parameters() if name in want}
    scale = max(value.abs().max() for value in gradients.values())
    for backend in BACKENDS:
        got = step(backend, task, kind)
        assert all(value.dtype == torch.float32 for value in got.values())
        assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=0.01)
        errors = [(got[name] - value).norm() / scale for name, value in gradients.items()]
        assert 0 < max(errors) < 0.2  # rounding shows, and nothing else


@TASKS
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_activations_change_no_loss_and_no_gradient_of_a_step(task, backend):
    plain, checkpointed = step(backend, task), step(backend, task, checkpoint_activations=True)
    assert_close(checkpointed, plain, 0 if backend == "fused" else 1e-6)
