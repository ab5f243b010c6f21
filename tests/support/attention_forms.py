"""Attention beyond one bias for each modality: orders, one bias for all, keys of other tokens, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast import Segments, relative_bias_attention
from support.contract import normal

# Lengths of each modality's tokens by sample; rows stand modality after modality, sample after sample.
Lengths = Sequence[Sequence[int]]
Order = Callable[[int, int, int], int]
QUERIES, KEYS = [[5, 0, 3, 2], [2, 4, 0, 3]], [[4, 3, 0, 6], [0, 2, 0, 1]]
INERT, HEADS, OFFSET = 2, 2, 9
RUN_OFFSET = 300  # of codes that are places
FIELDS = Segments._fields  # which torch 2.8 does not trace


def segments(
    lengths: Lengths, seed: int, *, order: Order | None = None, cls: bool = False, runs: bool = False
) -> Segments:
    """Codes of their own for each row, so that neither position nor order stands in for one; or the places, as runs."""
    rows = sum(map(sum, lengths)) + INERT
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *[n for row in lengths for n in row]]).cumsum(0)
    samples = len(lengths[0])
    cu_seqlens = torch.stack([bounds[m * samples : (m + 1) * samples + 1] for m in range(len(lengths))]).int()
    counts = [sum(row) for row in lengths] + [INERT]
    modality = torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor(counts)).int()
    code = torch.randint(0, OFFSET, (rows,), generator=generator).int()
    if runs:
        code = of_each(lengths, lambda m, place, within: within)
    is_cls = torch.zeros(rows, dtype=torch.bool)
    if cls:
        is_cls[
            [bound - 1 for bound, n in zip(bounds[1:].tolist(), [n for r in lengths for n in r], strict=True) if n]
        ] = True
    longest = max(sum(column) for column in zip(*lengths, strict=True))
    return Segments(cu_seqlens, modality, code, is_cls, longest, None if order is None else of_each(lengths, order))


def of_each(lengths: Lengths, order: Order) -> Tensor:
    """int32 [rows]: ``order(modality, place in the sample, in the modality)`` of each row, 0 of inert ones."""
    values = []
    for m, row in enumerate(lengths):
        for sample, count in enumerate(row):
            before = sum(lengths[k][sample] for k in range(m))
            values += [order(m, before + i, i) for i in range(count)]
    return torch.tensor(values + [0] * INERT, dtype=torch.int32)


def causal(modality: int, place: int, within: int) -> int:
    """Each token sees itself and those before."""
    return place


def prefix(modality: int, place: int, within: int) -> int:
    """The first modality sees itself, the second that and its own earlier tokens."""
    return 0 if modality == 0 else within + 1


def later_first(modality: int, place: int, within: int) -> int:
    """Each token sees itself and those behind, of a sample of at most 1000."""
    return 1000 - place


def naive(
    q: Tensor, k: Tensor, v: Tensor, given: Segments, keys: Segments, vectors: Sequence[Tensor],
    offsets: Sequence[int], head_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sample by sample, by the formula: out and the log-sum-exp, zero and -inf where a query sees no key."""
    out, total = torch.zeros(q.shape[0], HEADS, v.shape[2], dtype=q.dtype), torch.zeros(q.shape[:2], dtype=q.dtype)
    for sample in range(given.cu_seqlens.shape[1] - 1):
        i, j = (
            torch.cat([torch.arange(*row) for row in side.cu_seqlens[:, sample : sample + 2].tolist()])
            for side in (given, keys)
        )
        if given.order is None:
            hidden = torch.zeros(len(i), len(j), dtype=torch.bool)
        else:
            hidden = keys.order[j] > given.order[i][:, None]
        total[i] = -math.inf
        sees = ~hidden.all(1) if len(j) else torch.zeros(len(i), dtype=torch.bool)
        i, hidden = i[sees], hidden[sees]
        if not len(i):
            continue
        score = torch.einsum("ihd,jhd->hij", q[i], k[j]) * q.shape[2] ** -0.5
        score = (score + biases(vectors, offsets, given, keys, i, j, q.dtype)).masked_fill(hidden, -math.inf)
        weights = score.softmax(2) if head_scale is None else score.softmax(2) * head_scale[:, None, None]
        out[i] = torch.einsum("hij,jhd->ihd", weights, v[j])
        total[i] = score.detach().logsumexp(2).t()
    return out, total


def biases(
    vectors: Sequence[Tensor], offsets: Sequence[int], given: Segments, keys: Segments, i: Tensor, j: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The bias of pairs, [heads, queries, keys]."""
    result = torch.zeros(HEADS, len(i), len(j), dtype=dtype)
    for which, (vector, offset) in enumerate(zip(vectors, offsets, strict=True)):
        entry = given.code[i][:, None].long() - keys.code[j] + offset
        query, key = given.is_cls[i][:, None], keys.is_cls[j]
        of_cls = vector.shape[1] - 3 + key.long() + (query & key).long()
        entry = torch.where(query | key, of_cls, entry)
        both = (given.modality[i][:, None] == which) & (keys.modality[j] == which)
        taken = torch.ones_like(both) if len(vectors) == 1 else both
        result = result + torch.where(taken, vector[:, entry * taken].to(dtype), 0)
    return result


class Form:
    """A call of the op and the same by ``naive``: q, k, v and vectors are the leaves."""

    def __init__(
        self, *, vectors: int = 1, order: Order | None = None, cross: bool = False, cls: bool = False,
        sizes: tuple[int, int] = (8, 8), joint: bool = False, head_scale: bool = False,
        lengths: tuple[Lengths, Lengths] = (QUERIES, KEYS), runs: bool = False,
    ) -> None:  # fmt: skip
        self.segments = segments(lengths[0], 1, order=order, cls=cls, runs=runs)
        self.keys = segments(lengths[1], 2, order=order, cls=cls, runs=runs) if cross else self.segments
        self.offset = RUN_OFFSET if runs else OFFSET
        self.cross, self.joint, self.vectors = cross, joint, vectors
        rows, key_rows = (side.code.shape[0] for side in (self.segments, self.keys))
        head_dim, value_dim = sizes
        self.leaves = {"q": normal(rows, HEADS, head_dim, seed=3), "k": normal(key_rows, HEADS, head_dim, seed=4)}
        self.leaves |= {"v": normal(key_rows, HEADS, value_dim, seed=5)}
        self.leaves |= {f"vector{m}": normal(HEADS, 2 * self.offset + 4, seed=6 + m) for m in range(vectors)}
        self.leaves |= {"head_scale": 1 + 0.5 * normal(HEADS, seed=9)} if head_scale else {}

    def arguments(self, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the op takes beside qkv."""
        bias = [leaves[f"vector{m}"] for m in range(self.vectors)]
        given = dict(zip(FIELDS, self.segments, strict=True)) | {"keys": self.keys if self.cross else None}
        return given | {"bias": bias, "code_offsets": [self.offset] * len(bias), "head_scale": leaves.get("head_scale")}

    def qkv(self, leaves: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Queries, keys and values, in one tensor or apart."""
        apart = tuple(leaves[name] for name in "qkv")
        return torch.stack(apart, 1) if self.joint else apart

    def call(self, **leaves: Tensor) -> Tensor:
        """The op."""
        return relative_bias_attention(self.qkv(leaves), **self.arguments(leaves))

    def both(self, **leaves: Tensor) -> tuple[Tensor, Tensor]:
        """out and the log-sum-exp by the formula."""
        bias = [leaves[f"vector{m}"] for m in range(self.vectors)]
        q, k, v = (leaves[name] for name in "qkv")
        return naive(q, k, v, self.segments, self.keys, bias, [self.offset] * len(bias), leaves.get("head_scale"))

    def plain(self, **leaves: Tensor) -> Tensor:
        """out by the formula."""
        return self.both(**leaves)[0]


FORMS: dict[str, dict[str, Any]] = {
    "one vector for all": {},
    "one vector for all, CLS": {"cls": True, "head_scale": True},
    "causal, joint": {"order": causal, "vectors": 2, "joint": True},
    "prefix": {"order": prefix, "cls": True},
    "causal, runs": {"order": causal, "vectors": 2, "runs": True},
    "causal without bias": {"order": causal, "vectors": 0},
    "keys of others": {"cross": True, "vectors": 2, "head_scale": True},
    "keys of others in order, CLS": {"cross": True, "order": causal, "cls": True},
    "keys of others, later first": {"cross": True, "order": later_first, "vectors": 2},
    "keys of others without bias": {"cross": True, "vectors": 0},
    "wide keys": {"vectors": 2, "sizes": (16, 8)},
    "wide values of others": {"cross": True, "sizes": (8, 16)},
}
# What the kernels take, with samples of several tiles.
ON_KERNELS = [name for name in FORMS if not name.startswith("wide")]
SEVERAL_TILES: tuple[Lengths, Lengths] = ([[70, 0, 17, 33], [33, 90, 0, 40]], [[66, 35, 0, 80], [0, 40, 0, 70]])
