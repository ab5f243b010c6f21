"""How kernels are launched: the record of launches, and that the ops launch at all."""

import pytest
import torch
from support.kernels import DEVICE

from onepeace_fast import layer_norm, residual_layer_norm
from onepeace_fast.kernels import launch
from onepeace_fast.kernels import layer_norm as layer_norm_kernels
from onepeace_fast.kernels.launch_heuristic import heuristic


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched."""
    names = []
    original = launch.Configuration.launch

    def counting(self, grid):
        names.append(self.kernel.__name__)
        return original(self, grid)

    monkeypatch.setattr(launch.Configuration, "launch", counting)
    return names


def test_ops_launch_kernels_forward_and_backward(launched):
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    normed = layer_norm(x, weight)
    assert launched == ["_forward"]
    normed.sum().backward()
    assert launched == ["_forward", "_backward", "_sum_partials"]
    sum(output.sum() for output in residual_layer_norm(x, x, None, weight)).backward()
    assert launched[3:] == ["_forward", "_backward", "_sum_partials"]
    layer_norm(x.double()).sum().backward()
    assert len(launched) == 6, "float64 runs the specification"


def test_frozen_experts_have_no_sum(launched):
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    weights = [torch.ones(8, device=DEVICE, requires_grad=trained) for trained in (True, False, False)]
    offsets = torch.tensor([0, 2, 3, 5], dtype=torch.int32, device=DEVICE)
    layer_norm(x, weights, offsets=offsets).sum().backward()
    assert launched == ["_forward", "_backward", "_sum_partials"]


def test_launches_are_recorded_for_another_architecture_without_a_device():
    x = torch.empty(1000, 1536, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(1536, device="meta")
    with launch.recording("sm_80", 108) as configurations:
        layer_norm_kernels.layer_norm(x, [weight], [weight], None, None, None, (), 1e-5)
    (configuration,) = configurations
    assert configuration.arguments["x"] is x
    assert configuration.constants["BLOCK_WIDTH"] == 2048
    assert configuration.num_warps == heuristic("layer_norm", 1536).num_warps
