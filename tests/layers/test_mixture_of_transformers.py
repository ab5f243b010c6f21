"""Mixture-of-Transformers' feed-forward network as it was recorded, by ``RoutedFFN`` over its own experts' modules."""

import importlib.util
import lzma
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load
from support.kernels import DEVICE
from torch import Tensor, nn

from onepeace_fast import RoutedFFN, RoutePlan

FOLDER = Path(__file__).resolve().parent.parent / "goldens"
EPS = 1e-5
# Of the largest magnitude: float32 in another order of summation.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5
QUANTISED = 1.6e-5  # of the gradients of inputs, in the file
NAMES = ("first", "second", "third")


@cache
def reduction() -> ModuleType:
    """The script that made the file, which draws its parameters and inputs again."""
    spec = importlib.util.spec_from_file_location("reduce_mot", FOLDER / "reduce_mot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def recording() -> dict[str, Tensor]:
    """The file's tensors, and its parameters and inputs."""
    return load(lzma.decompress((FOLDER / "mot_ffn.safetensors.xz").read_bytes())) | reduction().drawn()


class Expert(nn.Module):
    """A network with upstream's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)


class Upstream(nn.Module):
    """The recorded parameters under upstream's names."""

    def __init__(self) -> None:
        super().__init__()
        given, count = reduction(), reduction().EXPERTS
        self.local_experts = nn.ModuleList(Expert(given.DIM, given.HIDDEN) for _ in range(count))
        self.local_experts_ffn_norm = nn.ModuleList(nn.RMSNorm(given.DIM, EPS) for _ in range(count))
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
    drawn = reduction().drawn()
    assert len(drawn) == 15
    for name, value in drawn.items():
        torch.testing.assert_close(value.flatten()[:8], recording()[f"first.{name}"], rtol=1e-6, atol=0, msg=name)


@pytest.mark.filterwarnings("ignore:RoutedFFN")
@pytest.mark.parametrize("way", ("tokens", "packed", "parts"))
@pytest.mark.parametrize("case", ("partition", "partition_flat", "empty1", "overlap"))
def test_outputs_and_every_gradient_are_the_recorded_ones(case, way):
    flat, tensors = case.endswith("_flat"), recording()
    case = case.removesuffix("_flat")
    upstream, shape = Upstream().to(DEVICE), (-1, reduction().DIM) if flat else tensors["input.x"].shape
    x = tensors["input.x"].to(DEVICE).view(shape).requires_grad_()
    out = compute(upstream.routed(), x, route(case, flat), way)
    assert out.shape == x.shape
    assert_near("out", out.view_as(tensors[f"out.{case}"]), tensors[f"out.{case}"], OUTPUT_TOLERANCE)
    (out * tensors["input.loss_weight"].to(DEVICE).view(shape)).sum().backward()
    dinput = tensors[f"dinput.{case}.x"] * tensors[f"scale.dinput.{case}.x"]
    assert_near("dinput", x.grad.view_as(dinput), dinput, GRADIENT_TOLERANCE + QUANTISED)
    compared = 0
    for name, parameter in upstream.named_parameters():
        for kind, value in reduction().projections(parameter.grad.cpu()).items():
            want = tensors[f"{kind}.grad.{case}.{name}"]
            assert_near(f"{kind} of {name}", value, want, GRADIENT_TOLERANCE)
            compared += 1
    assert compared == 21
    if case == "empty1":
        assert all(parameter.grad is not None and not parameter.grad.any()
                   for parameter in upstream.local_experts[1].parameters())  # fmt: skip


def test_small_inputs_show_the_norm_s_eps():
    tensors = recording()
    x, plan = tensors["input.eps_probe.x"].to(DEVICE), route("partition")
    module = Upstream().to(DEVICE).routed()
    assert_near("out", module(x, plan), tensors["out.eps_probe"], OUTPUT_TOLERANCE)
    module.output_norm.eps = 2 * EPS
    with pytest.raises(AssertionError):
        assert_near("out", module(x, plan), tensors["out.eps_probe"], OUTPUT_TOLERANCE)
