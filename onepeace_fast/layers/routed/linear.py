"""A linear layer for each modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.layers.routed.experts import RoutedModule, listed, on_meta, parameter_list, require_plain
from onepeace_fast.ops.routed_linear import routed_linear
from onepeace_fast.route_plan import RoutePlan


class RoutedLinear(RoutedModule):
    """x W^T + b, with W and b of each token's modality (routing: ONE-PEACE, arXiv 2305.11172).

    Args:
        modalities: how many; expert m serves modality m of a plan.
        in_features, out_features: widths.
        bias: whether there is a bias.
        device, dtype: of the parameters, which start as those of ``torch.nn.Linear``.

    Attributes:
        weight: [out_features, in_features] of each modality.
        bias: [out_features] of each modality, or None.
    """

    weight: nn.ParameterList
    bias: nn.ParameterList | None

    def __init__(
        self, modalities: int, in_features: int, out_features: int, bias: bool = True, *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        require(modalities > 0, f"modalities: expected at least 1, got {modalities}")
        self._adopt([nn.Linear(in_features, out_features, bias, device, dtype) for _ in range(modalities)], "experts")

    def _adopt(self, experts: Sequence[nn.Linear], what: str) -> None:
        weight = parameter_list(experts, "weight", what)
        assert weight is not None  # a Linear has one
        self.weight, self.bias = weight, parameter_list(experts, "bias", what)

    @classmethod
    def from_experts(cls, experts: Sequence[nn.Module]) -> RoutedLinear:
        """Adopt linear layers, one of each modality: their very parameters, which both train from now on.

        Args:
            experts: plain ``torch.nn.Linear``, all of one shape, dtype and device.

        Raises:
            ValueError: another kind of module, one with hooks or parametrisations, or experts that differ.
        """
        return cls.adopting(experts, "experts")

    @classmethod
    def adopting(cls, experts: Sequence[nn.Module], what: str) -> RoutedLinear:
        """``from_experts``, with their name in an error."""
        linears = require_plain(experts, nn.Linear, what)
        routed = on_meta(lambda: cls(len(linears), 1, 1))
        routed._adopt(linears, what)
        return routed

    def experts(self) -> list[nn.Linear]:
        """A ``torch.nn.Linear`` of each modality, which shares the parameters."""
        found = []
        for m, weight in enumerate(self.weight):
            rows, columns = weight.shape
            linear = on_meta(lambda: nn.Linear(columns, rows, self.bias is not None))  # noqa: B023
            linear.weight = weight
            if self.bias is not None:
                linear.bias = self.bias[m]
            found.append(linear)
        return found

    @property
    def _modalities(self) -> int:
        return len(self.weight)

    def _rows(self, rows: Tensor, plan: RoutePlan) -> Tensor:
        bias = None if self.bias is None else listed(self.bias)
        return routed_linear(rows, listed(self.weight), bias, offsets=plan.offsets, row_counts=plan.row_counts)

    def extra_repr(self) -> str:
        """The sizes."""
        out_features, in_features = self.weight[0].shape
        bias = self.bias is not None
        return f"modalities={len(self.weight)}, in_features={in_features}, out_features={out_features}, bias={bias}"
