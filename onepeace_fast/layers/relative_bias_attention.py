"""Multi-head attention over packed rows, with a relative position bias, an order, or keys of other tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.attention_structures import Segments
from onepeace_fast.checks import describe, require, require_device
from onepeace_fast.layers.plain import is_plain
from onepeace_fast.layers.relative_bias import RelativeBias
from onepeace_fast.layers.routed.experts import RoutedModule, is_routed, with_plan, without_inert
from onepeace_fast.ops import relative_bias_attention
from onepeace_fast.ops.arguments import autocast_dtype
from onepeace_fast.route_plan import RoutePlan


class RelativeBiasAttention(nn.Module):
    """Multi-head attention of each sample over its packed tokens (arXiv 1706.03762; the bias: ONE-PEACE, 2305.11172).

    Biases find their entries by the plan's codes: build the plan with the ``codes`` and ``code_offsets`` of a bias of
    windows. One bias for all pairs of several modalities of padded batches goes by the place in the sample, the
    modalities one after another.

    Args:
        dim: width of the tokens.
        heads: attention heads.
        bias: none, a ``RelativeBias`` for all pairs of tokens, or one for each modality by its name.
        causal: whether a token sees itself and what comes before it in its sample, the modalities one after another.
        prefix: names of modalities that come first: their tokens see each other, all later ones see them and what comes
            before, as in a caption behind an image.
        head_dim, value_dim: of a head's queries and keys, and of its values; by default dim / heads.
        scale: of the scores, a number; by default head_dim ** -0.5. T5 has 1.
        head_scale: whether each head's output has a trained factor (NormFormer, arXiv 2110.09456).
        norm: what goes over the joined heads before the output projection (Sub-LayerNorm).
        projection_bias: whether the four projections have biases.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: ``torch.nn.Linear``; put ``RoutedLinear`` there for weights of each modality.
        norm: as given. A routed module there or in a projection's place, or a module around one, is called with the
            plan, ``module(rows, plan, packed=True)``; any other with the rows.
    """

    def __init__(
        self, dim: int, heads: int, bias: RelativeBias | Mapping[str, RelativeBias] | None = None, *,
        causal: bool = False, prefix: Sequence[str] = (), head_dim: int | None = None, value_dim: int | None = None,
        scale: float | None = None, head_scale: bool = False, norm: nn.Module | None = None,
        projection_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(heads > 0, f"heads: expected at least 1, got {heads}")
        for name, size in (("head_dim", head_dim), ("value_dim", value_dim)):
            require(size is None or size > 0, f"{name}: expected at least 1, got {size}")
        require(not isinstance(scale, Tensor), "scale: expected a number, got a tensor, which would get no gradient")
        require(head_dim is not None or dim % heads == 0, f"heads: expected a divisor of dim, {dim}, got {heads}")
        self.heads, self.head_dim, self.scale = heads, head_dim or dim // heads, scale
        self.value_dim = value_dim or self.head_dim
        if isinstance(prefix, str):
            raise ValueError(f"prefix: expected a list of names, got {prefix!r}; give [{prefix!r}]")
        require(
            not (causal and prefix),
            f"prefix: expected none beside causal, got {', '.join(prefix)}; prefix alone is causal behind it, leave "
            "causal out",
        )
        self.causal, self.prefix = causal, tuple(prefix)
        for one in (bias or {}).values() if not isinstance(bias, RelativeBias) else (bias,):
            require(one.heads == heads, f"bias: expected one of {heads} heads, got one of {one.heads}")
        self.bias = bias if bias is None or isinstance(bias, RelativeBias) else nn.ModuleDict(dict(bias))
        width, value_width = heads * self.head_dim, heads * self.value_dim
        self.q_proj, self.k_proj = (nn.Linear(dim, width, projection_bias) for _ in range(2))
        self.v_proj = nn.Linear(dim, value_width, projection_bias)
        self.out_proj = nn.Linear(value_width, dim, projection_bias)
        self.head_scale = nn.Parameter(torch.ones(heads)) if head_scale else None
        self.norm = norm

    def forward(
        self, x: Tensor, plan: RoutePlan, keys: Tensor | None = None, key_plan: RoutePlan | None = None
    ) -> Tensor:
        """Packed rows [C, dim] in and out; with ``keys`` they see the rows [K, dim] of another plan, not their own.

        A bias with CLS needs plans with CLS, one without needs plans without: a plan whose CLS are values on a device,
        those of ``from_modality_ids(is_cls=...)``, is taken at the caller's word. With an order, those of both plans
        count from 0 in each sample. Inert rows are zero.

        Raises:
            ValueError: rows, biases, codes, CLS or modalities that do not fit the plan, or keys without their plan.
        """
        require((keys is None) == (key_plan is None), "key_plan: expected that of keys, or neither, got one of them")
        others, other_plan = (x, plan) if keys is None or key_plan is None else (keys, key_plan)
        seen = "x" if keys is None else "keys"
        for name, rows, of in (("x", x, plan), (seen, others, other_plan)):
            if rows.dim() != 2 or rows.shape[0] != of.capacity:
                raise ValueError(
                    f"{name}: expected packed rows of the plan, [{of.capacity}, dim], got {list(rows.shape)}"
                )
        for name, rows, part in (("x", x, "q_proj"), (seen, others, "k_proj"), (seen, others, "v_proj")):
            _require_fitting(name, rows, part, getattr(self, part))
        q = _through("q_proj", self.q_proj, x, plan).unflatten(1, (self.heads, self.head_dim))
        k = _through("k_proj", self.k_proj, others, other_plan).unflatten(1, (self.heads, self.head_dim))
        v = _through("v_proj", self.v_proj, others, other_plan).unflatten(1, (self.heads, self.value_dim))
        vectors, offsets = self._vectors(plan, other_plan)
        own = self._segments(plan)
        attended: Any = relative_bias_attention(
            (q, k, v), cu_seqlens=own.cu_seqlens, modality=own.modality, code=own.code, is_cls=own.is_cls,
            order=own.order, max_length=own.max_length, keys=None if keys is None else self._segments(other_plan),
            bias=vectors, code_offsets=offsets, head_scale=self.head_scale, scale=self.scale,
        )  # fmt: skip
        attended = attended.flatten(1)
        if self.norm is not None:
            attended = _through("norm", self.norm, attended, plan)
        out = _through("out_proj", self.out_proj, attended, plan)
        return out if isinstance(self.out_proj, RoutedModule) else without_inert(out, plan)  # which hold the bias

    def _segments(self, plan: RoutePlan) -> Segments:
        by_order = isinstance(self.bias, RelativeBias) and _goes_by_order(plan)
        place = plan.causal_order() if by_order or self.causal else plan.code
        order = plan.prefix_order(self.prefix) if self.prefix else place if self.causal else None
        code = place if by_order else plan.code
        return Segments(plan.cu_seqlens, plan.modality, code, plan.is_cls, plan.max_length, order)

    def _vectors(self, plan: RoutePlan, key_plan: RoutePlan) -> tuple[list[Tensor], list[int]]:
        """Each bias's vector, and the entry of equal codes."""
        if self.bias is None:
            return [], []
        if isinstance(self.bias, RelativeBias):
            plans = (plan, key_plan)
            _require_cls(self.bias, "the bias", *plans)
            if self.bias.is_series:
                length = max(_codes_below(one) for one in plans)
                return [self.bias.vector(length)], [self.bias.code_offset(length)]
            several = [one.modalities for one in plans if len(one.modalities) > 1]
            require(
                not several, lambda: f"bias: expected that of a series for {list(several[0])}, got that of a window"
            )
            biases: list[Any] = [self.bias]
        else:
            absent = [name for name in plan.modalities if name not in self.bias]
            require(
                not absent, lambda: f"bias: expected one for each of {list(plan.modalities)}, got none for {absent}"
            )
            require(
                plan.modalities == key_plan.modalities,
                lambda: f"key_plan: expected the modalities {list(plan.modalities)}, got {list(key_plan.modalities)}",
            )
            biases = [self.bias[name] for name in plan.modalities]
            for name, bias in zip(plan.modalities, biases, strict=True):
                _require_cls(bias, f"the bias of {name!r}", plan, key_plan)
        vectors: list[Tensor] = []
        offsets: list[int] = []
        for place, bias in enumerate(biases):
            given = max(plan.code_offsets[place], key_plan.code_offsets[place], 0)
            taken = (given + 1,) if bias.is_series else ()
            offset = bias.code_offset(*taken)
            if offset != given:
                of = plan.modalities[place]
                raise ValueError(f"plan: expected codes and code_offsets of {of!r}'s bias, {offset}, got {given}")
            vectors.append(bias.vector(*taken))
            offsets.append(offset)
        return vectors, offsets


def _require_cls(bias: RelativeBias, title: str, plan: RoutePlan, key_plan: RoutePlan) -> None:
    """Raise where a plan says that it has CLS and the bias has none, or the other way round."""
    for name, one in (("plan", plan), ("key_plan", key_plan)):
        if one.has_cls is not None and one.has_cls != bias.with_cls:
            wanted, got = ("with", "without") if bias.with_cls else ("without", "with")
            how = "give first_is_cls=True, or is_cls" if bias.with_cls else "leave first_is_cls out"
            raise ValueError(f"{name}: expected one {wanted} CLS, as {title} is, got one {got}; {how}")


def _goes_by_order(plan: RoutePlan) -> bool:
    """Whether one bias for all goes by places in the sample: codes count each modality of padded batches apart."""
    return len(plan.padded_shapes) > 1


def _codes_below(plan: RoutePlan) -> int:
    """What all codes are below that one bias for all goes by."""
    if _goes_by_order(plan):
        return max(1, sum(length for _, length in plan.padded_shapes))
    return max(1, plan.code_offsets[0] + 1)


def _through(name: str, module: nn.Module, rows: Tensor, plan: RoutePlan) -> Tensor:
    """A module over packed rows; a routed one, or one around it, takes the plan."""
    return with_plan(name, "RoutedLinear", module, rows, plan) if is_routed(module) else module(rows)


def _require_fitting(name: str, rows: Tensor, part: str, module: nn.Module) -> None:
    """Raise where a plain linear layer cannot take packed rows; any other says it itself."""
    if not is_plain(module, nn.Linear):
        return
    weight = module.weight
    require_device(name, rows, weight.device)
    dtype_fits = rows.dtype == weight.dtype or autocast_dtype(rows) is not None
    if not dtype_fits or rows.shape[1] != module.in_features:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: expected {dtype} [rows, {module.in_features}], as the weight of {part} is, got {describe(rows)}"
        )
