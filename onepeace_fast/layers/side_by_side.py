"""Attention over packed rows by plain PyTorch: on a CPU, where few pairs of tokens see each other, it beats the op.

The samples stand side by side as in the op's reference. All layers share the bias of their pairs, made once a forward
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.attention_structures import AttentionInputs, BiasVectors, KeySegments
from onepeace_fast.layers.reference import Spans, plan_spans
from onepeace_fast.ops.attention_arguments import check_arguments
from onepeace_fast.ops.operation import is_untransformed
from onepeace_fast.ops.packed_rows import accumulation_dtype
from onepeace_fast.ops.pair_bias import Batch, SideBySide, side_by_side
from onepeace_fast.ops.relative_bias_attention import attend, scores
from onepeace_fast.route_plan import RoutePlan


class DenseRoute(NamedTuple):
    """A plan, its spans, and its samples side by side with one table's bias of all pairs."""

    plan: RoutePlan
    spans: Spans
    samples: SideBySide

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, head_scale: Tensor | None) -> Tensor:
        """Attention of every sample over its own tokens: packed rows [C, dim] in and out."""
        rows, places, sizes, added = self.samples
        counts = [samples * length for samples, length in sizes]
        # By an embedding, whose gradient takes less time than that of index_select.
        parts = [(x if rows is None else F.embedding(rows, x)).split(counts) for x in (q, k, v)]
        out = torch.cat([
            _attend((samples, length, heads, -1), qkv, bias)
            for (samples, length), bias, *qkv in zip(sizes, added, *parts, strict=True)
        ])  # fmt: skip
        if places is not None:
            out = F.embedding(places, out)
        return out if head_scale is None else (out.unflatten(1, (heads, -1)) * head_scale[:, None]).flatten(1)


LayerRoute: TypeAlias = RoutePlan | DenseRoute | Spans


def _attend(size: tuple[int, int, int, int], qkv: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Attention of a group of [samples, length, heads, head_dim], rows in and out; softmax in at least float32."""
    dtype = accumulation_dtype(qkv[0].dtype)
    q, k, v = (x.view(size).transpose(1, 2).to(dtype) for x in qkv)
    scale = q.shape[-1] ** -0.5
    if torch.is_grad_enabled():  # the other has no gradient of the bias
        attended = torch.matmul(scores(q, k, bias, scale).softmax(-1), v)
    else:
        attended, _ = attend(q, k, v, bias, scale)
    return attended.transpose(1, 2).flatten(2).flatten(0, 1).to(qkv[0].dtype)


def dense_routes(
    plan: RoutePlan, x: Tensor, heads: int, tables: Sequence[Sequence[Tensor] | Tensor]
) -> list[DenseRoute]:
    """A route for each table of the modalities' vectors; none where the op is to run."""
    spans = plan_spans(plan)
    if not (spans and x.shape[0] and is_untransformed((x,))):
        return []
    segments, rows, count = plan.segments, x.unflatten(1, (heads, -1)), x.shape[0]
    found = []
    for vectors in tables or ((),):
        bias = BiasVectors([*vectors], plan.code_offsets if vectors else ())
        check_arguments(AttentionInputs(None, rows, rows, rows, segments, KeySegments(), bias, None, 1.0))
        samples = side_by_side(bias, Batch(segments, segments, count, count), accumulation_dtype(x.dtype))
        if samples is None:
            return []
        found.append(DenseRoute(plan, spans, samples))
    return found
