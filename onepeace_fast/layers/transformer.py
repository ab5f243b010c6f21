"""The modality-routed transformer over packed tokens: parameters under upstream's names, and its ops.

    x <- x + keep * gamma_1 * Wo( LN_sub( c * Attention(LN_1(x)) ) )
    x <- x + keep' * gamma_2 * FFN_m( LN_2(x) )                        m: the token's modality

(ONE-PEACE, arXiv 2305.11172, section 3.1.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onepeace_fast.checks import require
from onepeace_fast.config import TransformerConfig
from onepeace_fast.drop_path import Branch, Branches, branches
from onepeace_fast.layers.adapter import init_linear
from onepeace_fast.layers.padded_layer import Spans, encode_layer
from onepeace_fast.ops import layer_norm, relative_bias_attention, residual, residual_layer_norm, routed_ffn
from onepeace_fast.route_plan import RoutePlan


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

    def project(self, z: Tensor) -> Tensor:
        """Queries, keys and values in one product: [rows, dim] to [rows, 3, heads, head_dim]."""
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, torch.zeros_like(self.q_proj.bias), self.v_proj.bias])
        return F.linear(z, weight, bias).view(z.shape[0], 3, self.heads, self.head_dim)


class GeGLU(nn.Module):
    """gelu(W0 z) * (W1 z), Shazeer, arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(dim, hidden, bias=False)
        self.wi_1 = nn.Linear(dim, hidden, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return F.gelu(self.wi_0(z)) * self.wi_1(z)


def normalized(x: Tensor, norm: nn.LayerNorm, branch: Branch | None = None) -> Tensor:
    """LayerNorm of packed rows by the parameters of a module; with a branch, of the rows that it computes."""
    index = {} if branch is None or branch.rows is None else {"rows": branch.rows, "offsets": branch.plan.offsets}
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, **index)


def feed_forward(config: TransformerConfig) -> nn.Sequential:
    """One modality's FFN; the identity keeps upstream's numbering: GeGLU 0, Sub-LayerNorm 2, output projection 3."""
    norm = nn.LayerNorm(config.ffn_embed_dim) if config.ffn_layer_norm else nn.Identity()
    return nn.Sequential(
        GeGLU(config.embed_dim, config.ffn_embed_dim),
        nn.Identity(),
        norm,
        nn.Linear(config.ffn_embed_dim, config.embed_dim),
    )


def _arrival(branch: Branch, dropout: float, seed: Tensor | None) -> dict[str, Tensor | float | None]:
    """How a branch's rows come back into the residual stream: the keyword arguments of ``residual``."""
    # Where rows are skipped, the branch's plan marks those behind its last as inert.
    offsets = None if branch.rows is None else branch.plan.offsets
    return {
        "keep": branch.keep, "sample": branch.sample, "rows": branch.rows, "offsets": offsets,
        "dropout": dropout, "seed": seed,
    }  # fmt: skip


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
            self.add_module(f"{modality}_ffn", feed_forward(config))
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale is not None:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), config.layer_scale)) for _ in range(2))

    def ffn(self, modality: str) -> nn.Sequential:
        """The FFN of a modality."""
        return self.get_submodule(f"{modality}_ffn")

    def forward(
        self,
        x: Tensor,
        route: RoutePlan | Branches | Spans,
        bias: Sequence[Tensor] | Tensor | None,
        keep: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """One layer over packed rows [C, dim], or over a padded batch [length, batch, dim]; the same shape comes out.

        Args:
            x: the tokens.
            route: the plan of packed rows, or with DropPath what each branch computes of them; or the spans of a padded
                sequence.
            bias: the modalities' expanded vectors, or the dense bias [batch, heads, length, length].
            keep: float32 [2, S], DropPath's factors of the two branches of a padded batch.
            seeds: int64 [2], dropout's seeds of the two branches of packed rows.
        """
        if isinstance(route, RoutePlan):
            route = Branches(Branch(route), Branch(route))
        if isinstance(route, Branches):
            require(
                keep is None, "keep: got factors with packed rows, takes them in route: branches(plan.with_keep(...))"
            )
            return self.packed(x, *route, bias, seeds)
        return encode_layer(self, x, bias, route, keep, self.dropout if self.training else 0.0)

    def packed(
        self, x: Tensor, attend: Branch, feed_forward: Branch, bias: Sequence[Tensor], seeds: Tensor | None
    ) -> Tensor:
        """The layer over packed rows, by the ops; each branch computes the rows that it keeps."""
        attention, plan = self.self_attn, attend.plan
        seeds = (None, None) if seeds is None else seeds
        dropout = 0.0 if seeds[0] is None else self.dropout

        attended = relative_bias_attention(
            attention.project(normalized(x, self.self_attn_layer_norm, attend)),
            cu_seqlens=plan.cu_seqlens,
            modality=plan.modality,
            code=plan.code,
            is_cls=plan.is_cls,
            bias=bias,
            code_offsets=plan.code_offsets if bias else (),
            head_scale=attention.c_attn,
            max_length=plan.max_length,
        ).flatten(1)
        if attention.ln is not None:
            attended = normalized(attended, attention.ln)
        attended = attention.out_proj(attended)
        if self.attn_ln is not None:
            attended = normalized(attended, self.attn_ln)

        norm = self.final_layer_norm
        arrive = _arrival(attend, dropout, seeds[0])
        if feed_forward.rows is None:
            x, z = residual_layer_norm(x, attended, self.gamma_1, norm.weight, norm.bias, eps=norm.eps, **arrive)
        else:
            x = residual(x, attended, self.gamma_1, **arrive)
            z = normalized(x, norm, feed_forward)
        if dropout:
            y = self.route(z, feed_forward.plan)
            return residual(x, y, self.gamma_2, **_arrival(feed_forward, dropout, seeds[1]))
        return self.route(
            z, feed_forward.plan, residual=x, gamma=self.gamma_2, keep=feed_forward.keep, sample=feed_forward.sample,
            rows=feed_forward.rows,
        )  # fmt: skip

    def route(self, z: Tensor, plan: RoutePlan, **settings: Tensor | str | None) -> Tensor:
        """Every row through the FFN of its modality; ``settings`` are further arguments of ``routed_ffn``."""
        experts = [self.ffn(modality) for modality in plan.modalities]
        has_norm = isinstance(experts[0][2], nn.LayerNorm)
        return routed_ffn(
            z,
            [expert[0].wi_0.weight for expert in experts],
            [expert[0].wi_1.weight for expert in experts],
            [expert[3].weight for expert in experts],
            [expert[3].bias for expert in experts],
            offsets=plan.offsets,
            row_counts=plan.row_counts,
            norm_weight=[expert[2].weight for expert in experts] if has_norm else None,
            norm_bias=[expert[2].bias for expert in experts] if has_norm else None,
            eps=experts[0][2].eps if has_norm else 1e-5,
            **settings,
        )


class Transformer(nn.Module):
    """The stack of layers and the final LayerNorm of each modality."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        for modality in config.modalities:
            self.add_module(f"{modality}_layer_norm", nn.LayerNorm(config.embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    @property
    def drop_path_rates(self) -> list[float]:
        """DropPath's probability of each layer, growing linearly from 0 to the configured rate."""
        last = max(len(self.layers) - 1, 1)
        return [self.config.drop_path_rate * layer / last for layer in range(len(self.layers))]

    def final_norm(self, modality: str) -> nn.LayerNorm:
        """The final LayerNorm of a modality."""
        return self.get_submodule(f"{modality}_layer_norm")

    def draw_seeds(self, device: torch.device) -> Tensor | None:
        """Seeds of dropout, int64 [layers, 2], or None where there is no dropout."""
        if not (self.training and self.config.dropout):
            return None
        return torch.randint(2**62, (len(self.layers), 2), device=device)

    def forward(self, x: Tensor, plan: RoutePlan, bias: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """Packed rows [C, dim] through all layers and the final norms.

        Args:
            x: floating point [C, dim], ``plan.pack`` of the embedded tokens.
            plan: the route plan; its ``keep`` holds DropPath's factors, None for none.
            bias: per table (one for the stack or one per layer), the modalities' vectors [heads, entries].
        """
        seeds = self.draw_seeds(x.device)
        routes = [plan] * len(self.layers) if plan.keep is None else branches(plan)
        for i, layer in enumerate(self.layers):
            tables = bias[i if len(bias) > 1 else 0] if bias else ()
            arguments = (x, routes[i], tables, None, None if seeds is None else seeds[i])
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        norms = [self.final_norm(modality) for modality in plan.modalities]
        return layer_norm(
            x,
            [norm.weight for norm in norms],
            [norm.bias for norm in norms],
            offsets=plan.offsets,
            row_counts=plan.row_counts,
            eps=norms[0].eps,
        )
