"""Batches, modules with every form, and each token through its expert in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast import RoutedFFN, RoutedLinear, RoutedNorm, RoutePlan

NAMES = ("text", "image", "audio")
DIM, HIDDEN = 8, 12
BATCHES = {
    "mixed": [0, 2, 2, 0, 1, 2, 0, 1],
    "an empty modality": [2, 0, 0, 2, 2],
    "all in one": [1, 1, 1, 1],
    "one token": [2],
    "none": [],
}
FORMS: dict[str, dict[str, Any]] = {
    "GeGLU": {},
    "GeGLU by tanh, Sub-LayerNorm, output bias": {
        "activation": "gelu_tanh", "sub_norm": "layer_norm", "output_bias": True,
    },
    "SwiGLU, RMSNorm behind": {"activation": "silu", "output_norm": "rms_norm"},
    "biases, Sub-LayerNorm": {
        "gated": False, "hidden_bias": True, "output_bias": True, "sub_norm": "layer_norm", "eps": 1e-3,
    },
    "ReLU, LayerNorm behind": {"gated": False, "activation": "relu", "output_norm": "layer_norm"},
    "biases, RMSNorm before and behind": {
        "hidden_bias": True, "activation": "silu", "sub_norm": "rms_norm", "output_norm": "rms_norm", "eps": 0.5,
    },
}  # fmt: skip


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64, with parameters that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def ffn(form: str) -> RoutedFFN:
    return randomised(RoutedFFN(len(NAMES), DIM, HIDDEN, **FORMS[form]))


def modules() -> dict[str, nn.Module]:
    """A module of each form."""
    count = len(NAMES)
    found: dict[str, nn.Module] = {
        "linear": RoutedLinear(count, DIM, HIDDEN), "linear without bias": RoutedLinear(count, DIM, 5, bias=False),
        "LayerNorm": RoutedNorm(count, DIM), "LayerNorm without bias": RoutedNorm(count, DIM, bias=False, eps=0.1),
        "RMSNorm": RoutedNorm(count, DIM, "rms_norm", eps=0.1),
    }  # fmt: skip
    found |= {form: RoutedFFN(count, DIM, HIDDEN, **how) for form, how in FORMS.items()}
    return {name: randomised(module) for name, module in found.items()}


def plan_of(ids: Sequence[int]) -> RoutePlan:
    return RoutePlan.from_modality_ids(torch.tensor(ids, dtype=torch.int64), NAMES)


def tokens(count: int, *, seed: int = 5, dim: int = DIM) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_by_one(experts: Sequence[nn.Module], x: Tensor, ids: Sequence[int], columns: int) -> Tensor:
    """Each token alone through the expert of its modality."""
    rows = [experts[m](x[t : t + 1]) for t, m in enumerate(ids)]
    return torch.cat([x.new_zeros(0, columns) * x.sum(), *rows])


def gradients(module: nn.Module, x: Tensor, out: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Of x and of every parameter, zeros where there is none."""
    named = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(named.items(), found, strict=True)
    }
