"""Mixture-of-Transformers' feed-forward network as it was recorded, by ``RoutedFFN`` over its own experts' modules."""

from functools import cache
from pathlib import Path

import pytest
import torch
from support.kernels import DEVICE
from torch import Tensor, nn

from onepeace_fast import RoutedFFN, RoutePlan
from tools.parity.drawn import DIM, EXPERTS, HIDDEN, mixture_of_transformers
from tools.parity.mixture_of_transformers import Expert
from tools.parity.recording import read
from tools.parity.report import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, QUANTISED, projections

FOLDER = Path(__file__).resolve().parent.parent / "goldens"
EPS = 1e-5
NAMES = ("first", "second", "third")


@cache
def recording() -> dict[str, Tensor]:
    """The file's tensors, and its parameters and inputs."""
    return read(FOLDER / "mot_ffn.safetensors.xz").tensors


class Upstream(nn.Module):
    """The recorded parameters under upstream's names."""

    def __init__(self) -> None:
        super().__init__()
        self.local_experts = nn.ModuleList(Expert(DIM, HIDDEN) for _ in range(EXPERTS))
        self.local_experts_ffn_norm = nn.ModuleList(nn.RMSNorm(DIM, EPS) for _ in range(EXPERTS))
        prefix = "param."
        self.load_state_dict({n.removeprefix(prefix): v for n, v in recording().items() if n.startswith(prefix)})

    def routed(self) -> RoutedFFN:
        """The module that adopts them."""
        return RoutedFFN.from_experts(
            self.local_experts, w0="w1", w1="w3", w2="w2", activation="silu", output_norm=self.local_experts_ffn_norm
        )


def route(case: str, flat: bool = False) -> RoutePlan:
    masks = recording()[f"input.{case}.masks"].bool().to(DEVICE)
    masks = masks.flatten(1) if flat else masks
    return RoutePlan.from_token_masks(dict(zip(NAMES, masks, strict=True)), last_wins=case == "overlap")


def assert_near(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error, scale = (got.cpu() - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"{name}: off by {error:.2e} where the largest magnitude is {scale:.2e}"


def compute(module: RoutedFFN, x: Tensor, plan: RoutePlan, way: str) -> Tensor:
    """In the tokens' own order, over packed rows, or by an op for each part."""
    if way == "packed":
        return plan.unpack_interleaved(module(plan.pack(x), plan, packed=True)).view_as(x)
    if way == "parts":
        module.w0.register_forward_hook(lambda *_: None)
    return module(x, plan)


def test_torch_draws_the_recorded_numbers():
    drawn = mixture_of_transformers()
    assert len(drawn) == 15
    for name, value in drawn.items():
        torch.testing.assert_close(value.flatten()[:8], recording()[f"first.{name}"], rtol=1e-6, atol=0, msg=name)


def check(case: str, way: str) -> None:
    """Outputs and every gradient are the recorded ones."""
    flat, tensors = case.endswith("_flat"), recording()
    case = case.removesuffix("_flat")
    upstream, shape = Upstream().to(DEVICE), (-1, DIM) if flat else tensors["input.x"].shape
    x = tensors["input.x"].to(DEVICE).view(shape).requires_grad_()
    out = compute(upstream.routed(), x, route(case, flat), way)
    assert out.shape == x.shape
    assert_near("out", out.view_as(tensors[f"out.{case}"]), tensors[f"out.{case}"], OUTPUT_TOLERANCE)
    (out * tensors["input.loss_weight"].to(DEVICE).view(shape)).sum().backward()
    dinput = tensors[f"dinput.{case}.x"]
    assert_near("dinput", x.grad.view_as(dinput), dinput, GRADIENT_TOLERANCE + QUANTISED)
    compared = 0
    for name, parameter in upstream.named_parameters():
        for kind, value in projections(parameter.grad.cpu()).items():
            want = tensors[f"{kind}.grad.{case}.{name}"]
            assert_near(f"{kind} of {name}", value, want, GRADIENT_TOLERANCE)
            compared += 1
    assert compared == 21
    if case == "empty1":
        assert all(parameter.grad is not None and not parameter.grad.any()
                   for parameter in upstream.local_experts[1].parameters())  # fmt: skip


@pytest.mark.filterwarnings("ignore:RoutedFFN")
@pytest.mark.parametrize("way", ("tokens", "packed", "parts"))
@pytest.mark.parametrize("case", ("partition", "partition_flat", "empty1", "overlap"))
def test_outputs_and_every_gradient_are_the_recorded_ones(case, way):
    check(case, way)


def test_small_inputs_show_the_norm_s_eps():
    tensors = recording()
    x, plan = tensors["input.eps_probe.x"].to(DEVICE), route("partition")
    module = Upstream().to(DEVICE).routed()
    assert_near("out", module(x, plan), tensors["out.eps_probe"], OUTPUT_TOLERANCE)
    module.output_norm.eps = 2 * EPS
    with pytest.raises(AssertionError):
        assert_near("out", module(x, plan), tensors["out.eps_probe"], OUTPUT_TOLERANCE)
