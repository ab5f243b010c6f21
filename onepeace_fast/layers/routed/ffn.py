"""A feed-forward network for each modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.layers.plain import are_plain
from onepeace_fast.layers.routed.experts import (
    RoutedModule,
    listed,
    modules_at,
    on_meta,
    refuse_what_is_left,
    require_list,
    with_plan,
    without_inert,
)
from onepeace_fast.layers.routed.linear import RoutedLinear
from onepeace_fast.layers.routed.norm import RoutedNorm
from onepeace_fast.ops.gated_sub_ln import ACTIVATIONS, gated_sub_ln
from onepeace_fast.ops.routed_ffn import routed_ffn
from onepeace_fast.route_plan import RoutePlan


class ExpertFFN(nn.Module):
    """One modality's feed-forward network in plain PyTorch: what ``RoutedFFN.experts`` gives.

    Attributes:
        w0, w1, w2: linear layers; ``w1`` is None without a gate.
        sub_norm, output_norm: norms before and after ``w2``, or None.
        activation: its name.
    """

    def __init__(
        self, w0: nn.Module, w1: nn.Module | None, w2: nn.Module, sub_norm: nn.Module | None,
        output_norm: nn.Module | None, activation: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.w0, self.w1, self.w2, self.sub_norm, self.output_norm = w0, w1, w2, sub_norm, output_norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim]."""
        h = ACTIVATIONS[self.activation](self.w0(x))
        h = h if self.w1 is None else h * self.w1(x)
        y = self.w2(h if self.sub_norm is None else self.sub_norm(h))
        return y if self.output_norm is None else self.output_norm(y)


class RoutedFFN(RoutedModule):
    """The feed-forward network of each token's modality.

        h = activation(W0 x) * (W1 x),   y = output_norm(W2 sub_norm(h))

    Without a gate h = activation(W0 x); each norm may be absent (gate: Shazeer, arXiv 2002.05202; Sub-LayerNorm: Wang
    et al., arXiv 2210.06423; routing: ONE-PEACE, arXiv 2305.11172). One op computes all but the output's norm where W0
    and W1 have no bias and the Sub-LayerNorm, if there is one, has a bias; otherwise there is one for each linear layer
    and one between them.

    Args:
        modalities: how many; expert m serves modality m of a plan.
        dim, hidden: widths.
        gated: whether there is W1.
        activation: "gelu" (exact, by erf), "gelu_tanh", "silu" or "relu".
        hidden_bias: whether W0 and W1 have biases.
        output_bias: whether W2 has a bias.
        sub_norm, output_norm: "layer_norm" or "rms_norm" before and after W2; None for none.
        eps: of the norms.
        device, dtype: of the parameters, which start as torch's own modules' do.

    Attributes:
        w0, w1, w2: ``RoutedLinear``; ``w1`` is None without a gate.
        sub_norm, output_norm: ``RoutedNorm``, or None.
        activation: its name.

    What is put in the place of one of them, an adapter around it for example, is called as it stands,
    ``part(rows, plan, packed=True)``, and is not fused.
    """

    def __init__(
        self, modalities: int, dim: int, hidden: int, *, gated: bool = True, activation: str = "gelu",
        hidden_bias: bool = False, output_bias: bool = False, sub_norm: str | None = None,
        output_norm: str | None = None, eps: float = 1e-5, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()

        def linear(columns: int, rows: int, bias: bool) -> RoutedLinear:
            return RoutedLinear(modalities, columns, rows, bias, device=device, dtype=dtype)

        def norm(width: int, kind: str | None) -> RoutedNorm | None:
            return None if kind is None else RoutedNorm(modalities, width, kind, eps=eps, device=device, dtype=dtype)

        self._assign(
            linear(dim, hidden, hidden_bias), linear(dim, hidden, hidden_bias) if gated else None,
            linear(hidden, dim, output_bias), norm(hidden, sub_norm), norm(dim, output_norm), activation,
        )  # fmt: skip

    def _assign(
        self, w0: RoutedLinear, w1: RoutedLinear | None, w2: RoutedLinear, sub_norm: RoutedNorm | None,
        output_norm: RoutedNorm | None, activation: str,
    ) -> None:  # fmt: skip
        _require_activation(activation)
        self.w0, self.w1, self.w2, self.sub_norm, self.output_norm = w0, w1, w2, sub_norm, output_norm
        self.activation = activation

    @classmethod
    def from_experts(
        cls, experts: Sequence[nn.Module], *, w0: str, w2: str, activation: str, w1: str | None = None,
        sub_norm: str | Sequence[nn.Module] | None = None, output_norm: str | Sequence[nn.Module] | None = None,
        norm_kind: str | None = None, eps: float | None = None,
    ) -> RoutedFFN:  # fmt: skip
        """Adopt feed-forward networks, one of each modality: their very parameters, which both train from now on.

        Args:
            experts: modules of any class that compute the formula of ``RoutedFFN``.
            w0, w1, w2: where their linear layers are, as ``torch.nn.Module.get_submodule`` takes it: "fc1",
                "net.0.proj". Without ``w1`` there is no gate.
            activation: "gelu" (exact, by erf), "gelu_tanh", "silu" or "relu".
            sub_norm, output_norm: where their norms before and after W2 are, or where these are no part of the experts
                the norms themselves, one of each modality; None for none.
            norm_kind, eps: those of ``RoutedNorm.from_experts``.

        Raises:
            ValueError: a name that an expert does not have, experts of different widths or kinds, and parameters,
                hooks, dropout or other modules of ``torch.nn`` in an expert that no name covers: but containers,
                Identity and the activation.
        """
        require_list(experts, "experts")
        places = {"w0": w0, "w1": w1, "w2": w2, "sub_norm": sub_norm, "output_norm": output_norm}
        found = {
            part: modules_at(experts, place, f"experts, {part}") for part, place in places.items() if place is not None
        }
        _require_activation(activation)
        refuse_what_is_left(experts, found, activation)
        parts: dict[str, RoutedLinear] = {
            part: RoutedLinear.adopting(found[part], f"experts, {part}")
            for part in ("w0", "w1", "w2") if part in found
        }  # fmt: skip
        norms: dict[str, RoutedNorm] = {
            part: RoutedNorm.adopting(found[part], norm_kind, eps, f"experts, {part}")
            for part in ("sub_norm", "output_norm") if part in found
        }  # fmt: skip
        hidden, dim = parts["w0"].weight[0].shape
        shapes = {"w1": (hidden, dim), "w2": (dim, hidden), "sub_norm": (hidden,), "output_norm": (dim,)}
        adopted: dict[str, RoutedLinear | RoutedNorm] = {**parts, **norms}
        for part, module in adopted.items():
            shape = tuple(module.weight[0].shape)
            if shape != shapes.get(part, shape):
                raise ValueError(
                    f"experts, {part}: expected a weight {list(shapes[part])}, as W0 is "
                    f"{[hidden, dim]}, got {list(shape)}"
                )
        routed = on_meta(lambda: cls(len(experts), 1, 1))
        routed._assign(
            parts["w0"], parts.get("w1"), parts["w2"], norms.get("sub_norm"), norms.get("output_norm"), activation
        )
        return routed

    def experts(self) -> list[ExpertFFN]:
        """The network of each modality in plain PyTorch, which shares the parameters.

        Raises:
            ValueError: a part that is no ``RoutedLinear`` or ``RoutedNorm``.
        """
        for name, part in self.named_children():
            if not isinstance(part, RoutedLinear | RoutedNorm):
                raise ValueError(
                    f"{name}: expected a RoutedLinear or RoutedNorm, got a {type(part).__name__}; take it out first"
                )
        parts: list[Sequence[Any]] = [
            [None] * len(self.w0.weight) if part is None else part.experts()
            for part in (self.w0, self.w1, self.w2, self.sub_norm, self.output_norm)
        ]
        return [
            ExpertFFN(w0, w1, w2, sub_norm, output_norm, self.activation)
            for w0, w1, w2, sub_norm, output_norm in zip(*parts, strict=True)
        ]

    @property
    def _modalities(self) -> int | None:
        parts = (self.w0, self.w1, self.w2, self.sub_norm, self.output_norm)
        return next((len(part.weight) for part in parts if isinstance(part, RoutedLinear | RoutedNorm)), None)

    def _rows(self, rows: Tensor, plan: RoutePlan) -> Tensor:
        w0, w1, w2, norm = self.w0, self.w1, self.w2, self.sub_norm
        how: dict[str, Any] = {
            "offsets": plan.offsets, "row_counts": plan.row_counts, "activation": self.activation,
        }  # fmt: skip
        if norm is not None and (fused := _in_the_op(norm)):
            how, norm = how | fused, None
        linears = [w0, w2] if w1 is None else [w0, w1, w2]
        biased = any([getattr(linear, "bias", None) is not None for linear in linears[:-1]])
        if norm is None and not biased and are_plain("RoutedFFN", linears, RoutedLinear):
            gate = None if w1 is None else listed(w1.weight)
            bias = None if w2.bias is None else listed(w2.bias)
            y = routed_ffn(rows, listed(w0.weight), gate, listed(w2.weight), bias, **how)
        else:
            u = with_plan("w0", "RoutedLinear", w0, rows, plan)
            v = None if w1 is None else with_plan("w1", "RoutedLinear", w1, rows, plan)
            h = gated_sub_ln(u, v, **how)
            h = h if norm is None else with_plan("sub_norm", "RoutedNorm", norm, h, plan)
            y = with_plan("w2", "RoutedLinear", w2, h, plan)
        y = y if self.output_norm is None else with_plan("output_norm", "RoutedNorm", self.output_norm, y, plan)
        last = w2 if self.output_norm is None else self.output_norm
        return y if isinstance(last, RoutedModule) else without_inert(y, plan)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


def _in_the_op(norm: RoutedNorm) -> dict[str, Any]:
    """What the op before W2 takes of a norm that it computes too; nothing for another."""
    if isinstance(norm, RoutedNorm) and (norm.kind != "layer_norm" or norm.bias is None):
        return {}
    if not are_plain("RoutedFFN", (norm,), RoutedNorm) or norm.bias is None:
        return {}
    return {"norm_weight": listed(norm.weight), "norm_bias": listed(norm.bias), "eps": norm.eps}


def _require_activation(activation: str) -> None:
    names = ", ".join(ACTIVATIONS)
    require(activation in ACTIVATIONS, lambda: f"activation: expected one of {names}, got {activation!r}")
