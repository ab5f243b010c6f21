"""Texts of a batch side by side, and what each sees of a context: packed, without padding, or padded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.layers.norms import normalized
from onepeace_fast.models.mico.context import PackedContext
from onepeace_fast.models.mico.layers import attend, attend_padded
from onepeace_fast.route_plan import RoutePlan


class PackedTexts:
    """One matrix of all real tokens, text after text.

    The texts that see a sample's context stand one after another, so that its keys and values are made once.

    Args:
        ids: integers [texts, length].
        valid: bool [texts, length], the real tokens.
        causal: whether a token sees itself and what comes before it alone.
        context: what the texts see, or None.
        samples: whose context each text sees, ascending.
    """

    packed = True

    def __init__(
        self, ids: Tensor, valid: Tensor, causal: bool, context: PackedContext | None, samples: Sequence[int]
    ) -> None:
        self.plan = plan = RoutePlan.from_masks({"text": valid})
        order = plan.causal_order() if causal else None
        self.segments = plan.segments._replace(order=order)
        self.ids, self.places = ids.flatten()[plan.source].long(), plan.position.long()
        self.context = None if context is None else context.x
        if context is not None:
            count = context.plan.sample_count
            first = [bisect_left(samples, sample) for sample in range(count + 1)]
            ends = [*accumulate(plan.segment_lengths[0], initial=0)]
            longest = max(ends[stop] - ends[start] for start, stop in pairwise(first))
            starts = torch.tensor([ends[text] for text in first], dtype=torch.int32, device=ids.device)
            self.of_samples = plan.segments._replace(cu_seqlens=starts[None], max_length=longest)
            self.keys = context.plan.segments

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of the texts' tokens to each other: [rows, heads, head_dim] to [rows, width]."""
        return attend(q, k, v, self.segments)

    def attend_context(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of the texts' tokens to their context's."""
        return attend(q, k, v, self.of_samples, self.keys)

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm of rows."""
        return normalized(x, norm)

    def first(self, x: Tensor) -> Tensor:
        """The first token of each text: [rows, width] to [texts, width]."""
        return F.embedding(self.plan.cu_seqlens[0, :-1], x)

    def tokens(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Real tokens by a mask, bool [texts, length], in its order: [rows, width] to [tokens, width]."""
        return F.embedding(chosen.flatten()[self.plan.source].nonzero()[:, 0], x)

    def unpacked(self, x: Tensor) -> Tensor:
        """[rows, width] to [texts, length, width], zeros at padding."""
        return self.plan.unpack(x)["text"]


class PaddedTexts:
    """The same as padded batches, [texts, length, width], each with its own copy of the context."""

    packed = False

    def __init__(
        self, ids: Tensor, valid: Tensor, causal: bool, context: PackedContext | None, samples: Sequence[int]
    ) -> None:
        self.valid, length = valid, ids.shape[1]
        self.ids, self.places = ids.long(), torch.arange(length, device=ids.device)
        self.seen = valid[:, None].expand(-1, length, -1)
        self.seen = self.seen.tril() if causal else self.seen
        self.context = None
        if context is not None:
            x, there = padded(context)
            chosen = torch.tensor([*samples], dtype=torch.int64, device=ids.device)
            self.context, self.context_seen = x[chosen], there[chosen, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As that of ``PackedTexts``."""
        return attend_padded(q, k, v, self.seen)

    def attend_context(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As that of ``PackedTexts``."""
        return attend_padded(q, k, v, self.context_seen)

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm of rows."""
        return norm(x)

    def first(self, x: Tensor) -> Tensor:
        """The first token of each text."""
        return x[:, 0]

    def tokens(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Real tokens by a mask, in its order."""
        return x[chosen]

    def unpacked(self, x: Tensor) -> Tensor:
        """[texts, length, width], zeros at padding."""
        return x.masked_fill(~self.valid[:, :, None], 0)


def padded(context: PackedContext) -> tuple[Tensor, Tensor]:
    """[samples, length, width], the modalities of a sample one after another, and which of it is there."""
    plan = context.plan
    rows: list[list[int]] = [[] for _ in range(plan.sample_count)]
    start = 0
    for lengths in plan.segment_lengths:
        for sample, length in enumerate(lengths):
            rows[sample] += range(start, start + length)
            start += length
    longest, device = max(map(len, rows)), context.x.device
    index = torch.tensor([own + [0] * (longest - len(own)) for own in rows], device=device)
    lengths_of = torch.tensor([[len(own)] for own in rows], device=device)
    return F.embedding(index, context.x), torch.arange(longest, device=device) < lengths_of


def check_samples(texts: int, context: PackedContext | None, samples: Sequence[int] | None) -> Sequence[int]:
    """The sample of each text; by default text i sees the context of sample i.

    Raises:
        ValueError: not one for each text, not ascending, or one that the context has not.
    """
    found = [*range(texts)] if samples is None else [*samples]
    if context is None:
        require(samples is None, "samples: expected none without a context, got some")
        return found
    count = context.plan.sample_count
    fits = len(found) == texts and found == sorted(found) and all(0 <= sample < count for sample in found)
    require(fits, lambda: f"samples: expected {texts} in ascending order below {count}, got {found}")
    return found
