"""What every modality's adapter is: tokens of the model's width with CLS first, their positions, codes and bias tables.

A new modality is a subclass of ``Adapter``, or of ``SeriesAdapter`` where its tokens stand in a row, given to
``OnePeacePretrain.add_modality``. It says four things:

    valid(name, value, padding)   which tokens an input has, bool [rows, length]; column 0 is CLS
    tokens(value)                 their embeddings without positions, [rows, length, embed_dim]
    position_table(width)         the embeddings of positions 0 to width - 1, CLS at 0
    codes, vector_index           the relative position bias: a code per position, and the table row of each distance

A token's position is its place in the row, or what ``position_ids`` reads in the input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import describe, require, require_device
from onepeace_fast.layers.derived import DerivedBuffers
from onepeace_fast.layers.parameters import init_truncated_normal, with_unread
from onepeace_fast.ops.operation import is_eager
from onepeace_fast.relative_position import dense_index, series_index, series_table_rows, series_vector_index
from onepeace_fast.remembered import is_captured

Fault = tuple[Tensor, Callable[[int], str]]


def take(x: Tensor, ids: Tensor | None) -> Tensor:
    """Rows ``ids`` [batch, visible] of x [batch, length, width]; all of them without ids.

    An embedding, since its gradient is summed in a fixed order on every device, also where ids repeat.
    """
    if ids is None:
        return x
    starts = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return F.embedding(ids + starts, x.flatten(0, 1))


def valid_from_padding(
    name: str, padding: Tensor | None, rows: int, length: int, device: torch.device, tokens: str = "tokens"
) -> Tensor:
    """Real tokens, bool [rows, length], of a modality whose padding is given apart (None: nothing is padding).

    Raises:
        ValueError: padding that is not bool [rows, length] on ``device``.
    """
    if padding is None:
        return torch.ones(rows, length, dtype=torch.bool, device=device)
    require(
        isinstance(padding, Tensor) and padding.dtype == torch.bool and padding.shape == (rows, length),
        f"{name}_padding: expected bool {[rows, length]}, CLS and {length - 1} {tokens}, True at padding, "
        f"got {describe(padding)}",
    )
    require_device(f"{name}_padding", padding, device)
    return ~padding


def require_items(name: str, what: str, items: Sequence[object]) -> None:
    """Raise unless there is something to make a batch of."""
    fits = isinstance(items, Collection) and not (isinstance(items, Tensor) and not items.dim())
    require(fits, lambda: f"{name}: expected a list of {what}, got {describe(items)}")
    require(len(items) > 0, f"{name}: expected at least one of {what}, got none")


def require_size(name: str, size: object, least: int = 1, most: int | None = None) -> None:
    """Raise unless an adapter's size is an integer within its bounds."""
    fits = isinstance(size, int) and not isinstance(size, bool) and size >= least and (most is None or size <= most)
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
    require(fits, lambda: f"{name}: expected an integer {wanted}, got {describe(size)}")


def padded_batch(name: str, items: Sequence[Tensor], tokens: Sequence[int], of_a_token: int = 1) -> dict[str, Tensor]:
    """Items [entries, ...] side by side under a modality's name, and its padding: bool [rows, 1 + length], CLS first.

    ``tokens`` has how many each item makes, of ``of_a_token`` entries each; what is missing is zero.

    Raises:
        ValueError: items of several dtypes or devices.
    """
    kinds = sorted({f"{item.dtype} on {item.device}".removeprefix("torch.") for item in items})
    require(len(kinds) == 1, f"{name}: expected one dtype on one device, got {', '.join(kinds)}")
    longest = max(tokens)
    value = items[0].new_zeros(len(items), longest * of_a_token, *items[0].shape[1:])
    for row, item in zip(value, items, strict=True):
        row[: len(item)] = item
    padding = torch.arange(longest + 1, device="cpu") > torch.tensor(tokens, device="cpu")[:, None]
    return {name: value, f"{name}_padding": padding.to(value.device)}


def accepted_floats(parameter: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes that a convolution takes: its weights', and under autocast the other ones too."""
    autocast = torch.is_autocast_enabled(parameter.device.type)
    others = (torch.float32, torch.float16, torch.bfloat16) if autocast else ()
    return tuple(dict.fromkeys((parameter.dtype, *others)))


class Adapter(DerivedBuffers, ABC):
    """A CLS embedding and the bias tables, ``tables`` of them, ``rows`` x ``heads`` each; the rest is a subclass's.

    Args:
        embed_dim, heads: the model's ``config.encoder.embed_dim`` and ``attention_heads``.
        tables: its ``config.encoder.bias_tables``.
        rows: entries of a bias table for one head.
    """

    takes_padding = False
    embeds = True  # False in a decoder, whose adapters hold positions alone
    position_count: int | None = None  # where an input says its tokens' positions: how many there are, CLS included

    def __init__(self, embed_dim: int, heads: int, tables: int, rows: int) -> None:
        super().__init__()
        self.cls_embedding = nn.Parameter(init_truncated_normal(torch.empty(1, 1, embed_dim)))
        self.type_embedding: nn.Parameter | None = None
        self._remembered: dict[str, tuple[int, torch.device, Tensor | None]] = {}
        if tables:
            self.rel_pos_table_list = nn.ModuleList(nn.Embedding(rows, heads) for _ in range(tables))
            for table in self.rel_pos_table_list:
                nn.init.zeros_(table.weight)  # type: ignore[arg-type]  # an embedding's

    @abstractmethod
    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        """Check the shapes and dtypes of an input and say which tokens are real: bool [rows, length], CLS first.

        ``name`` is the modality's, for messages; ``padding`` comes only where ``takes_padding`` is True. Reads nothing
        back from the device. Raises ``ValueError`` in one line.
        """

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        """Checks of values: counts on the device, read together with all others, and the line for one above zero."""
        if padding is None:
            return []
        return [(padding[:, 0].sum(), lambda _: f"{name}_padding: expected False at CLS, column 0, got True there")]

    @abstractmethod
    def tokens(self, value: Tensor) -> Tensor:
        """Embed an input without positions: [rows, length, embed_dim], CLS first."""

    @abstractmethod
    def position_table(self, width: int) -> Tensor:
        """Position embeddings [width, embed_dim], CLS at 0."""

    def place(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        """Add positions to ``tokens``; with ``ids`` int64 [rows, visible] only those tokens, side by side."""
        positions = self.position_table(tokens.shape[1])
        if ids is None:
            return self.typed(tokens + positions)
        return self.typed(take(tokens, ids) + take(positions.expand(tokens.shape[0], -1, -1), ids))

    def typed(self, x: Tensor) -> Tensor:
        """Add the type embedding, where there is one."""
        return x if self.type_embedding is None else x + self.type_embedding

    def forward(self, value: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embed an input with positions; with ``ids`` only those tokens.

        A decoder's takes tokens without positions, [rows, length, embed_dim].
        """
        tokens = self.tokens(value) if self.embeds else with_unread(value, *self.parameters(recurse=False))
        return self.place(tokens, ids)

    def position_ids(self, value: Tensor) -> Tensor | None:
        """Position that each token's code belongs to, where an input says it: int64 [rows, length], 0 at CLS alone.

        With them ``position_count`` is set, and is the width that codes and bias vectors are made for. None: the place
        in the row.
        """
        return None

    @abstractmethod
    def vector_index(self, width: int) -> Tensor:
        """Table row of each entry of the bias vector for ``width`` positions: int64 [entries]; the last is kept."""

    def codes(self, width: int) -> Tensor | None:
        """Code of each position, int32 [width], the last of which is kept, or None where it is the position itself."""
        return None

    def code_offset(self, width: int) -> int:
        """Entry of the bias vector that belongs to equal codes."""
        return width - 1

    def bias_vectors(self, width: int) -> list[Tensor]:
        """Every table expanded for ``width`` positions: [heads, entries] each, three CLS entries last."""
        index = self.remembered("vector_index", width, self.vector_index)
        return [table(index).t().contiguous() for table in self.rel_pos_table_list]

    def dense_table_index(self, width: int) -> Tensor:
        """Table row of every pair of ``width`` positions, as upstream's rp_bucket: int64 [width, width]."""
        return self.remembered("dense_table_index", width, self._dense_table_index)

    def _dense_table_index(self, width: int) -> Tensor:
        index, codes = self.vector_index(width), self.codes(width)
        position = torch.arange(width, device=index.device)
        code = position if codes is None else codes
        return index[dense_index(code, position == 0, self.code_offset(width), index.shape[0])]

    def remembered(self, what: str, width: int, make: Callable[[int], Tensor | None]) -> Any:
        """What follows from the configuration and a width alone: the last of its kind, as upstream keeps its largest.

        Made as a tensor that autograd takes, though it be made under ``inference_mode``; what is traced makes its own,
        and so does what a graph captures, in which alone its tensors have values.
        """
        if torch.compiler.is_compiling() or not is_eager(()) or is_captured():
            return make(width)
        device = self.cls_embedding.device
        last = self._remembered.get(what)
        if last is None or last[:2] != (width, device):
            with torch.inference_mode(False):
                last = self._remembered[what] = (width, device, make(width))
        return last[2]

    @property
    def has_bias(self) -> bool:
        """Whether this modality has a relative position bias."""
        return hasattr(self, "rel_pos_table_list")


class SeriesAdapter(Adapter):
    """An adapter of a 1-D series: distances are bucketed, exact up to half the bucket size, logarithmic beyond.

    At most 1,024 positions, CLS included.
    """

    series_index: Tensor

    def __init__(self, embed_dim: int, heads: int, tables: int, bucket_size: int) -> None:
        require_size("bucket_size", bucket_size, least=2)
        super().__init__(embed_dim, heads, tables, series_table_rows(bucket_size))
        self.bucket_size = bucket_size
        self.add_derived("series_index", partial(series_index, bucket_size))

    def vector_index(self, width: int) -> Tensor:
        return series_vector_index(self.series_index, self.bucket_size, width)
