"""The modality-routed transformer over packed tokens: parameters under upstream's names, and its ops.

    x <- x + drop_path * gamma_1 * Wo( LN_sub( c * Attention(LN_1(x)) ) )
    x <- x + drop_path' * gamma_2 * FFN( LN_2(x) )      the FFN of the token's modality

(ONE-PEACE, arXiv 2305.11172, section 3.1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onepeace_fast.checks import require
from onepeace_fast.config import TransformerConfig
from onepeace_fast.drop_path import Branch, Branches, branches
from onepeace_fast.layers.norms import normalized, normalized_and_stream, normalized_by_modality
from onepeace_fast.layers.parameters import init_linear
from onepeace_fast.layers.plain import (
    are_plain,
    by_modality,
    calls_as,
    calls_modules,
    is_plain,
    unfused,
    watched_everywhere,
)
from onepeace_fast.layers.reference import Spans, add_branch, attend, each_span, plan_spans
from onepeace_fast.layers.side_by_side import DenseRoute, LayerRoute, dense_routes
from onepeace_fast.ops import relative_bias_attention, residual, residual_layer_norm, routed_ffn
from onepeace_fast.ops.arguments import autocast_dtype
from onepeace_fast.ops.linear_residual import linear_residual
from onepeace_fast.ops.projections import projections
from onepeace_fast.ops.relative_bias_attention import QKV
from onepeace_fast.route_plan import RoutePlan

FEW_NUMBERS = 256 * 1536  # an image at full width: what its layers keep is small


def projects_together(z: Tensor) -> bool:
    """Whether queries, keys and values are one tensor: attention's kernels take that, its code for a CPU the three."""
    return z.device.type != "cpu"


class SelfAttention(nn.Module):
    """Parameters of the shared attention; keys have no bias."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.heads, self.head_dim = config.attention_heads, dim // config.attention_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.c_attn = nn.Parameter(torch.ones(self.heads)) if config.head_scale else None
        self.ln = nn.LayerNorm(dim) if config.sub_layer_norm else None

    def forward(self, z: Tensor, route: LayerRoute, bias: Sequence[Tensor] | Tensor | None) -> Tensor:
        """Attention of normalised packed rows [R, dim], or of a padded batch [length, batch, dim]; the same shape.

        ``route`` and ``bias`` are as in ``TransformerLayer``.
        """
        if not isinstance(route, RoutePlan):
            q, k, v = self.q_proj(z), self.k_proj(z), self.v_proj(z)
            if isinstance(route, DenseRoute):
                attended = route.attend(q, k, v, self.heads, self.c_attn)
            else:
                attended = attend(q, k, v, self.heads, bias, self.c_attn)  # type: ignore[arg-type]
            return self.out_proj(attended if self.ln is None else self.ln(attended))
        return self.out_proj(self.before_projection(z, route, bias))

    def before_projection(self, z: Tensor, route: RoutePlan, bias: Sequence[Tensor] | Tensor | None) -> Tensor:
        """What the output projection takes of normalised packed rows [R, dim]; the same shape."""
        attended = relative_bias_attention(
            self.project(z),
            cu_seqlens=route.cu_seqlens,
            modality=route.modality,
            code=route.code,
            is_cls=route.is_cls,
            bias=bias,
            code_offsets=route.code_offsets if bias else (),
            head_scale=self.c_attn,
            max_length=route.max_length,
        ).flatten(1)
        return attended if self.ln is None else normalized(attended, self.ln)

    def project(self, z: Tensor) -> QKV:
        """Queries, keys and values in one tensor, [rows, 3, heads, head_dim]; or apart, [rows, heads, head_dim]."""
        linears = (self.q_proj, self.k_proj, self.v_proj)
        if not are_plain("q_proj, k_proj, v_proj", linears, nn.Linear) or not projects_together(z):
            q, k, v = (linear(z).unflatten(1, (self.heads, self.head_dim)) for linear in linears)
            return q, k, v
        projected = projections(z, [linear.weight for linear in linears], [linear.bias for linear in linears])
        return projected.unflatten(2, (self.heads, self.head_dim)).transpose(0, 1)


class GeGLU(nn.Module):
    """gelu(W0 z) * (W1 z), Shazeer, arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(dim, hidden, bias=False)
        self.wi_1 = nn.Linear(dim, hidden, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return F.gelu(self.wi_0(z)) * self.wi_1(z)


def new_ffn(config: TransformerConfig) -> nn.Sequential:
    """One modality's FFN; the identity keeps upstream's numbering: GeGLU 0, Sub-LayerNorm 2, output projection 3."""
    norm = nn.LayerNorm(config.ffn_embed_dim) if config.ffn_layer_norm else nn.Identity()
    return nn.Sequential(
        GeGLU(config.embed_dim, config.ffn_embed_dim),
        nn.Identity(),
        norm,
        nn.Linear(config.ffn_embed_dim, config.embed_dim),
    )


class FFNModules(NamedTuple):
    """What one modality's FFN consists of; ``norm`` is an identity without Sub-LayerNorm."""

    wi_0: nn.Linear
    wi_1: nn.Linear
    norm: nn.LayerNorm | nn.Identity
    out: nn.Linear


def plain_ffns(ffns: Sequence[nn.Module]) -> list[FFNModules] | None:
    """The modules of all modalities' FFNs where one op may compute them: plain and alike; None where it may not."""
    found: list[FFNModules] = []
    everywhere = watched_everywhere()
    for ffn in ffns:
        modules = None if everywhere else _plain_ffn(ffn)
        if modules is None or not _alike(modules, found[0] if found else modules):
            unfused("FFN", ffn, nn.Sequential)
            return None
        found.append(modules)
    return found


def _plain_ffn(ffn: nn.Module) -> FFNModules | None:
    if not is_plain(ffn, nn.Sequential) or len(ffn._modules) != 4:
        return None
    gate, identity, norm, out = ffn._modules.values()
    if not (is_plain(gate, GeGLU) and is_plain(identity, nn.Identity) and is_plain(out, nn.Linear)):
        return None
    if not (is_plain(norm, nn.Identity) or (is_plain(norm, nn.LayerNorm) and norm.bias is not None)):
        return None
    modules = FFNModules(gate.wi_0, gate.wi_1, norm, out)
    linears = is_plain(modules.wi_0, nn.Linear) and is_plain(modules.wi_1, nn.Linear)
    return modules if linears and modules.wi_0.bias is None and modules.wi_1.bias is None else None


def _alike(one: FFNModules, first: FFNModules) -> bool:
    """Whether both have or lack the Sub-LayerNorm, with one eps, and the output's bias, and are of one width."""
    if one.wi_0.weight.shape != first.wi_0.weight.shape:
        return False
    same_norm = type(one.norm) is type(first.norm) and getattr(one.norm, "eps", 0) == getattr(first.norm, "eps", 0)
    return same_norm and (one.out.bias is None) == (first.out.bias is None)


def _few_or_no_gradient(x: Tensor) -> bool:
    """Whether what the modules keep for a backward pass, twice as much as the ops do, is nothing or little."""
    return x.numel() <= FEW_NUMBERS or not torch.is_grad_enabled()


def _product_dtype(x: Tensor, attention: nn.Module) -> torch.dtype | None:
    """What autocast rounds attention's input to, None where a module of the user's may look at it before."""
    if (dtype := autocast_dtype(x)) is None or watched_everywhere() or not is_plain(attention, SelfAttention):
        return None
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    return dtype if all(is_plain(linear, nn.Linear) for linear in linears) else None


class TransformerLayer(nn.Module):
    """One layer: shared attention, one FFN per modality."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.dropout = config.dropout
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.attn_ln = nn.LayerNorm(dim) if config.attention_layer_norm else None
        self.final_layer_norm = nn.LayerNorm(dim)
        for modality in config.modalities:
            self.add_module(f"{modality}_ffn", new_ffn(config))
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale is not None:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), config.layer_scale)) for _ in range(2))

    def ffn(self, modality: str) -> nn.Module:
        """The FFN of a modality."""
        return self.get_submodule(f"{modality}_ffn")

    def forward(
        self,
        x: Tensor,
        route: LayerRoute | Branches,
        bias: Sequence[Tensor] | Tensor | None,
        drop_path: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """One layer over packed rows [C, dim], or over a padded batch [length, batch, dim]; the same shape comes out.

        Args:
            x: the tokens.
            route: the plan of packed rows, with DropPath what each branch computes of them, or on a CPU with its pairs'
                bias made; or the spans of a padded sequence.
            bias: the modalities' expanded vectors, or the dense bias [batch, heads, length, length].
            drop_path: float32 [2, S], DropPath's factors of the two branches of a padded batch.
            seeds: int64 [2], dropout's seeds of the two branches of packed rows.
        """
        if isinstance(route, DenseRoute):
            return self._by_modules(x, route, route.spans, bias, (None, None), 0.0)
        if isinstance(route, RoutePlan):
            route = Branches(Branch(route), Branch(route))
        if isinstance(route, Branches):
            require(
                drop_path is None,
                "drop_path: expected none with packed rows, got factors; route is branches(plan.with_drop_path(...))",
            )
            return self.packed(x, *route, bias, seeds)  # type: ignore[arg-type]  # vectors go with packed rows
        return self.padded(x, route, bias, drop_path)  # type: ignore[arg-type]  # and one tensor with spans

    def padded(self, x: Tensor, spans: Spans, bias: Tensor | None, drop_path: Tensor | None) -> Tensor:
        """The reference's layer over a padded batch."""
        dropout = self.dropout if self.training else 0.0
        drop_paths: Sequence[Tensor | None] | Tensor = (
            (None, None) if drop_path is None else drop_path[:, :, None].to(x.dtype)
        )
        return self._by_modules(x, spans, spans, bias, drop_paths, dropout)

    def _by_modules(
        self, x: Tensor, route: LayerRoute, spans: Spans, bias: Sequence[Tensor] | Tensor | None,
        drop_paths: Sequence[Tensor | None] | Tensor, dropout: float,
    ) -> Tensor:  # fmt: skip
        """The layer by calls of its modules: over a padded batch, or over packed rows on a CPU."""
        attended = self.self_attn(self.self_attn_layer_norm(x), route, bias)
        if self.attn_ln is not None:
            attended = self.attn_ln(attended)
        x = add_branch(x, attended, self.gamma_1, drop_paths[0], dropout)
        y = each_span(self.ffn, self.final_layer_norm(x), spans)
        return add_branch(x, y, self.gamma_2, drop_paths[1], dropout)

    def packed(
        self, x: Tensor, attention: Branch, feed_forward: Branch, bias: Sequence[Tensor], seeds: Tensor | None
    ) -> Tensor:
        """The layer over packed rows, by the ops; each branch computes its own rows."""
        simple = seeds is None and attention.drop_path is None
        if simple and _few_or_no_gradient(x) and calls_modules(x) and (spans := plan_spans(attention.plan)):
            return self._by_modules(x, attention.plan, spans, bias, (None, None), 0.0)
        dropout: Sequence[dict[str, Any]] = ({}, {})
        if seeds is not None and self.dropout:
            dropout = [{"dropout": self.dropout, "seed": seed} for seed in seeds]

        z, x = normalized_and_stream(x, self.self_attn_layer_norm, attention, _product_dtype(x, self.self_attn))
        norm, plan = self.final_layer_norm, feed_forward.plan
        plain = are_plain("LayerNorm", (norm,), nn.LayerNorm) and norm.weight is not None
        joined: dict[str, Any] = {}
        if plain and feed_forward.row_index is None:
            joined = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        x, normed = self._after_attention(x, z, attention, bias, dropout[0], **joined)
        ffns = [self.ffn(modality) for modality in plan.modalities]
        modules = plain_ffns(ffns)
        if normed is None:
            normed, x = normalized_and_stream(x, norm, feed_forward, None if modules is None else autocast_dtype(x))
        if dropout[1] or modules is None:
            y = by_modality(ffns, normed, plan) if modules is None else self.packed_ffn(normed, plan, modules)
            return residual(x, y, self.gamma_2, **dropout[1], **feed_forward.arrival())
        return self.packed_ffn(
            normed, plan, modules, residual=x, gamma=self.gamma_2, drop_path=feed_forward.drop_path,
            sample=feed_forward.sample, row_index=feed_forward.row_index,
        )  # fmt: skip

    def _after_attention(
        self, x: Tensor, z: Tensor, branch: Branch, bias: Sequence[Tensor], dropout: dict[str, Any], **norm: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x with attention's branch, and with the parameters of a LayerNorm its norm."""
        attention, how = self.self_attn, branch.arrival() | norm | dropout
        if not dropout and self.attn_ln is None and calls_as(attention, SelfAttention):
            out = attention.out_proj
            if are_plain("out_proj", (out,), nn.Linear):
                attended = attention.before_projection(z, branch.plan, bias)
                return linear_residual(x, attended, out.weight, out.bias, self.gamma_1, **how)
        attended = attention(z, branch.plan, bias)
        if self.attn_ln is not None:
            attended = normalized(attended, self.attn_ln)
        if norm:
            return residual_layer_norm(x, attended, self.gamma_1, **how)
        return residual(x, attended, self.gamma_1, **how), None

    def packed_ffn(
        self, z: Tensor, plan: RoutePlan, modules: Sequence[FFNModules] | None = None, **settings: Any
    ) -> Tensor:
        """Every row through the FFN of its modality, in one op; ``settings`` are further arguments of ``routed_ffn``.

        ``modules`` are those of the plan's modalities, looked up without them.
        """
        if modules is None:
            modules = plain_ffns([self.ffn(modality) for modality in plan.modalities])
        assert modules is not None  # others are not given to this op
        wi_0, wi_1, norms, outs = zip(*modules, strict=True)
        has_norm = isinstance(norms[0], nn.LayerNorm)
        return routed_ffn(
            z,
            [linear.weight for linear in wi_0],
            [linear.weight for linear in wi_1],
            [linear.weight for linear in outs],
            None if outs[0].bias is None else [linear.bias for linear in outs],
            offsets=plan.offsets,
            row_counts=plan.row_counts,
            norm_weight=[norm.weight for norm in norms] if has_norm else None,
            norm_bias=[norm.bias for norm in norms] if has_norm else None,
            eps=norms[0].eps if has_norm else 1e-5,
            **settings,
        )


def _takes_dense(layer: nn.Module) -> bool:
    """Whether a layer and its attention are the classes above, unchanged, which take a ``DenseRoute``."""
    return is_plain(layer, TransformerLayer) and is_plain(layer.self_attn, SelfAttention)


class Transformer(nn.Module):
    """The stack of layers and the final LayerNorm of each modality."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        for modality in config.modalities if config.final_norm else ():
            self.add_module(f"{modality}_layer_norm", nn.LayerNorm(config.embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    @property
    def drop_path_rates(self) -> list[float]:
        """DropPath's probability of each layer, growing linearly from 0 to the configured rate."""
        last = max(len(self.layers) - 1, 1)
        return [self.config.drop_path_rate * layer / last for layer in range(len(self.layers))]

    def final_norm(self, modality: str) -> nn.Module:
        """The final LayerNorm of a modality."""
        return self.get_submodule(f"{modality}_layer_norm")

    def draw_seeds(self, device: torch.device) -> Tensor | None:
        """Seeds of dropout, int64 [layers, 2], or None where there is no dropout."""
        if not (self.training and self.config.dropout):
            return None
        return torch.randint(2**62, (len(self.layers), 2), device=device)

    def forward(
        self,
        x: Tensor,
        route: RoutePlan | Spans,
        bias: Sequence[Sequence[Tensor] | Tensor] = (),
        drop_path: Tensor | None = None,
    ) -> Tensor:
        """Packed rows [C, dim], or a padded batch [length, batch, dim], through all layers and the final norms.

        Args:
            x: floating point, ``plan.pack`` of the embedded tokens, or the embedded tokens padded.
            route: the route plan, whose ``drop_path`` holds DropPath's factors, None for none; or the spans of a padded
                sequence.
            bias: per table (one for the stack or one per layer), the modalities' vectors [heads, entries], or the dense
                bias [batch, heads, length, length].
            drop_path: float32 [layers, 2, S], DropPath's factors of a padded batch.
        """
        packed = isinstance(route, RoutePlan)
        seeds = self.draw_seeds(x.device) if packed else None
        routes: Sequence[LayerRoute | Branches] = [route] * len(self.layers)
        if isinstance(route, RoutePlan) and route.drop_path is not None:
            routes = branches(route)
        elif isinstance(route, RoutePlan) and seeds is None and _few_or_no_gradient(x) and calls_modules(x):
            dense = dense_routes(route, x, self.config.attention_heads, bias)
            if dense:
                takes = map(_takes_dense, self.layers)
                routes = [dense[i % len(dense)] if taken else route for i, taken in enumerate(takes)]
        for i, layer in enumerate(self.layers):
            tables = bias[i if len(bias) > 1 else 0] if bias else (() if packed else None)
            arguments = (x, routes[i], tables, *(None if value is None else value[i] for value in (drop_path, seeds)))
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        if not self.config.final_norm:
            return x
        if isinstance(route, RoutePlan):
            return normalized_by_modality(x, route, self.final_norm)
        return each_span(self.final_norm, x, route)
