"""The ops and the bias tables, written the obvious way: loops over samples, dense biases, plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from support.plans import Layout, Token


def layer_norm(
    x: Tensor, counts: Sequence[int], weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], eps: float
) -> Tensor:
    """One ``F.layer_norm`` per group of rows; rows past the groups are zero."""
    parts, start = [], 0
    for count, weight, bias in zip(counts, weights, biases, strict=True):
        parts.append(F.layer_norm(x[start : start + count], x.shape[1:], weight, bias, eps))
        start += count
    return torch.cat([*parts, torch.zeros_like(x[start:])])


def residual(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    sample: Tensor | None,
    factor: Tensor | None = None,
) -> Tensor:
    """x + drop_path * gamma * dropout(y), row by row; ``factor`` is dropout's."""
    rows, samples = [], None if drop_path is None else sample.tolist()
    for i in range(x.shape[0]):
        branch = y[i] if factor is None else y[i] * factor[i].to(y.dtype)
        branch = branch if gamma is None else gamma * branch
        rows.append(x[i] + (branch if drop_path is None else drop_path[samples[i]].to(branch.dtype) * branch))
    return torch.stack(rows).to(x.dtype) if rows else (x + (y if gamma is None else gamma * y)).to(x.dtype)


def gated_sub_ln(
    u: Tensor,
    v: Tensor | None,
    counts: Sequence[int],
    norms: Sequence[tuple[Tensor, Tensor]],
    activation: str = "gelu",
    eps: float = 1e-5,
) -> Tensor:
    """activation(u) * v, and one ``F.layer_norm`` per modality if there are norms; rows past them are zero."""
    h = ACTIVATIONS[activation](u)
    h = h if v is None else h * v
    if not norms:
        return torch.cat([h[: sum(counts)], torch.zeros_like(h[sum(counts) :])])
    weights, biases = ([norm[i].to(h.dtype) for norm in norms] for i in range(2))
    return layer_norm(h, counts, weights, biases, eps)


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"), "silu": F.silu, "relu": F.relu}


def feed_forward(
    z: Tensor, w0: Tensor, w1: Tensor | None, w2: Tensor, b2: Tensor | None, norm: tuple[Tensor, Tensor] | None,
    eps: float, activation: str = "gelu",
) -> Tensor:  # fmt: skip
    """The gated network with Sub-LayerNorm of one modality; without W1 there is no gate."""
    hidden = ACTIVATIONS[activation](F.linear(z, w0))
    if w1 is not None:
        hidden = hidden * F.linear(z, w1)
    if norm is not None:
        hidden = F.layer_norm(hidden, hidden.shape[-1:], norm[0].to(hidden.dtype), norm[1].to(hidden.dtype), eps)
    return F.linear(hidden, w2, b2)


def attention(
    qkv: Tensor,
    layout: Layout,
    tables: Sequence[Tensor],
    table_row: Sequence[Callable[[Token, Token], int]],
    head_scale: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """Every sample and head on its own, with a dense [length, length] bias; inert rows are zero."""
    out = 0 * qkv[:, 0]
    for rows, head, score in scores(qkv, layout, tables, table_row, scale):
        v = qkv[rows, 2, head]
        wide = torch.promote_types(torch.float32, score.dtype)
        attended = score.softmax(-1, dtype=wide).to(v.dtype) @ v
        out[rows, head] = attended if head_scale is None else head_scale[head] * attended
    return out


def scores(
    qkv: Tensor,
    layout: Layout,
    tables: Sequence[Tensor],
    table_row: Sequence[Callable[[Token, Token], int]],
    scale: float | None,
) -> Iterator[tuple[list[int], int, Tensor]]:
    """The rows of each sample, each head, and its scores [queries, keys]."""
    _, _, heads, head_dim = qkv.shape
    scale = head_dim**-0.5 if scale is None else scale
    for sample in range(layout.samples):
        rows = layout.rows_of(sample)
        if not rows:
            continue
        bias = torch.zeros(len(rows), len(rows), heads, dtype=qkv.dtype)
        start = 0
        for m, table in enumerate(tables):
            segment = [layout.tokens[row] for row in layout.rows_of(sample, m)]
            index = torch.tensor([[table_row[m](i, j) for j in segment] for i in segment], dtype=torch.int64)
            if segment:
                bias[start : start + len(segment), start : start + len(segment)] = table[index].to(qkv.dtype)
            start += len(segment)
        for head in range(heads):
            q, k = qkv[rows, 0, head], qkv[rows, 1, head]
            yield rows, head, scale * q @ k.t() + bias[:, :, head]


def series_bucket(distance: int, buckets: int) -> int:
    """Bucket of a 1-D distance: itself up to half the buckets, logarithmic beyond, 1023 the last."""
    middle = buckets // 2
    magnitude = abs(distance)
    if magnitude <= middle:
        return distance
    steps = math.ceil(math.log(magnitude / middle) / math.log(1023 / middle) * (middle - 1))
    return int(math.copysign(middle + steps, distance))


def series_row(buckets: int) -> Callable[[Token, Token], int]:
    """Row of a 1-D table for a query and a key."""

    def row(query: Token, key: Token) -> int:
        if query.is_cls and key.is_cls:
            return 2 * buckets + 1
        if key.is_cls:
            return 2 * buckets
        if query.is_cls:
            return 2 * buckets - 1
        return series_bucket(query.position - key.position, buckets) + buckets - 1

    return row


def grid_row(table_grid: int, grid: int | None = None) -> Callable[[Token, Token], int]:
    """Row of a 2-D table for a query and a key of an image of ``grid`` x ``grid`` patches."""
    rows, width = (2 * table_grid - 1) ** 2 + 3, grid or table_grid

    def row(query: Token, key: Token) -> int:
        if query.is_cls and key.is_cls:
            return rows - 1
        if key.is_cls:
            return rows - 2
        if query.is_cls:
            return rows - 3
        (yi, xi), (yj, xj) = (divmod(token.position - 1, width) for token in (query, key))
        return (yi - yj + table_grid - 1) * (2 * table_grid - 1) + xi - xj + table_grid - 1

    return row


def vector_row(offset: int, entries: int) -> Callable[[Token, Token], int]:
    """Entry of a vector in code form for a query and a key."""

    def row(query: Token, key: Token) -> int:
        if query.is_cls or key.is_cls:
            return entries - (1 if query.is_cls and key.is_cls else 2 if key.is_cls else 3)
        return query.code - key.code + offset

    return row


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 in Python integers, after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    words = list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (second >> 32) ^ words[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ words[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(words)


def dropout_factor(seed: int, rows: int, width: int, probability: float) -> Tensor:
    """0 where the element's random word is below the probability, else 1 / (1 - probability), in float32."""
    words = [philox(seed, (i & 0xFFFFFFFF, i >> 32, 0, 0))[0] for i in range(rows * width)]
    kept = [0.0 if word < int(probability * 2**32) else 1 / (1 - probability) for word in words]
    return torch.tensor(kept).view(rows, width)
