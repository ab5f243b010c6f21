"""How parameters start, and the gradients of those that nothing reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def init_truncated_normal(tensor: Tensor) -> Tensor:
    """Normal of deviation 0.02, cut at one deviation."""
    return nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Truncated normal weights, zero bias."""
    init_truncated_normal(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def init_as_bert(module: nn.Module) -> None:
    """Normal of deviation 0.02, biases and the row of padding zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


class _Unread(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *parameters: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.parameters = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.parameters, ctx.needs_input_grad[1:], strict=True)
        return grad, *(torch.zeros_like(parameter) if needed else None for parameter, needed in wanted)


def with_unread(value: Tensor, *parameters: nn.Parameter) -> Tensor:
    """``value`` itself; parameters that train and that nothing reads get a gradient of zeros from it.

    DistributedDataParallel waits for the gradient of every parameter that trains.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _Unread.apply(value, *trained) if trained and torch.is_grad_enabled() else value
