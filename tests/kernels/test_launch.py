"""How kernels are launched: the record of launches, and that the ops launch at all."""

import contextlib
import warnings

import pytest
import torch
from support.kernels import DEVICE

from onepeace_fast import layer_norm, residual_layer_norm
from onepeace_fast.hardware import cases
from onepeace_fast.kernels import launch
from onepeace_fast.kernels.launch_heuristic import WIDEST, heuristic
from onepeace_fast.kernels.layer_norm import layer_norm_forward
from onepeace_fast.ops import kernel_choice
from onepeace_fast.structures import LayerNormInputs, Routing


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
    assert launched == ["layer_norm_forward_kernel"]
    normed.sum().backward()
    assert launched == ["layer_norm_forward_kernel", "layer_norm_backward_kernel", "partial_sums_kernel"]
    sum(output.sum() for output in residual_layer_norm(x, x, None, weight)).backward()
    assert launched[3:] == ["residual_forward_kernel", "residual_backward_kernel", "partial_sums_kernel"]
    layer_norm(x.double()).sum().backward()
    assert len(launched) == 6, "float64 runs the reference"


def test_frozen_experts_have_no_sum(launched):
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    weights = [torch.ones(8, device=DEVICE, requires_grad=trained) for trained in (True, False, False)]
    offsets = torch.tensor([0, 2, 3, 5], dtype=torch.int32, device=DEVICE)
    layer_norm(x, weights, offsets=offsets).sum().backward()
    assert launched == ["layer_norm_forward_kernel", "layer_norm_backward_kernel", "partial_sums_kernel"]


@pytest.mark.parametrize("operation", WIDEST)
def test_rows_that_the_kernels_do_not_hold_are_the_reference_s_and_it_is_said_once(launched, operation):
    device = torch.device(DEVICE)

    def output_and_gradient(width):
        make = cases.random_tensors(torch.device("cpu"))
        case = next(cases.OVER_ROWS[operation](cases.Rows(8, device), width, torch.float32, make))
        leaves = {name: leaf.to(device).requires_grad_() for name, leaf in case.leaves.items()}
        out = case.call(**leaves)
        return out, *torch.autograd.grad(out, list(leaves.values()), out.detach().square())

    kernel_choice._warn_of_width.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output_and_gradient(WIDEST[operation])
    body = "layer_norm" if operation == "rms_norm" else operation
    assert {name.removesuffix("_kernel") for name in launched} >= {f"{body}_forward", f"{body}_backward"}
    launched.clear()
    refused = f"at most {WIDEST[operation]} columns, .* got {WIDEST[operation] + 1}"
    with pytest.warns(UserWarning, match=refused) as said:
        wide = output_and_gradient(WIDEST[operation] + 1)
    assert [str(one.message).partition(":")[0] for one in said] == [operation, f"{operation}_backward"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output_and_gradient(WIDEST[operation] + 1)
    assert not launched
    with kernel_choice.force_kernels(False):
        assert all(map(torch.equal, wide, output_and_gradient(WIDEST[operation] + 1)))


class OnGpu(torch.Tensor):
    """A tensor that says that a GPU holds it."""

    is_cuda = True


class StandInKernel:
    """What a launch needs of Triton: compiled forms by dtype, loaded at the first launch, and a hook before compiling.

    Triton asks the hook before it compiles, and compiles nothing where the answer is true.
    """

    __name__ = "stand_in"

    def __init__(self):
        self.compiled, self.launches = {}, 0

    def warmup(self, grid, **keywords):
        from triton import knobs

        key = keywords["x"].dtype
        if key not in self.compiled:
            if (hook := knobs.runtime.jit_cache_hook) is not None and hook(key=key):
                return None
            self.compiled[key] = type("Compiled", (), {"module": None})()
        return self.compiled[key]

    def __getitem__(self, grid):
        def run(**keywords):
            self.warmup(grid, **keywords).module = "loaded"
            self.launches += 1

        return run


@pytest.mark.skipif(DEVICE != "cpu", reason="its kernel and its tensors only stand for a GPU's")
def test_a_first_call_inside_a_capture_is_refused_before_anything_is_compiled(monkeypatch):
    from triton import knobs

    capturing = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    kernel, hook = StandInKernel(), knobs.runtime.jit_cache_hook

    def launched_with(dtype):
        launch.launch(kernel, (1,), {"x": torch.empty(1, dtype=dtype).as_subclass(OnGpu)}, {}, num_warps=4)

    launched_with(torch.float16)
    capturing.append(True)
    launched_with(torch.float16)
    assert kernel.launches == 2
    with pytest.raises(RuntimeError, match="stand_in: expected a warm-up call before the capture, got the first call"):
        launched_with(torch.bfloat16)
    assert list(kernel.compiled) == [torch.float16] and kernel.launches == 2
    capturing.clear()
    kernel.warmup((1,), x=torch.empty(1, dtype=torch.bfloat16))
    capturing.append(True)
    with pytest.raises(RuntimeError, match="expected a warm-up call"):  # compiled, but loading is no part of a capture
        launched_with(torch.bfloat16)
    assert knobs.runtime.jit_cache_hook is hook


def test_launches_are_recorded_for_another_architecture_without_a_device():
    x = torch.empty(1000, 1536, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(1536, device="meta")
    with launch.recording("sm_80", 108) as configurations:
        layer_norm_forward(LayerNormInputs(x, [weight], [weight], None, Routing(), 1e-5))
    (configuration,) = configurations
    assert configuration.arguments["x"] is x
    assert configuration.constants["BLOCK_WIDTH"] == 2048
    assert configuration.num_warps == heuristic("layer_norm", 1536).num_warps
