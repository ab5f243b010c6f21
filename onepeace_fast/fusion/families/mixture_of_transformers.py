"""Mixture-of-Transformers (arXiv 2411.04996): a feed-forward network and projections of attention for each modality."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from onepeace_fast.fusion.experts import (
    Route,
    kind_of,
    parts,
    require_linears,
    require_result,
    require_rms_norms,
    routed_rms_norm,
)
from onepeace_fast.fusion.family import FusedCall, Refusal, routing_is_chosen
from onepeace_fast.ops.rms_norm import rms_norm
from onepeace_fast.ops.routed_ffn import routed_ffn
from onepeace_fast.ops.routed_linear import routed_linear
from onepeace_fast.route_plan import RoutePlan

EPS = "eps"
UNKNOWN = "arguments: others than the module's own"
KINDS = "x, modality_masks: expected tokens in the parameters' dtype, and beside them a boolean mask for each modality"
OVERLAP = "modality_masks: a token is in several of them"
CHANGED_EPS = "eps: the experts' norms differ"

_PLANS = WeakIdKeyDictionary()  # of the first mask, or of the tensor that all are in: layers share it


class MaskedExperts(FusedCall):
    """A module with ``local_experts``, whose call gets a boolean mask of tokens for each modality.

    The route of masks is kept as long as they live and stay as they are, so that layers with the same masks share it.
    A token in none of the masks comes out as zero; the public code leaves uninitialised memory there. It is trusted
    that a module of these parts puts them together as the public one does.
    """

    norms_of: ClassVar[str]  # the norms of the output
    first: nn.Linear  # the first expert's, whose dtype tokens must have

    def __init__(self, root: nn.Module, whole: Sequence[nn.Module] = ()) -> None:
        super().__init__(root, whole=whole)
        self.experts = len(root.get_submodule(self.norms_of)._modules)
        if self.experts < 2:
            raise Refusal(f"{self.norms_of}: expected at least 2 experts, got {self.experts}")
        if (count := getattr(root, "n_modalities", self.experts)) != self.experts:
            raise Refusal(f"n_modalities: expected {self.experts}, as there are norms, got {count}")
        self.norms: list[list[Any]] = []

    def named(self, name: str) -> list[tuple[str, Any]]:
        """Path and module of each expert in a list."""
        if len(found := self.root.get_submodule(name)._modules) != self.experts:
            raise Refusal(f"{name}: expected {self.experts} experts, as there are norms, got {len(found)}")
        return parts(self.root, [f"{name}.{expert}" for expert in range(self.experts)])

    def take_norms(self, name: str, width: int) -> None:
        """Have a list of norms watched for changes of eps."""
        require_rms_norms(experts := self.named(name), width, EPS)
        self.norms.append([module for _, module in experts])

    def declines_tokens(self, x: Any, masks: Any) -> str:
        """Why a call with these tokens and masks is not fused."""
        if any([len({norm.eps for norm in norms}) > 1 for norms in self.norms]):
            return CHANGED_EPS
        if not self._fits(x, masks, self.first.weight):
            return KINDS
        return routing_is_chosen(x) or ("" if route_of(masks) else OVERLAP)

    def _fits(self, x: Any, masks: Any, weight: Tensor) -> bool:
        if not isinstance(x, Tensor) or x.dtype != weight.dtype or x.dim() not in (2, 3):
            return False
        if not isinstance(masks, Tensor | list | tuple) or len(masks) != self.experts:
            return False
        return all(
            isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape[:-1]
            and mask.device == x.device
            for mask in masks
        )  # fmt: skip

    def linear(self, rows: Tensor, name: str, plan: RoutePlan) -> Tensor:
        """Packed rows through the linear layer of their modality."""
        experts: Any = self.root.get_submodule(name)
        return routed_linear(
            rows, [expert.weight for expert in experts], offsets=plan.offsets, row_counts=plan.row_counts
        )

    def normed(self, rows: Tensor, name: str, plan: RoutePlan) -> Tensor:
        """Packed rows through the norm of their modality."""
        return routed_rms_norm(rows, [*self.root.get_submodule(name).children()], EPS, plan)


class MixtureFeedForward(MaskedExperts):
    """RMSNorm(W2 (silu(W1 x) * W3 x)) of each token's modality: ``local_experts`` and ``local_experts_ffn_norm``."""

    family = "Mixture-of-Transformers feed-forward"
    norms_of = "local_experts_ffn_norm"

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        experts = self.named("local_experts")
        for path, expert in experts:
            if {*expert._modules} != {"w1", "w2", "w3"} or expert._parameters:
                raise Refusal(f"{path}: expected w1, w2 and w3 alone, got {kind_of(expert)} with {[*expert._modules]}")
        shapes = {
            name: require_linears([(f"{path}.{name}", expert._modules[name]) for path, expert in experts])
            for name in ("w1", "w3", "w2")
        }
        self.first = experts[0][1].w1
        hidden, width = shapes["w1"]
        for name, wanted in (("w3", (hidden, width)), ("w2", (width, hidden))):
            if shapes[name] != wanted:
                raise Refusal(f"local_experts.0.{name}: expected a weight {[*wanted]}, got {[*shapes[name]]}")
        for path, expert in experts:
            require_result(path, expert, partial(_swiglu, expert), width, "a SwiGLU's")
        self.take_norms(self.norms_of, width)

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return _has_lists(module, ("local_experts", "local_experts_ffn_norm"))

    def declines(self, *args: Any, **kwargs: Any) -> str:
        try:
            call = FEED_FORWARD.bind(self, *args, **kwargs).arguments
        except TypeError:
            return UNKNOWN
        return self.declines_tokens(call["x"], call["modality_masks"])

    def forward(self, x: Tensor, modality_masks: Sequence[Tensor] | Tensor) -> Tensor:
        root: Any = self.root
        route = _needed(route_of(modality_masks))
        plan = route.plan
        w1, w3, w2 = ([getattr(expert, name).weight for expert in root.local_experts] for name in ("w1", "w3", "w2"))
        rows = routed_ffn(plan.pack(x), w1, w3, w2, offsets=plan.offsets, row_counts=plan.row_counts, activation="silu")
        self.count_tokens(plan.padded_rows, plan.capacity)
        return route.unpack(self.normed(rows, self.norms_of, plan)).view(x.shape)


class MixtureAttention(MaskedExperts):
    """The projections of each token's modality, and their norms, around the model's own ``attention_comp``."""

    family = "Mixture-of-Transformers attention"
    norms_of = "local_experts_attention_norm"
    projections = ("local_experts_wq", "local_experts_wk", "local_experts_wv", "local_experts_wo")
    qk_norms = ("local_experts_q_normalization", "local_experts_k_normalization", None)

    def __init__(self, root: nn.Module) -> None:
        if (attention := root._modules.get("attention_comp")) is None:
            raise Refusal("attention_comp: expected a module, got none")
        super().__init__(root, whole=[attention])
        shapes = [require_linears(self.named(name)) for name in self.projections]
        self.first = self.named(self.projections[0])[0][1]
        inner, width = shapes[0]
        for name, got, wanted in zip(self.projections, shapes, [(inner, width)] * 3 + [(width, inner)], strict=True):
            if got != wanted:
                raise Refusal(f"{name}.0: expected a weight {[*wanted]}, got {[*got]}")
        self.has_qk_norms = root._modules.get(self.qk_norms[0]) is not None
        if self.has_qk_norms:
            head_dim = getattr(root, "head_dim", 0)
            if not isinstance(head_dim, int) or head_dim < 1 or inner % head_dim:
                raise Refusal(f"head_dim: expected a divisor of {inner}, got {head_dim}")
            self.structure.watch("model", root, "head_dim")
            for name in self.qk_norms[:2]:
                if root._modules.get(name) is None:
                    raise Refusal(f"{name}: expected norms, got none")
                self.take_norms(name, head_dim)
        self.take_norms(self.norms_of, width)

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return _has_lists(module, (*MixtureAttention.projections, MixtureAttention.norms_of))

    def declines(self, *args: Any, **kwargs: Any) -> str:
        try:
            call = ATTENTION.bind(self, *args, **kwargs).arguments
        except TypeError:
            return UNKNOWN
        if isinstance(call["x"], Tensor) and call["x"].dim() != 2:
            return KINDS
        return self.declines_tokens(call["x"], call["modality_masks"])

    def forward(self, x: Tensor, attn_mask: Any, modality_masks: Sequence[Tensor] | Tensor) -> tuple[Tensor, Any]:
        root: Any = self.root
        route = _needed(route_of(modality_masks))
        plan = route.plan
        rows = plan.pack(x)
        q, k, v = (
            route.unpack(self._projected(rows, name, norm, plan))
            for name, norm in zip(self.projections, self.qk_norms, strict=False)
        )
        attended, weights = root.attention_comp(q, k, v, attn_mask=attn_mask)
        rows = self.linear(plan.pack(attended.flatten(0, 1)), self.projections[-1], plan)
        self.count_tokens(plan.padded_rows, plan.capacity)
        return route.unpack(self.normed(rows, self.norms_of, plan)), weights

    def _projected(self, rows: Tensor, name: str, norm: str | None, plan: RoutePlan) -> Tensor:
        rows = self.linear(rows, name, plan)
        if norm is None or not self.has_qk_norms:
            return rows
        root: Any = self.root
        heads = rows.shape[1] // root.head_dim
        norms: Any = root.get_submodule(norm)
        return rms_norm(
            rows.view(-1, root.head_dim), [one.weight for one in norms], offsets=plan.offsets * heads,
            row_counts=[count * heads for count in plan.row_counts], eps=norms[0].eps,
        ).view(rows.shape)  # fmt: skip


class Kept:
    """The route of masks, None where they overlap, as long as they say the same.

    On a CPU their values are compared, since others may share the memory and write there; elsewhere their versions.
    """

    def __init__(self, masks: Sequence[Tensor] | Tensor, owners: Sequence[Tensor]) -> None:
        self.owners = [weakref.ref(owner) for owner in owners]
        stacked = torch.stack([*masks])
        self.versions = _versions(owners)
        self.values = stacked if stacked.device.type == "cpu" else None
        self.route: Route | None = None
        if not (stacked.sum(0) > 1).any():
            named = {str(number): mask.flatten() for number, mask in enumerate(masks)}
            self.route = Route(RoutePlan.from_token_masks(named, last_wins=True, leave_out=True))

    def holds(self, masks: Sequence[Tensor] | Tensor, owners: Sequence[Tensor]) -> bool:
        """Whether these are the masks, as they were."""
        if len(owners) != len(self.owners) or any(
            mine() is not owner for mine, owner in zip(self.owners, owners, strict=True)
        ):
            return False
        if self.values is not None:
            return torch.equal(self.values, torch.stack([*masks]))
        return self.versions is not None and self.versions == _versions(owners)


def route_of(masks: Sequence[Tensor] | Tensor) -> Route | None:
    """The route of masks; None where they overlap."""
    owners = [masks] if isinstance(masks, Tensor) else [*masks]
    kept = _PLANS.get(owners[0])
    if kept is None or not kept.holds(masks, owners):
        with torch.inference_mode(False):  # it is kept for what has gradients, too
            _PLANS[owners[0]] = kept = Kept(masks, owners)
    return kept.route


FEED_FORWARD, ATTENTION = (inspect.signature(family.forward) for family in (MixtureFeedForward, MixtureAttention))


def _versions(owners: Sequence[Tensor]) -> list[int] | None:
    """How often each was changed in place, where that is counted."""
    return None if any(owner.is_inference() for owner in owners) else [owner._version for owner in owners]


def _needed(route: Route | None) -> Route:
    assert route is not None, OVERLAP
    return route


def _swiglu(expert: Any, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, expert.w1.weight)) * F.linear(x, expert.w3.weight), expert.w2.weight)


def _has_lists(module: nn.Module, names: Sequence[str]) -> bool:
    return all(isinstance(module._modules.get(name), nn.ModuleList) for name in names)
