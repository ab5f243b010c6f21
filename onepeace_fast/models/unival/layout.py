"""The tokens of a batch side by side: packed, without padding, or padded as upstream has them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.layers.norms import normalized
from onepeace_fast.models.unival.inputs import Tokens
from onepeace_fast.models.unival.layers import PackedRoute, PaddedRoute, Route
from onepeace_fast.relative_position import dense_index
from onepeace_fast.route_plan import RoutePlan


class Packed:
    """One matrix of all real tokens, modality after modality.

    Attributes:
        plan: the route plan; in the decoder the beginning of codes is CLS.
        place: int64 [rows], the place of each row among those of all modalities.
        samples, sample: how many there are, and int32 [rows], that of each row.
    """

    def __init__(self, tokens: Mapping[str, Tokens], name: str, causal: bool = False) -> None:
        self.tokens = tokens
        plan = RoutePlan.from_masks(
            {name: x.valid for name, x in tokens.items()},
            positions={name: x.place for name, x in tokens.items() if x.place is not None},
            codes={name: x.codes for name, x in tokens.items()},
            code_offsets={name: x.code_offset for name, x in tokens.items()},
            samples={name: x.samples for name, x in tokens.items()},
        )
        if "code" in tokens:
            is_cls = (plan.modality == plan.modalities.index("code")) & (plan.position == 0)
            plan = dataclasses.replace(plan, is_cls=is_cls, has_cls=None)
        self.plan = plan
        starts = [*accumulate((len(x.table_rows) for x in tokens.values()), initial=0)]
        self.place = torch.cat([
            rows + start for rows, start in zip(plan.position.long().split(plan.row_counts), starts, strict=False)
        ])  # fmt: skip
        order = plan.causal_order() if causal else None
        self.segments = plan.segments._replace(order=order)
        self.samples, self.sample = plan.sample_count, plan.sample
        empty = [s for s, lengths in enumerate(zip(*plan.segment_lengths, strict=True)) if not sum(lengths)]
        require(not empty, lambda: f"{name}: expected at least one token in each sample, got none in {empty}")

    def values(self, name: str) -> Tensor:
        """The real tokens' ids [rows of the modality] or features [rows of the modality, channels]."""
        return self.real(name, self.tokens[name].values)

    def real(self, name: str, padded: Tensor) -> Tensor:
        """[rows, length, ...] of a modality at its real tokens alone."""
        plan, m = self.plan, self.plan.modalities.index(name)
        start, base = sum(plan.row_counts[:m]), sum(rows * length for rows, length in plan.padded_shapes[:m])
        source = plan.source[start : start + plan.row_counts[m]] - base
        flat = padded.flatten(0, 1)
        return flat[source] if flat.dim() == 1 else F.embedding(source, flat)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The modalities' rows one after another."""
        return parts[0] if len(parts) == 1 else torch.cat([*parts])

    def at_places(self, vectors: Tensor) -> Tensor:
        """Of each token the vector of its place: [places, width] to [rows, width]."""
        return F.embedding(self.place, vectors)

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm of rows."""
        return normalized(x, norm)

    def routes(
        self, queries: Tensor, keys: Tensor, heads: int, vectors: Sequence[Sequence[Tensor]], of: Packed | None = None
    ) -> list[Route]:
        """A route for each layer.

        Args:
            queries, keys: [places, dim], what the places add to queries and keys.
            heads: attention heads.
            vectors: for each layer those of the modalities; one empty for all.
            of: the layout of other tokens as keys.
        """
        q = self.at_places(queries).unflatten(1, (heads, -1))
        k = (of or self).at_places(keys).unflatten(1, (heads, -1))
        segments = self.segments if of is None else self.segments._replace(order=None)
        others = None if of is None else of.segments
        offsets = self.plan.code_offsets
        return [PackedRoute(q, k, segments, others, tuple(x), offsets if x else ()) for x in vectors]

    def rows(self, x: Tensor) -> Tensor:
        """The real tokens, which all are."""
        return x

    def unpacked(self, x: Tensor) -> dict[str, Tensor]:
        """[rows, width] as {modality: [rows, length, width]}, zeros at padding."""
        return self.plan.unpack(x)


class Padded:
    """The modalities' padded blocks one after another, [samples, length], with every sample in every block.

    Attributes:
        valid: bool [samples, length].
        samples, sample: how many there are; None, since rows are samples.
        place: int64 [samples, length], the place of each token among those of all modalities.
    """

    def __init__(self, tokens: Mapping[str, Tokens], name: str, causal: bool = False) -> None:
        self.tokens, self.causal, self.sample = tokens, causal, None
        self.samples = 1 + max(sample for x in tokens.values() for sample in x.samples)
        starts = accumulate((len(x.table_rows) for x in tokens.values()), initial=0)
        # Where a sample has no row, the places of another stand for its padding.
        self.place = torch.cat([
            self._block(x, x.places, 0) + start for x, start in zip(tokens.values(), starts, strict=False)
        ], 1)  # fmt: skip
        self.valid = torch.cat([self._block(x, x.valid, False) for x in tokens.values()], 1)
        empty = (~self.valid.any(1)).nonzero().flatten().tolist()
        require(not empty, lambda: f"{name}: expected at least one token in each sample, got none in {empty}")

    def _block(self, tokens: Tokens, rows: Tensor, fill: float | bool) -> Tensor:
        """[rows, ...] to [samples, ...]."""
        if tokens.samples == [*range(self.samples)]:
            return rows
        place = torch.tensor(tokens.samples, dtype=torch.int64, device=rows.device)
        return rows.new_full((self.samples, *rows.shape[1:]), fill).index_copy(0, place, rows)

    def values(self, name: str) -> Tensor:
        """Ids [rows, length] or features [rows, length, channels]."""
        return self.tokens[name].values

    def real(self, name: str, padded: Tensor) -> Tensor:
        """[rows, length, ...] of a modality at its real tokens alone."""
        return padded[self.tokens[name].valid]

    def rows(self, x: Tensor) -> Tensor:
        """[samples, length, width] at the real tokens alone, one modality after another."""
        return torch.cat([self.real(name, block) for name, block in self.unpacked(x).items()])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, length, width] of each modality to [samples, length, width], zeros at padding."""
        blocks = [self._block(x, part, 0.0) for x, part in zip(self.tokens.values(), parts, strict=True)]
        return torch.cat(blocks, 1).masked_fill(~self.valid[:, :, None], 0)

    def at_places(self, vectors: Tensor) -> Tensor:
        """Of each token the vector of its place: [places, width] to [samples, length, width]."""
        return F.embedding(self.place, vectors)

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm of rows."""
        return norm(x)

    def routes(
        self, queries: Tensor, keys: Tensor, heads: int, vectors: Sequence[Sequence[Tensor]], of: Padded | None = None
    ) -> list[Route]:
        """As those of ``Packed``, with the bias of all pairs."""
        others = of or self
        q, k = (
            at.at_places(x).unflatten(2, (heads, -1)).transpose(1, 2) for at, x in ((self, queries), (others, keys))
        )
        bias = (q * (2 * q.shape[-1]) ** -0.5) @ k.transpose(-1, -2)
        hidden = ~others.valid[:, None, None, :]
        if self.causal and of is None:
            order = torch.cat([self._block(x, x.places, 0) for x in self.tokens.values()], 1)
            hidden = hidden | (order[:, None, :] > order[:, :, None])[:, None]
        found: list[Route] = []
        for of_modalities in vectors:
            whole = bias
            if of_modalities:
                blocks = [self._relative(x, v) for x, v in zip(self.tokens.items(), of_modalities, strict=True)]
                whole = bias + _block_diagonal(blocks)
            found.append(PaddedRoute(whole.masked_fill(hidden, -torch.inf)))
        return found

    def _relative(self, named: tuple[str, Tokens], vector: Tensor) -> Tensor:
        """The bias of distances of a block: [samples, heads, length, length]."""
        name, tokens = named
        place = self._block(tokens, tokens.places, 0)
        is_cls = (place == 0) & (name == "code")
        index = dense_index(tokens.codes[place], is_cls, tokens.code_offset, vector.shape[1])
        return F.embedding(index, vector.t()).permute(0, 3, 1, 2)

    def taken(self, samples: Tensor) -> Padded:
        """The layout of these samples, int64, any of them several times; it has their padding and places alone."""
        found = copy.copy(self)
        found.valid, found.place = self.valid[samples], self.place[samples]
        return found

    def unpacked(self, x: Tensor) -> dict[str, Tensor]:
        """[samples, length, width] as {modality: [rows, length, width]}, zeros at padding."""
        blocks = x.masked_fill(~self.valid[:, :, None], 0).split([t.valid.shape[1] for t in self.tokens.values()], 1)
        return {
            name: block[torch.tensor(tokens.samples, dtype=torch.int64, device=x.device)]
            for (name, tokens), block in zip(self.tokens.items(), blocks, strict=True)
        }


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """[samples, heads, length, length] of each block to that of all, zeros between two of them."""
    lengths = [block.shape[-1] for block in blocks]
    before = [*accumulate(lengths, initial=0)]
    rows = [
        F.pad(block, (start, before[-1] - start - length))
        for block, start, length in zip(blocks, before, lengths, strict=False)
    ]
    return torch.cat(rows, 2)
