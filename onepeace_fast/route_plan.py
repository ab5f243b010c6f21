"""The layout of tokens: modality-major, packed, routed once when the input is assembled.

All real tokens of a batch stand in one [T, d] matrix: all tokens of the first modality, then all of the second, ...;
within a modality one sample after another, without padding, CLS last in its segment. A ``RoutePlan`` holds where every
row came from and where every segment lies. Ops take its tensors and integers, never the plan.

    index of a row:    0 ... | offsets[1] ...  | ... offsets[G] | ... capacity
    holds:             text    image             ...               inert rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_tensor

INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """Where every packed row comes from and where every segment lies; G modalities, S samples, C rows of capacity.

    Attributes:
        modalities: names, in the order of the rows.
        offsets: int32 [G + 1], first row of each modality; ``offsets[G]`` is the number of real rows.
        cu_seqlens: int32 [G, S + 1], first row of each sample's segment; the segment's end is the next entry.
        modality, sample, position, code, order: int32 [C], of each row; inert rows hold G, 0, 0, 0, 0. ``position`` is
            the token's own position id (CLS is 0), ``code`` its code for the relative position bias and ``order`` its
            place in its sample (reserved for causal use).
        is_cls: bool [C].
        source: int64 [C], flat index of the row's token in the concatenated padded inputs; inert rows point past them.
        code_offsets: per modality, the entry of its bias vector that belongs to equal codes.
        padded_shapes: per modality, [rows, length] of the padded input that rows are packed from.
        row_counts: rows of each modality where the host knows them, else empty.
        max_length: longest sample, all modalities together, where the host knows it, else 0.
        keep: float32 [layers, 2, S] or None: DropPath's factor of each sample, 0 or 1 / (1 - p), for the attention
            and for the FFN branch of each layer.
    """

    modalities: tuple[str, ...]
    offsets: Tensor
    cu_seqlens: Tensor
    modality: Tensor
    sample: Tensor
    position: Tensor
    code: Tensor
    order: Tensor
    is_cls: Tensor
    source: Tensor
    code_offsets: tuple[int, ...]
    padded_shapes: tuple[tuple[int, int], ...]
    row_counts: tuple[int, ...] = ()
    max_length: int = 0
    keep: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Rows that the packed matrix has, inert ones included."""
        return self.source.shape[0]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.cu_seqlens.shape[1] - 1

    @property
    def padded_rows(self) -> int:
        """Tokens of the padded inputs, padding included."""
        return sum(rows * length for rows, length in self.padded_shapes)

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[str, Tensor],
        *,
        positions: Mapping[str, Tensor] | None = None,
        codes: Mapping[str, Tensor] | None = None,
        code_offsets: Mapping[str, int] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
        lengths: Mapping[str, Sequence[int]] | None = None,
        capacity: int | None = None,
    ) -> RoutePlan:
        """Build the plan of a padded batch; column 0 of every modality is its CLS.

        Args:
            masks: per modality, in the order of a sequence, bool [B_m, L_m]; True marks the tokens to route.
            positions: int [B_m, L_m], position ids where they are not 0 to L_m - 1 (kept subsets).
            codes: int [L] indexed by position id, codes where they are not the position ids (grids).
            code_offsets: see the attribute; by default L_m - 1, for codes 0 to L_m - 1.
            samples: the sample of each row; by default rows are samples 0 to B_m - 1.
            lengths: number of True in each row, where the host knows it; otherwise one synchronisation reads them all.
            capacity: rows to allocate, at least the number of real rows, which is the default.

        Raises:
            ValueError: a mask or a number of rows that does not fit, samples that repeat or leave a gap.
        """
        names = tuple(masks)
        _check_masks(masks)
        device = masks[names[0]].device
        shapes = tuple((mask.shape[0], mask.shape[1]) for mask in masks.values())
        if lengths is None:
            counts = torch.cat([mask.sum(1) for mask in masks.values()]).tolist()
            lengths = dict(zip(names, _split(counts, [rows for rows, _ in shapes]), strict=True))
        sample_of = check_samples({name: mask.shape[0] for name, mask in masks.items()}, samples)
        segments, row_order = _segments(names, lengths, sample_of)
        row_counts = tuple(sum(row) for row in segments)
        total = sum(row_counts)
        capacity = total if capacity is None else capacity
        require(total <= capacity, f"capacity: got {capacity}, takes at least the {total} rows of this batch")

        flat, base = [], 0
        for name, (rows, length) in zip(names, shapes, strict=True):
            index = torch.arange(base, base + rows * length, device=device).view(rows, length)
            if row_order[name] != list(range(rows)):
                index = index[torch.tensor(row_order[name], device=device)]
            flat.append(index.roll(-1, 1).flatten())
            base += rows * length
        source = _compact(torch.cat([m.flatten() for m in masks.values()]), torch.cat(flat), capacity, base)

        position = _per_token(
            source,
            [
                positions[name].to(torch.int32) if positions and name in positions
                else torch.arange(length, dtype=torch.int32, device=device).expand(rows, length)
                for name, (rows, length) in zip(names, shapes, strict=True)
            ],
        )  # fmt: skip
        modality = _per_token(source, [_full(g, shape, device) for g, shape in enumerate(shapes)], len(names))
        sample = _per_token(
            source,
            [
                torch.tensor(sample_of[name], dtype=torch.int32, device=device)[:, None].expand(shape)
                for name, shape in zip(names, shapes, strict=True)
            ],
        )
        cu_seqlens = _cumulative(segments, device)
        return cls(
            modalities=names,
            offsets=torch.cat([cu_seqlens[:, 0], cu_seqlens[-1:, -1]]),
            cu_seqlens=cu_seqlens,
            modality=modality,
            sample=sample,
            position=position,
            code=_codes(names, codes or {}, position, modality),
            order=_order(cu_seqlens, modality, sample),
            is_cls=(position == 0) & (modality < len(names)),
            source=source,
            code_offsets=tuple((code_offsets or {}).get(n, s[1] - 1) for n, s in zip(names, shapes, strict=True)),
            padded_shapes=shapes,
            row_counts=row_counts,
            max_length=max((sum(column) for column in zip(*segments, strict=True)), default=0),
        )

    @classmethod
    def from_lengths(
        cls,
        lengths: Mapping[str, Sequence[int]],
        *,
        device: torch.device | str = "cpu",
        widths: Mapping[str, int] | None = None,
        **keywords: object,
    ) -> RoutePlan:
        """Build the plan from host-side lengths, CLS included, without any synchronisation.

        ``widths`` gives L_m of the padded inputs (by default the longest row); keywords are those of ``from_masks``.
        """
        masks = {}
        for name, row_lengths in lengths.items():
            longest = max(row_lengths, default=1)
            width = (widths or {}).get(name, longest)
            require(width >= longest, f"widths[{name!r}]: got {width}, takes at least the longest row, {longest}")
            limit = torch.tensor(list(row_lengths), device=device)[:, None]
            masks[name] = torch.arange(width, device=device) < limit
        return cls.from_masks(masks, lengths=lengths, **keywords)

    @classmethod
    def from_modality_ids(
        cls,
        modality_ids: Tensor,
        modalities: Sequence[str],
        *,
        sample_ids: Tensor | None = None,
        samples: int = 1,
        positions: Tensor | None = None,
        is_cls: Tensor | None = None,
        max_position: int | None = None,
    ) -> RoutePlan:
        """Build the plan of interleaved tokens from a modality id each, without any synchronisation.

        Args:
            modality_ids: int [T], index into ``modalities`` of each token.
            modalities: names, in the order of the rows.
            sample_ids: int [T], sample of each token; by default all belong to sample 0.
            samples: number of samples.
            positions: int [T], position ids, which are also the codes; by default the token's index.
            is_cls: bool [T]; by default none is CLS.
            max_position: largest position id, where it is not T - 1.

        Ids are checked here on a CPU, and by an assertion on the device elsewhere.
        """
        require_tensor("modality_ids", modality_ids, INTEGERS, "[tokens]", 1)
        count, device, groups = modality_ids.shape[0], modality_ids.device, len(modalities)
        sample_ids = torch.zeros_like(modality_ids) if sample_ids is None else sample_ids
        positions = torch.arange(count, device=device) if positions is None else positions
        is_cls = torch.zeros(count, dtype=torch.bool, device=device) if is_cls is None else is_cls
        for name, value in (("sample_ids", sample_ids), ("positions", positions), ("is_cls", is_cls)):
            require(value.shape == (count,), f"{name}: got {describe(value)}, takes one entry per token, [{count}]")
            require_device(name, value, device)
        _check_ids("modality_ids", modality_ids, groups)
        _check_ids("sample_ids", sample_ids, samples)
        key = modality_ids.long() * samples + sample_ids.long()
        source = torch.argsort(key * 2 + is_cls, stable=True)
        starts = torch.searchsorted(key[source], torch.arange(groups * samples + 1, device=device)).int()
        segment_starts = starts[:-1].view(groups, samples)
        cu_seqlens = torch.cat([segment_starts, starts[samples::samples, None]], dim=1)
        modality, sample = modality_ids[source].int(), sample_ids[source].int()
        limit = count - 1 if max_position is None else max_position
        return cls(
            modalities=tuple(modalities),
            offsets=torch.cat([starts[:-1:samples], starts[-1:]]),
            cu_seqlens=cu_seqlens,
            modality=modality,
            sample=sample,
            position=positions[source].int(),
            code=positions[source].int(),
            order=_order(cu_seqlens, modality, sample),
            is_cls=is_cls[source],
            source=source,
            code_offsets=(limit,) * groups,
            padded_shapes=((1, count),),
        )

    def pack(self, padded: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Gather rows: {modality: [B_m, L_m, d]} (or the interleaved [T, d]) to [C, d]; inert rows hold any token."""
        tensors = [padded] if isinstance(padded, Tensor) else [padded[name] for name in self.modalities]
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        matrix = flat[0] if len(flat) == 1 else torch.cat(flat)
        require(
            matrix.shape[0] == self.padded_rows,
            f"padded: got {matrix.shape[0]} tokens, takes the {self.padded_rows} that the plan was built from",
        )
        if not self.padded_rows:
            return matrix.new_zeros(self.capacity, matrix.shape[1])
        # The gradient of an embedding is summed in a fixed order on every device; that of index_select is not.
        return F.embedding(self.source.clamp(max=self.padded_rows - 1), matrix)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Scatter rows: [C, d] to {modality: [B_m, L_m, d]}, CLS first, padding zero."""
        parts = self._scatter(packed).split([rows * length for rows, length in self.padded_shapes])
        return {
            name: part.view(rows, length, packed.shape[1])
            for name, part, (rows, length) in zip(self.modalities, parts, self.padded_shapes, strict=True)
        }

    def unpack_interleaved(self, packed: Tensor) -> Tensor:
        """Scatter rows of a plan ``from_modality_ids`` back to the tokens' own order: [C, d] to [T, d]."""
        return self._scatter(packed)

    def _scatter(self, packed: Tensor) -> Tensor:
        target = packed.new_zeros(self.padded_rows + 1, packed.shape[1])
        return target.index_copy(0, self.source, packed)[: self.padded_rows]

    def with_keep(self, keep: Tensor) -> RoutePlan:
        """The same plan with DropPath's factors, float32 [layers, 2, S]; ``draw_keep`` draws them."""
        return dataclasses.replace(self, keep=keep)

    def copy_(self, other: RoutePlan) -> RoutePlan:
        """Refill this plan in place from another of the same modalities, samples and capacity (for a captured graph).

        The host's integers must not be needed any more: they are those of the batch that this plan was built from.
        """
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
                same = mine.shape == theirs.shape
            else:
                same = item.name in ("row_counts", "max_length") or (type(mine) is type(theirs) and mine == theirs)
            require(same, f"other: its {item.name} differs, takes a plan of the same modalities, samples and capacity")
        for item in dataclasses.fields(self):
            if isinstance(mine := getattr(self, item.name), Tensor):
                mine.copy_(getattr(other, item.name))
        return self


def draw_keep(
    rates: Sequence[float], samples: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """DropPath's factors, 0 or 1 / (1 - p): float32 [layers, 2, samples], drawn independently."""
    kept = 1.0 - torch.tensor(list(rates), dtype=torch.float32, device=device)[:, None, None]
    uniform = torch.rand(len(rates), 2, samples, device=device, generator=generator)
    return (uniform < kept).float() / kept


def check_samples(rows: Mapping[str, int], samples: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]]:
    """The sample of each row of each modality; raises unless samples are distinct in a modality and leave no gap."""
    if samples is None:
        require(
            len(set(rows.values())) <= 1,
            f"samples: got none with {rows} rows, takes the sample of each row where modalities differ in rows",
        )
        return {name: list(range(count)) for name, count in rows.items()}
    require(
        set(samples) == set(rows), f"samples: got {sorted(samples)}, takes exactly the modalities given, {sorted(rows)}"
    )
    result = {name: list(samples[name]) for name in rows}
    for name, values in result.items():
        require(
            len(values) == rows[name], f"samples[{name!r}]: got {len(values)} entries, takes one per row, {rows[name]}"
        )
        repeated = sorted({value for value in values if values.count(value) > 1})
        require(not repeated, f"samples[{name!r}]: got {repeated} more than once, takes each sample once per modality")
    used = set().union(*map(set, result.values()))
    gaps = sorted(set(range(len(used))) - used)
    require(not gaps, f"samples: got no row for {gaps[:5]}, takes every sample from 0 on in at least one modality")
    return result


def _check_masks(masks: Mapping[str, Tensor]) -> None:
    require(len(masks) > 0, "masks: got none, takes at least one modality")
    device = next(iter(masks.values())).device
    for name, mask in masks.items():
        require_tensor(f"masks[{name!r}]", mask, (torch.bool,), "[rows, length]", 2)
        require_device(f"masks[{name!r}]", mask, device)


def _check_ids(name: str, ids: Tensor, limit: int) -> None:
    require_tensor(name, ids, INTEGERS, "[tokens]", 1)
    message = f"{name}: got an id out of range, takes 0 to {limit - 1}"
    inside = ((ids >= 0) & (ids < limit)).all()
    if ids.device.type == "cpu":
        require(bool(inside), message)
    else:
        torch._assert_async(inside, message)


def _split(values: list[int], counts: Sequence[int]) -> list[list[int]]:
    parts, start = [], 0
    for count in counts:
        parts.append(values[start : start + count])
        start += count
    return parts


def _segments(
    names: Sequence[str], lengths: Mapping[str, Sequence[int]], sample_of: Mapping[str, Sequence[int]]
) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Segment length of each (modality, sample), and each modality's rows in the order of their samples."""
    samples = len(set().union(*map(set, sample_of.values())))
    segments, row_order = [], {}
    for name in names:
        row = [0] * samples
        for sample, length in zip(sample_of[name], lengths[name], strict=True):
            row[sample] = int(length)
        segments.append(row)
        row_order[name] = sorted(range(len(sample_of[name])), key=sample_of[name].__getitem__)
    return segments, row_order


def _cumulative(segments: list[list[int]], device: torch.device) -> Tensor:
    rows, start = [], 0
    for row in segments:
        bounds = [start]
        for length in row:
            bounds.append(bounds[-1] + length)
        rows.append(bounds)
        start = bounds[-1]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _compact(mask: Tensor, index: Tensor, capacity: int, fill: int) -> Tensor:
    """The entries of ``index`` whose ``mask[index]`` is True, in order, padded with ``fill``: int64 [capacity]."""
    chosen = mask[index]
    target = torch.where(chosen, chosen.cumsum(0) - 1, capacity)
    return index.new_full((capacity + 1,), fill).scatter_(0, target, index)[:capacity]


def _full(value: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.int32, device=device).expand(shape)


def _per_token(source: Tensor, padded: list[Tensor], inert: int = 0) -> Tensor:
    """Gather an int32 value of each row from its padded form; inert rows get ``inert``."""
    tail = torch.full((1,), inert, dtype=torch.int32, device=source.device)
    return torch.cat([*(tensor.reshape(-1) for tensor in padded), tail])[source]


def _codes(names: Sequence[str], codes: Mapping[str, Tensor], position: Tensor, modality: Tensor) -> Tensor:
    result = position
    for group, name in enumerate(names):
        if name in codes:
            table = codes[name].to(torch.int32)
            chosen = table[position.clamp(max=table.shape[0] - 1).long()]
            result = torch.where(modality == group, chosen, result)
    return result


def _order(cu_seqlens: Tensor, modality: Tensor, sample: Tensor) -> Tensor:
    """Place of each row in its sample, the modalities one after another."""
    starts, lengths = cu_seqlens[:, :-1], cu_seqlens.diff(dim=1)
    shift = (lengths.cumsum(0) - lengths - starts).to(torch.int32)
    table = torch.cat([shift.flatten(), shift.new_zeros(1)])
    inert = modality >= cu_seqlens.shape[0]
    segment = torch.where(inert, shift.numel(), modality * shift.shape[1] + sample)
    rows = torch.arange(modality.shape[0], dtype=torch.int32, device=modality.device)
    return torch.where(inert, 0, rows + table[segment.long()])
