"""A decoder's attention without a bias: causal over texts, or from texts to what an encoder made of sounds.

Every way gets q, k and v in the layout that it reads best, so that no copy counts but its own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support import shapes
from benchmarks.support.relative_bias_attention import FLASH
from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import MAX_AUTOTUNE, Factory, Variant, compiled, trained
from onepeace_fast import RoutePlan, relative_bias_attention

Batch = tuple[Shape, Shape | None]  # of queries, and of keys where they are others


def full_batches() -> list[Batch]:
    """Captions of a decoder over themselves, and over sounds."""
    captions = {"text": shapes.text(64)}
    long = {"text": shapes.text(16, 512, 1022)}
    return [
        (Shape("causal, 64 x up to 72", captions), None),
        (Shape("causal, 16 x up to 1024", long), None),
        (
            Shape("64 captions, keys of sounds", captions),
            Shape("64 x up to 750", {"audio": shapes.audio(64)}),
        ),
    ]


def small_batches() -> list[Batch]:
    """The same for a CPU."""
    captions = {"text": shapes.text(8)}
    return [
        (Shape("causal, 8 texts", captions), None),
        (Shape("8 captions, keys of sounds", captions), Shape("8 sounds", {"audio": shapes.audio(8, 20, 150)})),
    ]


class DecoderAttentionCase:
    """Queries, keys and values of a batch as packed rows, and gradients of the output."""

    def __init__(self, batch: Batch, sizes: Sizes, device: torch.device, dtype: torch.dtype, sets: int) -> None:
        texts, encoded = batch
        self.plan = RoutePlan.from_lengths(dict(texts.lengths)).to(device)
        self.keys = self.plan if encoded is None else RoutePlan.from_lengths(dict(encoded.lengths)).to(device)
        self.heads, self.is_causal = sizes.heads, encoded is None
        size = (sizes.heads, sizes.width // sizes.heads)
        rows = [plan.capacity for plan in (self.plan, self.keys, self.keys)]
        self.sets = [tuple(torch.randn(n, *size, device=device).to(dtype) for n in rows) for _ in range(sets)]
        self.gradients = [torch.randn(rows[0], *size, device=device).to(dtype) for _ in range(sets)]
        self.lengths = [torch.tensor(*shape.lengths.values(), device=device) for shape in (texts, encoded or texts)]

    def factories(self) -> dict[str, Factory]:
        """The reference first, with which outputs and gradients are compared."""
        return {
            "reference": self.reference,
            "reference_compiled": compiled(lambda: self.reference(mode="default")),
            "reference_max_autotune": compiled(lambda: self.reference(mode=MAX_AUTOTUNE)),
            "sdpa": self.sdpa,
            **{f"{name}_no_bias": functools.partial(self.flash_attention, module) for name, module in FLASH.items()},
            "fused": self.fused,
        }

    def fused(self) -> Variant:
        """The library's operation on packed rows."""
        order = self.plan.causal_order() if self.is_causal else None
        given = self.plan.segments._asdict() | {"order": order}
        keys = None if self.is_causal else self.keys.segments

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return relative_bias_attention((q, k, v), **given, keys=keys, bias=(), code_offsets=())

        return self._described(trained(run, self._leaves(lambda rows, _: rows), self.gradients, []))

    def reference(self, **compile_how: Any) -> Variant:
        """Plain PyTorch over padded samples: products, a mask, softmax in float32."""
        hidden = ~self._sees()

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).masked_fill(hidden, -torch.inf)
            wide = torch.promote_types(torch.float32, scores.dtype)
            return torch.matmul(F.softmax(scores, dim=-1, dtype=wide).type_as(v), v).transpose(1, 2)

        return self._padded(torch.compile(run, dynamic=False, **compile_how) if compile_how else run)

    def sdpa(self) -> Variant:
        """PyTorch's attention over padded samples, with ``is_causal`` or a mask of the keys."""
        mask = None if self.is_causal else self._sees()

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            # Padding stands behind a text, where no real token sees it.
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.is_causal).transpose(1, 2)

        return self._padded(run)

    def flash_attention(self, module: str) -> Variant:
        """flash-attn over packed samples."""
        attention = importlib.import_module(module).flash_attn_varlen_func
        bounds = [F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in self.lengths]
        longest = [int(lengths.max()) for lengths in self.lengths]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attention(
                q, k, v, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], max_seqlen_q=longest[0],
                max_seqlen_k=longest[1], causal=self.is_causal,
            )  # fmt: skip
            return out[0] if isinstance(out, tuple) else out  # later ones may return the row sums' logarithms too

        return self._described(trained(run, self._leaves(lambda rows, _: rows), self.gradients, []))

    def _sees(self) -> Tensor:
        """bool [samples or 1, 1, queries, keys]: whether a query sees a key."""
        queries, keys = (int(lengths.max()) for lengths in self.lengths)
        places = torch.arange(keys, device=self.lengths[0].device)
        if self.is_causal:
            return (places <= places[:, None])[None, None]
        return (places < self.lengths[1][:, None])[:, None, None].expand(-1, 1, queries, -1)

    def _padded(self, function: Callable[..., Tensor]) -> Variant:
        """A variant of a function of q, k and v [samples, length, heads, head_dim]."""
        gradients = [self._pad(gradient, self.plan) for gradient in self.gradients]
        variant = self._described(trained(function, self._leaves(self._pad), gradients, []))
        variant.rows = variant.gradient_rows = self._rows
        return variant

    def _leaves(self, turn: Callable[[Tensor, RoutePlan], Tensor]) -> list[tuple[Tensor, ...]]:
        plans = (self.plan, self.keys, self.keys)
        return [
            tuple(turn(x, plan).clone().requires_grad_() for x, plan in zip(given, plans, strict=True))
            for given in self.sets
        ]

    @staticmethod
    def _pad(rows: Tensor, plan: RoutePlan) -> Tensor:
        (padded,) = plan.unpack(rows.flatten(1)).values()
        return padded.unflatten(-1, rows.shape[1:])

    def _rows(self, padded: Tensor) -> Tensor:
        plan = self.plan if padded.shape[1] == int(self.lengths[0].max()) else self.keys
        return plan.pack({plan.modalities[0]: padded.flatten(2)}).unflatten(-1, padded.shape[2:])

    def _described(self, variant: Variant) -> Variant:
        variant.gradients_compared = 3
        variant.rows = variant.gradient_rows = lambda rows: rows
        variant.slices = [(slice(None), head) for head in range(self.heads)]
        return variant


def described(batch: Batch) -> Mapping[str, Any]:
    """What a section's record says of it."""
    _, encoded = batch
    return {"keys": dict(encoded.lengths)} if encoded else {"order": "causal"}
