"""EVA's vision transformer under upstream's names, over frames of one size.

    x <- x + drop_path Wo Attention(LN_1(x)),   x <- x + drop_path' FFN(LN_2(x))

EVA-01 (arXiv 2211.07636) has biases of queries and values, not of keys, and the FFN W2 gelu(W1 x). EVA-02 (arXiv
2303.11331) rotates queries and keys of patches by their row and column, has a norm before Wo, and the FFN
W3 LN(silu(W1 x) * (W2 x)). Images, frames of videos, spectrograms and maps of depth or normals are all frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.attention_structures import Segments, equal_segments
from onepeace_fast.backend import check_backend, resolve_backend
from onepeace_fast.checks import describe, require
from onepeace_fast.drop_path import draw_drop_path
from onepeace_fast.layers.derived import DerivedBuffers
from onepeace_fast.layers.norms import normalized
from onepeace_fast.layers.parameters import with_unread
from onepeace_fast.models.mico import state
from onepeace_fast.models.mico.config import EPS, EvaConfig
from onepeace_fast.models.mico.layers import (
    DropPath,
    activated,
    add,
    add_and_norm,
    attend,
    attend_padded,
)

ROPE_BASE = 10000


def rope_angles(config: EvaConfig) -> Tensor:
    """Of each patch, float32 [patches, head_width]: by its row in the first half, by its column in the second.

    Each half has head_width / 4 frequencies, and a pair of entries shares one (RoFormer, arXiv 2104.09864).
    """
    half, grid = config.head_width // 2, config.grid
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the process's defaults are
    frequency = 1.0 / ROPE_BASE ** (torch.arange(0, half, 2, **on_cpu) / half)
    along = (torch.arange(grid, **on_cpu) / grid * config.rope_grid)[:, None] * frequency
    along = along.repeat_interleave(2, 1)
    by_row = along[:, None].expand(grid, grid, half)
    return torch.cat([by_row, along.expand(grid, grid, half)], 2).flatten(0, 1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[frames, tokens, heads, head_width], of which the first token of each frame, CLS, stays."""
    patches = x[:, 1:]
    turned = torch.stack([-patches[..., 1::2], patches[..., 0::2]], -1).flatten(-2)
    return torch.cat([x[:, :1], patches * cos[:, None] + turned * sin[:, None]], 1)


class EvaAttention(nn.Module):
    """Attention inside each frame; one matrix of queries, keys and values, or with Sub-LayerNorm three."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        if config.sub_layer_norm:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
            self.inner_attn_ln = nn.LayerNorm(width, EPS)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def _projected(self, x: Tensor) -> list[Tensor]:
        apart = self.config.sub_layer_norm
        q, k, v = (self.q_proj(x), self.k_proj(x), self.v_proj(x)) if apart else self.qkv(x).chunk(3, -1)
        return [q + self.q_bias.to(q.dtype), k, v + self.v_bias.to(v.dtype)]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments | None) -> Tensor:
        """Packed rows [rows, width] with segments, or [frames, tokens, width]; the same shape."""
        sizes = (self.config.heads, self.config.head_width)
        q, k, v = (part.unflatten(-1, sizes) for part in self._projected(x))
        if rope is not None:
            shape = (-1, self.config.tokens, *sizes)
            q, k = (_rotated(part.reshape(shape), *rope).to(v.dtype).view(v.shape) for part in (q, k))
        if segments is None:
            out = attend_padded(q, k, v)
            return self.proj(self.inner_attn_ln(out) if self.config.sub_layer_norm else out)
        # A head of 88 stays one: the kernels fill it with zeros, and the scale is that of 88.
        out = attend(q, k, v, segments, scale=self.config.head_width**-0.5)
        return self.proj(normalized(out, self.inner_attn_ln) if self.config.sub_layer_norm else out)


class EvaMlp(nn.Module):
    """W2 gelu(W1 x), with a norm before W2 where there is Sub-LayerNorm."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.width, config.ffn_dim), nn.Linear(config.ffn_dim, config.width)
        # Of all of upstream's norms this one alone has torch's own epsilon.
        self.ffn_ln = nn.LayerNorm(config.ffn_dim) if config.sub_layer_norm else None

    def forward(self, x: Tensor, packed: bool) -> Tensor:
        """[..., width]."""
        return self.fc2(activated(self.fc1(x), None, self.ffn_ln, "gelu", packed))


class EvaSwiGLU(nn.Module):
    """W3 LN(silu(W1 x) * (W2 x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(config.width, config.ffn_dim) for _ in range(2))
        self.w3 = nn.Linear(config.ffn_dim, config.width)
        self.ffn_ln = nn.LayerNorm(config.ffn_dim, EPS) if config.sub_layer_norm else None

    def forward(self, x: Tensor, packed: bool) -> Tensor:
        """[..., width]."""
        return self.w3(activated(self.w1(x), self.w2(x), self.ffn_ln, "silu", packed))


class EvaBlock(nn.Module):
    """Attention and FFN, each behind a norm."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width, EPS), nn.LayerNorm(config.width, EPS)
        self.attn = EvaAttention(config)
        self.mlp = EvaSwiGLU(config) if config.swiglu else EvaMlp(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments | None,
        drop_path: tuple[DropPath | None, DropPath | None] = (None, None),
    ) -> Tensor:  # fmt: skip
        """Packed rows with segments, or [frames, tokens, width]; the same shape."""
        packed = segments is not None
        z = normalized(x, self.norm1) if packed else self.norm1(x)
        x, z = add_and_norm(x, self.attn(z, rope, segments), self.norm2, packed, drop_path[0])
        return add(x, self.mlp(z, packed), packed, drop_path[1])


class PatchEmbed(nn.Module):
    """Each patch of a frame through one matrix."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        """[frames, 3, side, side] to [frames, patches, width], row by row."""
        return self.proj(frames).flatten(2).transpose(1, 2)


class EvaEncoder(DerivedBuffers):
    """EVA's vision transformer.

    Args:
        config: sizes.
        backend: "reference" (as upstream computes it), "fused" (packed rows by the ops), or None: automatic, by device.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: EvaConfig, backend: str | None = None) -> None:
        super().__init__()
        if backend is not None:
            check_backend(backend)
        self.config, self.backend = config, backend
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, EPS)
        self.head = nn.Linear(config.width, config.output_dim)
        if config.rope:
            self.add_derived("rope_cos", partial(_table, config, torch.cos))
            self.add_derived("rope_sin", partial(_table, config, torch.sin))
        with torch.no_grad():
            self._init_as_upstream()

    def _init_as_upstream(self) -> None:
        """Normal of deviation 0.02, biases zero; what a block adds shrinks with its depth, and so does the head."""
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        blocks: Any = self.blocks
        shrunk = {self.head: 0.001}
        for depth, block in enumerate(blocks, 1):
            last = block.mlp.w3 if self.config.swiglu else block.mlp.fc2
            shrunk |= {linear: (2 * depth) ** -0.5 for linear in (block.attn.proj, last)}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02 * shrunk.get(module, 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def check(self, name: str, frames: object) -> None:
        """Raise ValueError unless these are frames [..., 3, side, side] of this encoder's size."""
        side = self.config.image_size
        fits = isinstance(frames, Tensor) and frames.is_floating_point() and frames.dim() > 3
        require(
            fits and frames.shape[-3:] == (3, side, side),  # type: ignore[attr-defined]
            lambda: f"{name}: expected floating point frames [..., 3, {side}, {side}], got {describe(frames)}",
        )

    def forward(self, frames: Tensor) -> Tensor:
        """The tokens of each frame behind the last norm, CLS first.

        Args:
            frames: floating point [..., 3, side, side], cast to the weights' dtype.

        Returns:
            [..., tokens, width].

        Raises:
            ValueError: frames of another size.
        """
        self.check("frames", frames)
        shape = frames.shape[:-3]
        x = self.patch_embed(frames.flatten(0, -4).to(self.pos_embed.dtype))
        count, tokens = x.shape[0], self.config.tokens
        x = torch.cat([self.cls_token.to(x.dtype).expand(count, -1, -1), x], 1) + self.pos_embed
        packed = resolve_backend(self.backend, frames.device) == "fused" and count > 0
        x = x.flatten(0, 1) if packed else x
        segments = equal_segments(count, x.new_zeros(tokens, dtype=torch.int32)) if packed else None
        rope = (self.rope_cos, self.rope_sin) if self.config.rope else None
        for block, drop_path in zip(self.blocks, self._drop_path(count, x.device), strict=True):
            x = block(x, rope, segments, drop_path)
        x = normalized(x, self.norm) if packed else self.norm(x)
        # The head is CLIP's: who reads the tokens alone does not train it.
        return with_unread(x.view(*shape, tokens, self.config.width), *self.head.parameters())

    def _drop_path(self, count: int, device: torch.device) -> list[tuple[DropPath | None, DropPath | None]]:
        """Of both branches of each block, by frame."""
        layers, rate = self.config.layers, self.config.drop_path_rate
        if not (self.training and rate):
            return [(None, None)] * layers
        rates = torch.linspace(0, rate, layers, dtype=torch.float64, device="cpu").tolist()
        factors = draw_drop_path(rates, count).to(device)
        sample = torch.arange(count, device=device).repeat_interleave(self.config.tokens)
        return [(DropPath(one[0], sample), DropPath(one[1], sample)) for one in factors]

    def carried(self) -> dict[str, Tensor]:
        """Buffers of upstream's state dict; its attentions share the module that has the angles."""
        if not self.config.rope:
            return {}
        places = ["rope", *(f"blocks.{i}.attn.rope" for i in range(self.config.layers))]
        tables = {"freqs_cos": _table(self.config, torch.cos), "freqs_sin": _table(self.config, torch.sin)}
        return {f"{place}.{name}": table for place in places for name, table in tables.items()}

    def clip_features(self, tokens: Tensor) -> Tensor:
        """EVA-CLIP's features of what ``forward`` gives: [..., tokens, width] to [..., output_dim]."""
        return self.head(tokens[..., 0, :])

    def load_upstream_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load upstream's state dict; strict, and nothing is changed unless everything fits.

        Raises:
            ValueError: missing, unexpected or misshaped keys, all of them listed, or a buffer with other values.
        """
        state.load(self, state_dict)

    def to_upstream_state_dict(self, grads: bool = False) -> dict[str, Tensor | None]:
        """Parameters, or with ``grads`` their gradients (None where there is none), under upstream's names."""
        return state.state_dict(self, grads)


def _table(config: EvaConfig, function: Any) -> Tensor:
    with torch.device("cpu"):
        return function(rope_angles(config))
