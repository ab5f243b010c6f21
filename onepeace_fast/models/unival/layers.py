"""The layers of UnIVAL's encoder and decoder: parameters under upstream's names, over packed or padded tokens.

    x <- x + LN_attn( Wo( c * Attention(LN_1(x)) ) )
    x <- x + W2 LN_ffn( gelu(W1 LN_2(x)) )

and between them in the decoder the same as the first with the encoder's tokens as keys (arXiv 2307.16184; the norms
behind attention and inside the FFN are NormFormer's, arXiv 2110.09456, as in OFA, arXiv 2202.03052).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.attention_structures import Segments
from onepeace_fast.layers.norms import normalized
from onepeace_fast.layers.plain import are_plain, calls_modules
from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.noise import Noise
from onepeace_fast.ops import gated_sub_ln, relative_bias_attention, residual, residual_layer_norm

QUIET = Noise()


class Route(Protocol):
    """How queries attend to keys and values, which come projected, and with the head scale of a layer."""

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, head_scale: Tensor) -> Tensor:
        """The joined heads of each query, before the output projection."""


class PackedRoute(NamedTuple):
    """Attention over packed rows, whose bias has two parts.

    That of places, s <p_q, p_k>, is a product as q k is, with the same scale s: p stands behind q and behind k. Heads
    of queries and keys are twice as wide as those of values, and there is no bias of all pairs. That of distances is in
    code form, one vector for each modality.
    """

    query_places: Tensor  # [rows, heads, head_dim]
    key_places: Tensor  # [key rows, heads, head_dim]
    segments: Segments
    keys: Segments | None  # of other tokens
    vectors: tuple[Tensor, ...] = ()  # [heads, entries] of each modality
    code_offsets: tuple[int, ...] = ()

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, head_scale: Tensor) -> Tensor:
        """Packed rows [rows, dim] of queries, and [key rows, dim] of keys and values."""
        assert k is not None and v is not None
        q, k, v = (x.unflatten(1, self.query_places.shape[1:]) for x in (q, k, v))
        own = self.segments
        return relative_bias_attention(
            (torch.cat([q, self.query_places], 2), torch.cat([k, self.key_places], 2), v),
            cu_seqlens=own.cu_seqlens, modality=own.modality, code=own.code, is_cls=own.is_cls, order=own.order,
            keys=self.keys, bias=self.vectors, code_offsets=self.code_offsets, head_scale=head_scale,
            max_length=own.max_length,
        ).flatten(1)  # fmt: skip


class PaddedRoute(NamedTuple):
    """Attention over padded batches by the bias of all pairs, minus infinity where a key is hidden."""

    bias: Tensor  # [batch, heads, queries, keys]
    dropout: float = 0.0  # of probabilities

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, head_scale: Tensor) -> Tensor:
        """[batch, queries, dim], and [batch, keys, dim] twice."""
        assert k is not None and v is not None
        q, k, v = (x.unflatten(2, (head_scale.shape[0], -1)).transpose(1, 2) for x in (q, k, v))
        score = (q * (2 * q.shape[-1]) ** -0.5) @ k.transpose(-1, -2) + self.bias
        weights = score.softmax(-1, dtype=torch.promote_types(torch.float32, score.dtype)).to(v.dtype)
        weights = F.dropout(weights, self.dropout) if self.dropout else weights
        return (weights @ v * head_scale[:, None, None]).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projections and head scale."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.c_attn = nn.Parameter(torch.ones(config.attention_heads))

    def forward(self, x: Tensor, keys: Tensor | None, route: Route) -> Tensor:
        """Attention of normalised tokens to ``keys``, packed or padded; None where the route has kept them."""
        k, v = (None, None) if keys is None else (self.k_proj(keys), self.v_proj(keys))
        return self.out_proj(route.attend(self.q_proj(x), k, v, self.c_attn))


class Layer(nn.Module):
    """What encoder and decoder layers share: attention behind a norm, and the FFN."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, config.ffn_dim), nn.Linear(config.ffn_dim, dim)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def _ffn(self, x: Tensor, packed: bool, dropout: float) -> Tensor:
        """W2 LN(gelu(W1 x)), without the norm before it; W1 has a bias, so that one op is between the two products."""
        u, norm = self.fc1(x), self.ffn_layernorm
        if packed and not (dropout or calls_modules(u)) and are_plain("LayerNorm", (norm,), nn.LayerNorm):
            rows = u.shape[0]
            offsets = torch.arange(2, dtype=torch.int32, device=u.device) * rows
            h = gated_sub_ln(u, None, [norm.weight], [norm.bias], offsets=offsets, row_counts=(rows,), eps=norm.eps)
        else:
            h = F.gelu(u)
            h = norm(F.dropout(h, dropout) if dropout else h)
        return self.fc2(h)

    def _add_ffn(self, x: Tensor, z: Tensor, packed: bool, noise: Noise, branch: int) -> Tensor:
        y = self._ffn(z, packed, noise.activation_dropout)
        if packed and not calls_modules(x):
            return residual(x, y, None, **noise.of_op(branch))
        return x + noise.on(y, branch)


def add_and_norm(
    x: Tensor, attended: Tensor, behind: nn.LayerNorm, following: nn.LayerNorm, noise: Noise, branch: int
) -> tuple[Tensor, Tensor]:
    """x + keep * dropout(LN_behind(attended)) over packed rows, and its norm for the next branch."""
    if calls_modules(x) or not are_plain("LayerNorm", (behind, following), nn.LayerNorm):
        x = x + noise.on(behind(attended), branch)
        return x, following(x)
    y = normalized(attended, behind)
    return residual_layer_norm(x, y, None, following.weight, following.bias, eps=following.eps, **noise.of_op(branch))


class EncoderLayer(Layer):
    """One layer of the encoder."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__(config)
        self.attn_ln = nn.LayerNorm(config.embed_dim)

    def forward(self, x: Tensor, route: Route, noise: Noise = QUIET) -> Tensor:
        """Packed rows [rows, dim], or a padded batch [batch, length, dim]; the same shape."""
        if isinstance(route, PaddedRoute):
            z = self.self_attn_layer_norm(x)
            x = x + noise.on(self.attn_ln(self.self_attn(z, z, route)), 0)
            return self._add_ffn(x, self.final_layer_norm(x), False, noise, 1)
        z = normalized(x, self.self_attn_layer_norm)
        x, z = add_and_norm(x, self.self_attn(z, z, route), self.attn_ln, self.final_layer_norm, noise, 0)
        return self._add_ffn(x, z, True, noise, 1)


class DecoderLayer(Layer):
    """One layer of the decoder; it normalises queries of the encoder's tokens, not these tokens."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.self_attn_ln, self.cross_attn_ln = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.encoder_attn, self.encoder_attn_layer_norm = Attention(config), nn.LayerNorm(dim)

    def forward(self, x: Tensor, encoded: Tensor | None, own: Route, cross: Route, noise: Noise = QUIET) -> Tensor:
        """As ``EncoderLayer``; ``encoded`` is the encoder's output, packed or padded as x is; None where it is kept."""
        if isinstance(own, PaddedRoute):
            z = self.self_attn_layer_norm(x)
            x = x + noise.on(self.self_attn_ln(self.self_attn(z, z, own)), 0)
            z = self.encoder_attn_layer_norm(x)
            x = x + noise.on(self.cross_attn_ln(self.encoder_attn(z, encoded, cross)), 1)
            return self._add_ffn(x, self.final_layer_norm(x), False, noise, 2)
        z = normalized(x, self.self_attn_layer_norm)
        x, z = add_and_norm(x, self.self_attn(z, z, own), self.self_attn_ln, self.encoder_attn_layer_norm, noise, 0)
        attended = self.encoder_attn(z, encoded, cross)
        x, z = add_and_norm(x, attended, self.cross_attn_ln, self.final_layer_norm, noise, 1)
        return self._add_ffn(x, z, True, noise, 2)
