"""A norm for each modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.layers.routed.experts import (
    RoutedModule,
    is_of_torch,
    listed,
    on_meta,
    parameter_list,
    refuse_unread,
    require_list,
    require_plain,
)
from onepeace_fast.ops.layer_norm import layer_norm
from onepeace_fast.ops.rms_norm import rms_norm
from onepeace_fast.route_plan import RoutePlan

NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


class RoutedNorm(RoutedModule):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467), with the parameters of each token's modality.

    As torch's own norms it takes tokens in half precision with parameters in float32, and gives them back as they came.

    Args:
        modalities: how many; expert m serves modality m of a plan.
        dim: width.
        kind: "layer_norm" or "rms_norm".
        bias: whether a LayerNorm has a bias; an RMSNorm has none.
        eps: added to the variance, or to the mean square. None in an RMSNorm, as in torch's own: the machine epsilon of
            x's dtype, of float32 in half precision.
        device, dtype: of the parameters, which start as one and zero.

    Attributes:
        weight: [dim] of each modality.
        bias: [dim] of each modality, or None.
        kind, eps: as given.
    """

    weight: nn.ParameterList
    bias: nn.ParameterList | None

    def __init__(
        self, modalities: int, dim: int, kind: str = "layer_norm", *, bias: bool = True, eps: float | None = 1e-5,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        require(modalities > 0, f"modalities: expected at least 1, got {modalities}")
        _require_kind(kind)
        require(eps is not None or kind == "rms_norm", f"eps: expected a number with kind {kind!r}, got None")
        self.kind, self.eps = kind, eps
        self._adopt([new_norm(kind, dim, eps, bias, device, dtype) for _ in range(modalities)], "experts")

    def _adopt(self, experts: Sequence[nn.Module], what: str) -> None:
        weight = parameter_list(experts, "weight", what)
        if weight is None:
            raise ValueError(f"{what}: expected norms with a weight, got {type(experts[0]).__name__} without")
        if weight[0].dim() != 1:
            raise ValueError(f"{what}: expected norms over the last dimension, got a weight {list(weight[0].shape)}")
        bias = parameter_list(experts, "bias", what)
        if bias is not None and self.kind == "rms_norm":
            raise ValueError(f"{what}: expected RMSNorms without bias, got one with a bias")
        self.weight, self.bias = weight, bias

    @classmethod
    def from_experts(
        cls, experts: Sequence[nn.Module], kind: str | None = None, *, eps: float | None = None
    ) -> RoutedNorm:
        """Adopt norms, one of each modality: their very parameters, which both train from now on.

        Args:
            experts: plain ``torch.nn.LayerNorm`` or plain ``torch.nn.RMSNorm``, all alike; or with ``kind`` and ``eps``
                modules of any class that compute such a norm with their parameter "weight", and "bias" where there is
                one.
            kind: "layer_norm" or "rms_norm", what modules of another class compute; None: torch's own class says it.
            eps: of modules of another class; of torch's own where it is not theirs.

        Raises:
            ValueError: another kind of module, experts that differ, an eps that nothing says, and other parameters,
                hooks, dropout or modules of ``torch.nn`` in an expert.
        """
        return cls.adopting(experts, kind, eps, "experts")

    @classmethod
    def adopting(cls, experts: Sequence[nn.Module], kind: str | None, eps: float | None, what: str) -> RoutedNorm:
        """``from_experts``, with their name in an error."""
        require_list(experts, what)
        own: set[float | None] = set()
        if kind is None:
            kind = next((kind for kind, norm in NORMS.items() if type(experts[0]) is norm), None)
            if kind is None:
                raise ValueError(
                    f"{what}: expected nn.LayerNorm or nn.RMSNorm of each modality, got a {type(experts[0]).__name__} "
                    "as expert 0; if it computes such a norm, say which by kind= (in RoutedFFN norm_kind=), "
                    "'layer_norm' or 'rms_norm', and by eps="
                )
            own = {norm.eps for norm in require_plain(experts, NORMS[kind], what)}
            if eps is None and len(own) > 1:
                raise ValueError(f"{what}: expected norms of one eps, got {sorted(map(str, own))}")
            eps = own.copy().pop() if eps is None else eps
        _require_kind(kind)
        for m, norm in enumerate(experts):
            if is_of_torch(norm) and type(norm) is not NORMS[kind]:
                raise ValueError(
                    f"{what}: expected norms of the kind {kind!r}, got a {type(norm).__name__} as expert {m}"
                )
            left = [name for name, _ in norm.named_parameters() if name not in ("weight", "bias")]
            require(not left, f"{what}: expected no parameters but weight and bias, got {left} of expert {m}")
            refuse_unread(norm, (), f"expert {m}", what)
        require(eps is not None or len(own) > 0, f"{what}: expected an eps, got none; give it as eps")
        routed = on_meta(lambda: cls(len(experts), 1, kind, eps=eps))
        routed._adopt(experts, what)
        return routed

    def experts(self) -> list[nn.LayerNorm | nn.RMSNorm]:
        """A norm of torch's own class of each modality, which shares the parameters."""
        found = []
        for m, weight in enumerate(self.weight):
            norm = on_meta(lambda: new_norm(self.kind, weight.shape[0], self.eps, self.bias is not None))  # noqa: B023
            norm.weight = weight
            if self.bias is not None:
                norm.bias = self.bias[m]
            found.append(norm)
        return found

    @property
    def _modalities(self) -> int:
        return len(self.weight)

    def _rows(self, rows: Tensor, plan: RoutePlan) -> Tensor:
        weight, bias = listed(self.weight), None if self.bias is None else listed(self.bias)
        offsets, counts = plan.offsets, plan.row_counts
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps
        if self.kind == "rms_norm":
            return rms_norm(rows, weight, offsets=offsets, row_counts=counts, eps=eps)
        return layer_norm(rows, weight, bias, offsets=offsets, row_counts=counts, eps=eps)

    def extra_repr(self) -> str:
        """The sizes and the kind."""
        dim, bias = self.weight[0].shape[0], self.bias is not None
        return f"modalities={len(self.weight)}, dim={dim}, kind={self.kind!r}, bias={bias}, eps={self.eps}"


def new_norm(
    kind: str, dim: int, eps: float | None, bias: bool, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.LayerNorm | nn.RMSNorm:  # fmt: skip
    """A norm of torch's own class; an RMSNorm has no bias."""
    if kind == "rms_norm":
        return nn.RMSNorm(dim, eps, device=device, dtype=dtype)
    assert eps is not None  # an RMSNorm alone may have none
    return nn.LayerNorm(dim, eps, bias=bias, device=device, dtype=dtype)


def _require_kind(kind: str) -> None:
    require(kind in NORMS, lambda: f"kind: expected one of {', '.join(NORMS)}, got {kind!r}")
