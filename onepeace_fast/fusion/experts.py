"""Experts of a live model's modalities: which of their modules the ops compute, and what those compute of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.fusion.family import Refusal
from onepeace_fast.layers.plain import has_plain_tensors, is_plain, is_watched
from onepeace_fast.ops.rms_norm import rms_norm
from onepeace_fast.route_plan import RoutePlan

Named = Sequence[tuple[str, Any]]
"""Path and module of each expert's part."""


class Route:
    """A plan of interleaved tokens, and the place of each token's row."""

    def __init__(self, plan: RoutePlan) -> None:
        self.plan = plan
        self.place: Tensor | None = None
        if plan.capacity == plan.padded_rows:
            rows = torch.arange(plan.capacity, device=plan.source.device)
            self.place = torch.empty_like(plan.source).scatter_(0, plan.source, rows)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows in the tokens' own order, zero for a token without a row."""
        # Where each token has a row, a gather does it, which is faster than a scatter.
        return self.plan.unpack_interleaved(rows) if self.place is None else F.embedding(self.place, rows)


def parts(module: nn.Module, paths: Sequence[str]) -> list[tuple[str, Any]]:
    """The modules at these paths; None where there is none."""
    found = []
    for path in paths:
        part: Any = module
        for name in path.split("."):
            part = getattr(part, "_modules", {}).get(name)
        found.append((path, part))
    return found


def require_linears(experts: Named, bias: bool = False) -> tuple[int, int]:
    """Raise unless each is a plain ``nn.Linear`` of one shape; columns and rows of the weight, [columns, rows].

    Raises:
        Refusal: another module, width, or bias.
    """
    shape: tuple[int, int] | None = None
    for path, module in experts:
        if not is_plain(module, nn.Linear):
            raise Refusal(f"{path}: expected a plain Linear, got {kind_of(module)}")
        if (module.bias is not None) != bias:
            raise Refusal(f"{path}: expected a Linear {'with' if bias else 'without'} a bias, got the other")
        mine = (module.out_features, module.in_features)
        if mine != (shape := shape or mine):
            raise Refusal(f"{path}: expected a weight {[*shape]}, as the first expert has, got {[*mine]}")
    assert shape is not None
    return shape


def require_rms_norms(experts: Named, width: int, eps: str) -> None:
    """Raise unless each has what an RMSNorm has, a weight and a number named ``eps``, which is one for all.

    Raises:
        Refusal: another module, width, eps or result.
    """
    first = None
    for path, module in experts:
        wanted = f"an RMSNorm with {eps}"
        if not isinstance(module, nn.Module) or {*module._parameters} != {"weight"} or module._modules:
            raise Refusal(f"{path}: expected {wanted}, got {kind_of(module)}")
        weight, mine = module._parameters["weight"], getattr(module, eps, None)
        plain = has_plain_tensors(module) and not is_watched(module) and not module._buffers
        if weight is None or not plain or not isinstance(mine, float):
            raise Refusal(
                f"{path}: expected {wanted}, got {kind_of(module)} with {eps} {mine!r} or a change of its own"
            )
        if [*weight.shape] != [width]:
            raise Refusal(f"{path}: expected a weight [{width}], got {[*weight.shape]}")
        if mine != (first := mine if first is None else first):
            raise Refusal(f"{path}: expected {eps} {first}, as the first expert has, got {mine}")
        require_result(path, module, partial(_rms_norm, weight=weight, eps=mine), width, "an RMSNorm's")


def require_result(path: str, module: nn.Module, formula: Callable[[Tensor], Tensor], width: int, whose: str) -> None:
    """Raise unless a module without state returns what a formula does for two rows; a forward cannot be read.

    Raises:
        Refusal: other values. Parameters of zeros or ones may hide the difference.
    """
    with torch.no_grad():
        x = torch.linspace(-3, 4, 2 * width, device="cpu").view(2, width).to(next(module.parameters()))
        got, want = module(x), formula(x)
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)  # norms compute in float32
        bound = 8 * eps * want.abs().amax()
        same = isinstance(got, Tensor) and got.shape == want.shape and bool(((got - want).abs() <= bound).all())
    if not same:
        raise Refusal(f"{path}: expected {whose} values, got others from {kind_of(module)}")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def require_silu(path: str, activation: Any) -> None:
    """Raise unless a module or function computes x * sigmoid(x), as its values between -8 and 8 say.

    Raises:
        Refusal: another activation, or one with parameters or hooks.
    """
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")
    is_module = isinstance(activation, nn.Module)
    plain = not is_module or (not is_watched(activation) and not [*activation.parameters(), *activation.buffers()])
    if not (callable(activation) and plain and torch.allclose(activation(x), F.silu(x), rtol=1e-9, atol=1e-12)):
        raise Refusal(f"{path}: expected SiLU, got {kind_of(activation)}")


def kind_of(module: object) -> str:
    """A module's class, in words."""
    return "none" if module is None else f"a {type(module).__name__}"


def routed_rms_norm(rows: Tensor, norms: Sequence[Any], eps: str, plan: RoutePlan) -> Tensor:
    """Packed rows through the RMSNorm of their modality."""
    weights = [norm.weight for norm in norms]
    return rms_norm(rows, weights, offsets=plan.offsets, row_counts=plan.row_counts, eps=getattr(norms[0], eps))
