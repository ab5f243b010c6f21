"""The layout of tokens: modality-major, packed, routed once when the input is assembled.

All real tokens of a batch stand in one [T, d] matrix: all tokens of the first modality, then all of the second, ...;
within a modality one sample after another, without padding, a CLS last in its segment. A ``RoutePlan`` holds where
every row came from and where every segment lies. Ops take its tensors and integers, never the plan.

    index of a row:    0 ... | offsets[1] ...  | ... offsets[G] | ... capacity
    holds:             text    image             ...               inert rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import routing, token_routes
from onepeace_fast.attention_structures import Segments
from onepeace_fast.checks import describe, require, require_mapping


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """Where every packed row comes from and where every segment lies; G modalities, S samples, C rows of capacity.

    Attributes:
        modalities: names, in the order of the rows.
        offsets: int32 [G + 1], first row of each modality; ``offsets[G]`` is the number of real rows.
        cu_seqlens: int32 [G, S + 1], first row of each sample's segment; the segment's end is the next entry.
        modality, sample, position, code, order: int32 [C], of each row; inert rows hold G, 0, 0, 0, 0. ``position`` is
            the token's own position id (CLS is 0), ``code`` its code for the relative position bias and ``order`` its
            place in its sample, the modalities one after another.
        is_cls: bool [C].
        source: int64 [C], flat index of the row's token in the concatenated padded inputs; inert rows point past them.
        code_offsets: per modality, the entry of its bias vector that belongs to equal codes.
        padded_shapes: per modality, [rows, length] of the padded input that rows are packed from.
        row_counts: rows of each modality where the host knows them, else empty.
        max_length: longest sample, all modalities together, where the host knows it, else 0.
        segment_lengths: per modality, the rows of each sample where the host knows them, else empty.
        drop_path: float32 [layers, 2, S] or None: DropPath's factor of each sample, 0 or 1 / (1 - p), for the attention
            and for the FFN branch of each layer.
        branch_row_counts: per layer and branch, the rows of each modality that it computes, where the host knows them,
            else empty.
        has_cls: whether position 0 of every modality is its CLS, False for none; None where the host does not know.
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
    segment_lengths: tuple[tuple[int, ...], ...] = ()
    drop_path: Tensor | None = None
    branch_row_counts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    has_cls: bool | None = None

    @property
    def capacity(self) -> int:
        """Rows that the packed matrix has, inert ones included."""
        return self.source.shape[0]

    @property
    def sample_count(self) -> int:
        """Number of samples."""
        return self.cu_seqlens.shape[1] - 1

    @property
    def is_interleaved(self) -> bool:
        """Whether tokens of several modalities stand in one sequence."""
        return len(self.padded_shapes) != len(self.modalities)

    @property
    def segments(self) -> Segments:
        """What attention takes of the plan, as ``keys`` for instance; without an order."""
        return Segments(self.cu_seqlens, self.modality, self.code, self.is_cls, self.max_length)

    def prefix_order(self, prefix: Sequence[str]) -> Tensor:
        """The order of attention whose tokens of the modalities ``prefix`` see each other alone: int32 [C].

        All others see those and what comes before them, as the words of a caption do behind an image.

        Raises:
            ValueError: a modality that is not the plan's.
        """
        if isinstance(prefix, str):
            raise ValueError(f"prefix: expected a list of names, got {prefix!r}; give [{prefix!r}]")
        unknown = [name for name in prefix if name not in self.modalities]
        require(not unknown, lambda: f"prefix: expected some of {list(self.modalities)}, got {unknown}")
        values = routing.prefix_values(self.causal_order(), self.modality, [*map(self.modalities.index, prefix)])
        return routing.ranks(values, self.modality, self.sample, self.cu_seqlens)

    def causal_order(self) -> Tensor:
        """Causal attention's order, int32 [C]: by position in its sample where all tokens stand in one sequence.

        Equal positions have one order. In padded batches of several modalities these are one after another, CLS first.
        """
        if len(self.padded_shapes) == 1:
            return routing.ranks(self.position, self.modality, self.sample, self.cu_seqlens)
        segment = routing.segment_of_rows(self.cu_seqlens, self.modality, self.sample)
        return routing.cls_first(self.cu_seqlens, segment, self.order, self.is_cls)

    @property
    def padded_rows(self) -> int:
        """Tokens of the padded inputs, padding included."""
        return sum(rows * length for rows, length in self.padded_shapes)

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[str, Tensor],
        *,
        first_is_cls: bool = False,
        positions: Mapping[str, Tensor] | None = None,
        codes: Mapping[str, Tensor] | None = None,
        code_offsets: Mapping[str, int] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
        lengths: Mapping[str, Sequence[int]] | None = None,
        capacity: int | None = None,
    ) -> RoutePlan:
        """Build the plan of a padded batch.

        Args:
            masks: per modality, in the order of a sequence, bool [B_m, L_m]; True marks the tokens to route.
            first_is_cls: whether position 0 of every modality is its CLS, whose bias has entries of its own; by default
                none is CLS, and those entries of the bias vectors are not read.
            positions: int [B_m, L_m], position ids where they are not 0 to L_m - 1 (where only some are visible).
            codes: int [L] indexed by position id, codes where they are not the position ids (grids).
            code_offsets: see the attribute; by default L_m - 1, for codes 0 to L_m - 1.
            samples: the sample of each row; by default rows are samples 0 to B_m - 1.
            lengths: number of True in each row, where the host knows it; otherwise one synchronisation reads them all.
            capacity: rows to allocate, at least the number of real rows, which is the default; with it the plan may be
                refilled by ``copy_``, so it holds no ``row_counts``, and ``max_length`` bounds every batch. Capturing
                it in a graph needs kernels: the references read the counts on the host.

        Raises:
            ValueError: a mask or a number of rows that does not fit, samples that repeat or leave a gap.
        """
        fields = routing.fields_of_masks(
            masks, first_is_cls, positions or {}, codes or {}, code_offsets or {}, samples, lengths, capacity
        )
        return cls(modalities=tuple(masks), **fields)

    @classmethod
    def from_lengths(
        cls,
        lengths: Mapping[str, Sequence[int]],
        *,
        first_is_cls: bool = False,
        device: torch.device | str = "cpu",
        widths: Mapping[str, int] | None = None,
        **keywords: Any,
    ) -> RoutePlan:
        """Build the plan from host-side lengths, CLS included where ``first_is_cls``, without any synchronisation.

        ``widths`` gives L_m of the padded inputs (by default the longest row); keywords are those of ``from_masks``.

        Raises:
            ValueError: a length that is no integer, below 0 or above its width, or what ``from_masks`` refuses.
        """
        require_mapping("lengths", lengths)
        require_mapping("widths", widths or {})
        masks = {}
        for name, given in lengths.items():
            row_lengths = routing.whole_numbers(f"lengths[{name!r}]", given)
            longest = max(row_lengths, default=1)
            if min(row_lengths, default=0) < 0:
                raise ValueError(f"lengths[{name!r}]: expected none below 0, got {row_lengths}")
            width = (widths or {}).get(name, longest)
            require(width >= longest, f"widths[{name!r}]: expected at least the longest row, {longest}, got {width}")
            limit = routing.copy_to_device(row_lengths, torch.int64, torch.device(device))[:, None]
            masks[name] = torch.arange(width, device=device) < limit
        return cls.from_masks(masks, first_is_cls=first_is_cls, lengths=lengths, **keywords)

    @classmethod
    def from_modality_ids(
        cls,
        modality_ids: Tensor,
        modalities: Sequence[str],
        *,
        sample_ids: Tensor | None = None,
        sample_count: int = 1,
        positions: Tensor | None = None,
        is_cls: Tensor | None = None,
        max_position: int | None = None,
    ) -> RoutePlan:
        """Build the plan of interleaved tokens from a modality id each, without any synchronisation.

        Args:
            modality_ids: int [T], index into ``modalities`` of each token.
            modalities: names, in the order of the rows.
            sample_ids: int [T], sample of each token; by default there is one sample.
            sample_count: how many samples there are.
            positions: int [T], position ids, which are also the codes; by default the token's index.
            is_cls: bool [T]; by default none is CLS.
            max_position: largest position id, where it is not T - 1.

        Ids are checked here on a CPU, and by an assertion on the device elsewhere. The plan holds no host counts: on
        a GPU the kernels read ``offsets`` on the device, elsewhere the references read them on the host.

        Raises:
            ValueError: a dtype, shape or device that does not fit, or on a CPU an id that is out of range.
        """
        fields = token_routes.fields_of_ids(
            modality_ids, modalities, sample_ids, sample_count, positions, is_cls, max_position
        )
        return cls(modalities=tuple(modalities), **fields)

    @classmethod
    def from_token_masks(
        cls, masks: Mapping[str, Tensor], *, last_wins: bool = False, inert: bool = False, leave_out: bool = False,
        **keywords: Any,
    ) -> RoutePlan:  # fmt: skip
        """Build the plan of interleaved tokens from a boolean mask per modality.

        Tokens in no mask, such as padding, are refused by default. Those left out have no row, so that nothing computes
        them: the host reads the lengths, once, and the plan knows them. Inert rows need no synchronisation, and a
        captured graph can be refilled with them; what works on all rows computes them too.

        Args:
            masks: bool [tokens] or [samples, length], all of one shape; True marks a modality's tokens.
            last_wins: whether a token in several masks belongs to the last of them; by default it is refused.
            inert: whether a token in no mask has an inert row; it comes out as zero.
            leave_out: whether a token in no mask has no row; ``unpack_interleaved`` puts zeros at its place.
            keywords: those of ``from_modality_ids``; by default the rows of a matrix are samples.

        Raises:
            ValueError: masks that do not fit together, both of ``inert`` and ``leave_out``; on a CPU a token in several
                masks or in none, which elsewhere the device asserts.
        """
        require(not (inert and leave_out), "inert, leave_out: expected one of them at most, got both")
        takes_rest = inert or leave_out
        ids = token_routes.ids_of_masks(masks, last_wins, takes_rest)
        names = [*masks, ""] if takes_rest else [*masks]
        plan = cls.from_modality_ids(ids, names, **{**token_routes.samples_of_rows(masks), **keywords})
        if not takes_rest:
            return plan
        return dataclasses.replace(plan, **(token_routes.inert_last if inert else token_routes.without_last)(plan))

    @classmethod
    def from_indices(
        cls, indices: Mapping[str, Sequence[int] | Tensor], tokens: int, *, device: torch.device | str = "cpu",
        **keywords: Any,
    ) -> RoutePlan:  # fmt: skip
        """Build the plan of interleaved tokens from each modality's token indices, without any synchronisation.

        Args:
            indices: per modality, integers; together they hold every token from 0 to ``tokens`` - 1 once.
            tokens: how many tokens there are.
            device: of the plan.
            keywords: those of ``from_modality_ids``.

        Raises:
            ValueError: indices that repeat or leave out a token; those on a device are asserted there.
        """
        plan = cls.from_modality_ids(token_routes.ids_of_indices(indices, tokens, device), [*indices], **keywords)
        return dataclasses.replace(plan, row_counts=tuple(map(len, indices.values())))

    def pack(self, padded: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Gather rows: {modality: [B_m, L_m, d]} (or the interleaved [T, d]) to [C, d]; inert rows are zero.

        Raises:
            ValueError: tensors of other rows than the plan's, or of several widths, devices or, but under autocast,
                dtypes.
        """
        if isinstance(padded, Tensor):
            tensors = [padded]
        else:
            self._require_padded()
            require_mapping("padded", padded)
            shapes = {name: tuple(tensor.shape[:2]) for name, tensor in padded.items()}
            expected = dict(zip(self.modalities, self.padded_shapes, strict=True))
            if shapes != expected:
                raise ValueError(f"padded: expected tensors of the plan's rows and lengths, {expected}, got {shapes}")
            tensors = [padded[name] for name in self.modalities]
            routing.check_alike("padded", dict(zip(self.modalities, tensors, strict=True)))
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        count = sum(rows.shape[0] for rows in flat)
        require(
            count == self.padded_rows,
            lambda: f"padded: expected the {self.padded_rows} tokens that the plan was built from, got {count}",
        )
        if sum(self.row_counts) != self.capacity:
            flat.append(flat[0].new_zeros(1, flat[0].shape[1]))  # for inert rows
        matrix = flat[0] if len(flat) == 1 else torch.cat(flat)
        # The gradient of an embedding is summed in a fixed order on every device; that of index_select is not.
        return F.embedding(self.source, matrix)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Scatter rows: [C, d] to {modality: [B_m, L_m, d]}, tokens at their columns, padding and dropped samples zero.

        Raises:
            ValueError: rows that are not the plan's, or a plan of interleaved tokens of several modalities.
        """
        self._require_padded()
        padded = self._scatter(packed).split([rows * length for rows, length in self.padded_shapes])
        return {
            name: x.view(rows, length, packed.shape[1])
            for name, x, (rows, length) in zip(self.modalities, padded, self.padded_shapes, strict=True)
        }

    def unpack_interleaved(self, packed: Tensor) -> Tensor:
        """Scatter rows of a plan ``from_modality_ids`` back to the tokens' own order: [C, d] to [T, d].

        Raises:
            ValueError: rows that are not the plan's, or a plan of padded batches.
        """
        if self.padded_shapes != ((1, self.padded_rows),):
            raise ValueError(
                f"plan: expected one of interleaved tokens, got one of padded batches {self.padded_shapes}; use unpack"
            )
        return self._scatter(packed)

    def _require_padded(self) -> None:
        if self.is_interleaved:
            raise ValueError(
                f"plan: expected one of padded batches, got one of interleaved tokens of {len(self.modalities)} "
                "modalities; use pack(tensor) and unpack_interleaved"
            )

    def _scatter(self, packed: Tensor) -> Tensor:
        if packed.dim() != 2 or packed.shape[0] != self.capacity:
            raise ValueError(f"packed: expected the plan's rows, [{self.capacity}, width], got {describe(packed)}")
        target = packed.new_zeros(self.padded_rows + 1, packed.shape[1])
        return target.index_copy(0, self.source, packed)[: self.padded_rows]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RoutePlan:
        """The same plan with its tensors on a device, as ``Tensor.to`` moves them.

        Plans made in a DataLoader's workers go to a GPU so, with ``non_blocking`` where they are pinned.
        """
        target = torch.device(device)  # a dtype is refused here
        return self._with_tensors(lambda tensor: tensor.to(target, non_blocking=non_blocking))

    def pin_memory(self) -> RoutePlan:
        """The same plan with its tensors in pinned memory, as a DataLoader with ``pin_memory=True`` asks of a batch."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> RoutePlan:
        found = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in found.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)

    def with_drop_path(self, drop_path: Tensor) -> RoutePlan:
        """The same plan with DropPath's factors, float32 [layers, 2, S], which ``draw_drop_path`` draws.

        On the CPU they are counted here, where the plan knows its segments' lengths, and copied to the plan's device.
        """
        counts: tuple[tuple[tuple[int, ...], ...], ...] = ()
        if drop_path.device.type == "cpu" and self.segment_lengths:
            counts = routing.branch_row_counts(drop_path, self.segment_lengths)
        on_device = routing.tensor_to_device(drop_path, self.offsets.device)
        return dataclasses.replace(self, drop_path=on_device, branch_row_counts=counts)

    def copy_(self, other: RoutePlan) -> RoutePlan:
        """Refill this plan in place, for a captured graph; both must be built with the same ``capacity``.

        Raises:
            ValueError: a plan of other modalities, shapes or capacity, or one without capacity; nothing is changed.
        """
        if self.row_counts or other.row_counts:
            raise ValueError("other: expected two plans built with capacity, got one without")
        pairs = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in dataclasses.fields(self)}
        for name, (mine, theirs) in pairs.items():
            if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
                same = mine.shape == theirs.shape
            else:
                same = type(mine) is type(theirs) and mine == theirs
            require(same, f"other: expected a plan of the same modalities, samples and capacity, got another {name}")
        for mine, theirs in pairs.values():
            if isinstance(mine, Tensor):
                mine.copy_(theirs)
        return self
