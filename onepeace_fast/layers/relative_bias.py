"""The relative position biases of public models, in the code form that ``relative_bias_attention`` takes.

Every token carries an integer code. The bias of a query i and a key j is entry ``code_i - code_j + code_offset`` of a
vector for each head, whose last three entries are those of CLS as query, CLS as key, and both. So a bias with its
gradient takes memory linear in the length, where public code makes [heads, length, length].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import describe, require
from onepeace_fast.layers.derived import DerivedBuffers
from onepeace_fast.layers.plain import device_of, embedding_table
from onepeace_fast.relative_position import (
    CLS_ENTRIES,
    alibi_slopes,
    dense_index,
    series_index,
    series_table_rows,
    t5_index,
    window_code_offset,
    window_codes,
    window_table_rows,
)

EMBEDDING = "relative_attention_bias.weight"  # T5's and torchscale's name
PARAMETER = "relative_position_bias_table"  # Swin's, BEiT's and Video Swin's
LIST = "rel_pos_table_list.0.weight"  # ONE-PEACE's
STANDARD_DEVIATION = 0.02


class RelativeBias(DerivedBuffers, ABC):
    """A relative position bias: codes of tokens, and a vector for each head that a pair finds its bias in.

    Make one by a constructor below. A table has the public implementation's shape and name, so its tensor drops in:

    | constructor | parameter | shape | drawn |
    |---|---|---|---|
    | ``t5``, ``torchscale`` | ``relative_attention_bias.weight`` | [buckets, heads] | deviation 0.02 |
    | ``swin``, ``video_swin`` | ``relative_position_bias_table`` | [distances, heads] | deviation 0.02 |
    | ``beit`` | ``relative_position_bias_table`` | [distances + 3, heads] | deviation 0.02 |
    | ``one_peace`` | ``rel_pos_table_list.0.weight`` | [rows, heads] | zeros |
    | ``alibi`` | none | | |

    The bias of a series takes ``length``, the tokens of the longest sample. That of a window knows its tokens; with
    ``length`` it takes the first ones, with ``window`` those of a smaller window, which shares the table.

        bias = RelativeBias.t5(heads=8)
        out = relative_bias_attention(
            qkv, cu_seqlens=plan.cu_seqlens, modality=plan.modality, code=plan.code, is_cls=plan.is_cls,
            bias=[bias.vector(length)], code_offsets=[bias.code_offset(length)], scale=1.0,
        )

    Attributes:
        heads: attention heads.
        rows: of the table; 0 for ``alibi``.
        table: the trained table [rows, heads]; None for ``alibi``.
        is_series: whether codes are places in a row, so that vectors take its length.
        with_cls: whether it has entries of CLS.
    """

    is_series = False
    with_cls = False
    rows = 0
    _name = ""  # of its table

    def __init__(self, heads: int) -> None:
        super().__init__()
        _require_positive("heads", heads)
        self.heads = heads

    def _get_name(self) -> str:
        return "RelativeBias"

    def extra_repr(self) -> str:
        """The sizes."""
        return f"heads={self.heads}, rows={self.rows}, series={self.is_series}"

    @classmethod
    def t5(cls, heads: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> RelativeBias:
        """T5's bias (arXiv 1910.10683), also that of mT5 and UMT5.

        T5 does not scale its scores: pass ``scale=1.0`` to attention.

        Args:
            heads: attention heads.
            buckets: rows of the table, Hugging Face's relative_attention_num_buckets.
            max_distance: distance from which on all share a bucket, relative_attention_max_distance.
            bidirectional: True in an encoder. False in a decoder: keys behind the query, which a causal mask hides,
                take the bucket of distance 0.

        Raises:
            ValueError: buckets or distances that leave no bucket to be exact.
        """
        least = 4 if bidirectional else 2
        require(
            isinstance(buckets, int) and buckets >= least,
            f"buckets: expected at least {least}, got {describe(buckets)}",
        )
        exact = buckets // least
        require(
            isinstance(max_distance, int) and max_distance > exact,
            f"max_distance: expected more than {exact}, up to which buckets are exact, got {describe(max_distance)}",
        )
        return _BucketedSeries(heads, EMBEDDING, buckets, partial(t5_index, buckets, max_distance, bidirectional))

    @classmethod
    def torchscale(cls, buckets: int, max_distance: int, heads: int) -> RelativeBias:
        """The bias of torchscale's encoder and decoder (rel_pos_buckets, max_rel_pos), T5's bidirectional one.

        With several modalities one table serves all, over absolute indices through them: slice ``codes(length)`` of the
        whole sequence for each modality. torchscale draws the table with deviation 1.
        """
        return cls.t5(heads, buckets, max_distance)

    @classmethod
    def alibi(cls, heads: int) -> RelativeBias:
        """ALiBi (arXiv 2108.12409): ``-slope * abs(i - j)`` with a fixed slope for each head, without parameters.

        Below a causal mask that is the paper's bias. Without one it is the symmetric form, which the paper's authors
        name for encoders and which flash-attention computes.
        """
        return _LinearSeries(heads)

    @classmethod
    def one_peace(
        cls, heads: int, *, buckets: int | None = None, grid: int | None = None, with_cls: bool = True
    ) -> RelativeBias:
        """ONE-PEACE's bias (arXiv 2305.11172), of a series (text, audio) or of a square image.

        Args:
            heads: attention heads.
            buckets: ``bucket_size`` of a series, whose table has ``2 * buckets - 1`` rows and three of CLS; at most
                1,024 positions, CLS at 0 included.
            grid: patches of the image's side. The table has a row for each 2-D distance and three of CLS, which is the
                first token. Exactly one of ``buckets`` and ``grid``.
            with_cls: False for a series without CLS, whose table lacks the three rows, as in OFA and UnIVAL.
        """
        require(
            (buckets is None) != (grid is None),
            f"one_peace: expected buckets or grid, got buckets {buckets}, grid {grid}",
        )
        if grid is not None:
            _require_positive("grid", grid)
            require(with_cls, "with_cls: expected True with a grid, got False; a grid without CLS is RelativeBias.swin")
            return _WindowBias(heads, (grid, grid), LIST, with_cls=True)
        if not isinstance(buckets, int) or buckets < 2:
            raise ValueError(f"buckets: expected at least 2, got {describe(buckets)}")
        rows = series_table_rows(buckets) - (0 if with_cls else CLS_ENTRIES)
        return _BucketedSeries(heads, LIST, rows, partial(series_index, buckets), with_cls=with_cls, is_bounded=True)

    @classmethod
    def swin(cls, window: int | Sequence[int], heads: int) -> RelativeBias:
        """Swin's bias (arXiv 2103.14030) over a window of [height, width] tokens, or a square one.

        ``shifted_windows`` gives the order, segments and codes of a whole image, shifted or not.
        """
        return _WindowBias(heads, _sides(window, 2), PARAMETER)

    @classmethod
    def beit(cls, window: int | Sequence[int], heads: int) -> RelativeBias:
        """BEiT's bias (arXiv 2106.08254), also data2vec's for images: [height, width] patches behind a CLS."""
        return _WindowBias(heads, _sides(window, 2), PARAMETER, with_cls=True)

    @classmethod
    def video_swin(cls, window: Sequence[int], heads: int) -> RelativeBias:
        """Video Swin's bias (arXiv 2106.13230) over a window of [time, height, width] tokens.

        Where a clip is smaller than the window, the public code takes the first tokens' part of the index; that is
        ``codes(length)``. It is geometry's, ``codes(window=...)``, where only frames are fewer.
        """
        return _WindowBias(heads, _sides(window, 3), PARAMETER)

    @property
    def table(self) -> Tensor | None:
        """The trained table [rows, heads], as its embedding gives it where that is wrapped or has hooks; or None."""
        return _table_of(self, self._name) if self._name else None

    @abstractmethod
    def codes(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        """Code of each token, on the bias's device: int32 [tokens]."""

    @abstractmethod
    def is_cls(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        """Which tokens are CLS: bool [tokens]."""

    @abstractmethod
    def code_offset(self, length: int | None = None) -> int:
        """Entry of the vector that belongs to equal codes."""

    @abstractmethod
    def vector(self, length: int | None = None) -> Tensor:
        """The bias of each difference of codes, and three entries of CLS: [heads, entries + 3] in the table's dtype.

        Without a CLS these three are zeros. ``alibi`` gives at least float32. The gradient of the table is summed in
        the same order every time.

        Raises:
            ValueError: a length that the bias does not cover.
        """

    def dense(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        """The bias of every pair, to add to the scores of other attention: [heads, queries, keys]."""
        vector = self.vector(length)
        codes, is_cls = self.codes(length, window=window), self.is_cls(length, window=window)
        index = dense_index(codes, is_cls, self.code_offset(length), vector.shape[1])
        return F.embedding(index, vector.t()).permute(2, 0, 1)


class _SeriesBias(RelativeBias):
    """Tokens in a row, whose codes are their places."""

    is_series = True
    max_length: int | None = None

    @property
    @abstractmethod
    def _values(self) -> Tensor:
        """What the vector is made of."""

    def codes(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        require(window is None, lambda: f"window: expected none for the bias of a series, got {window}; pass length")
        return torch.arange(self._require_length(length), dtype=torch.int32, device=self._values.device)

    def is_cls(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        return torch.zeros_like(self.codes(length, window=window), dtype=torch.bool)

    def code_offset(self, length: int | None = None) -> int:
        return self._require_length(length) - 1

    def _require_length(self, length: int | None) -> int:
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length: expected the tokens of the longest sample, got {describe(length)}")
        limit = self.max_length
        require(
            limit is None or length <= limit,
            lambda: f"length: expected at most {limit}, which the bias covers, got {length}",
        )
        return length

    def _distances(self, length: int | None) -> Tensor:
        """Differences of codes in the vector's order, query - key: int64 [2 * length - 1]."""
        length = self._require_length(length)
        return torch.arange(1 - length, length, device=self._values.device)


class _BucketedSeries(_SeriesBias):
    """A table row for each bucket of distances.

    ``make_index`` gives the row of every distance, with distance 0 in the middle. Longer distances share the outermost
    buckets, or are refused where ``is_bounded``.
    """

    index: Tensor

    def __init__(
        self, heads: int, name: str, rows: int, make_index: Callable[[], Tensor],
        with_cls: bool = False, is_bounded: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(heads)
        self._name, self.with_cls = name, with_cls
        _add_table(self, name, rows)
        self.add_derived("index", make_index)
        self.max_length = self._reach + 1 if is_bounded else None

    @property
    def _values(self) -> Tensor:
        return self.index

    @property
    def _reach(self) -> int:
        return self.index.shape[0] // 2

    def is_cls(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        codes = self.codes(length, window=window)
        return codes == 0 if self.with_cls else torch.zeros_like(codes, dtype=torch.bool)

    def vector(self, length: int | None = None) -> Tensor:
        rows = self.index[self._distances(length).clamp(-self._reach, self._reach) + self._reach]
        # An embedding, since its gradient is summed in a fixed order on every device.
        table = _table_of(self, self._name)
        return _with_cls_entries(F.embedding(rows, table), table if self.with_cls else None)


class _LinearSeries(_SeriesBias):
    """ALiBi."""

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.add_derived("slopes", partial(alibi_slopes, heads))

    @property
    def _values(self) -> Tensor:
        return self.slopes

    def vector(self, length: int | None = None) -> Tensor:
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))
        return _with_cls_entries(-self._distances(length).abs()[:, None] * slopes, None)


class _WindowBias(RelativeBias):
    """A table row for each distance of a window of any number of axes, in the order of the codes' differences."""

    def __init__(self, heads: int, window: tuple[int, ...], name: str, with_cls: bool = False) -> None:
        super().__init__(heads)
        self.window, self._name, self.with_cls = window, name, with_cls
        _add_table(self, name, window_table_rows(window) + (CLS_ENTRIES if with_cls else 0))

    def codes(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        require(
            length is None or window is None, lambda: f"window: expected length or window, got {length} and {window}"
        )
        if window is not None:
            window = _sides(window, len(self.window))
            require(
                all(side <= own for side, own in zip(window, self.window, strict=True)),
                f"window: expected at most {list(self.window)}, which the bias covers, got {list(window)}",
            )
        codes = window_codes(window or self.window, self.window, device_of(self))
        if self.with_cls:
            codes = F.pad(codes, (1, 0))  # whose code is never used
        return codes[: self._require_covered(length)]

    def is_cls(self, length: int | None = None, *, window: Sequence[int] | None = None) -> Tensor:
        codes = self.codes(length, window=window)
        place = torch.arange(codes.shape[0], device=codes.device)
        return place < (1 if self.with_cls else 0)

    def code_offset(self, length: int | None = None) -> int:
        self._require_covered(length)
        return window_code_offset(self.window)

    def vector(self, length: int | None = None) -> Tensor:
        self._require_covered(length)
        table = _table_of(self, self._name)
        return table.t().contiguous() if self.with_cls else _with_cls_entries(table, None)

    def _require_covered(self, length: int | None) -> int | None:
        limit = math.prod(self.window) + (1 if self.with_cls else 0)
        require(
            length is None or (isinstance(length, int) and 1 <= length <= limit),
            lambda: f"length: expected at most {limit}, the tokens that the bias covers, got {describe(length)}",
        )
        return length


def _add_table(module: RelativeBias, name: str, rows: int) -> None:
    """Make the table under its public name: an embedding's, one of a list, or a parameter of its own."""
    module.rows = rows
    if name == PARAMETER:
        module.relative_position_bias_table = nn.Parameter(torch.empty(rows, module.heads))
    elif name == EMBEDDING:
        module.relative_attention_bias = nn.Embedding(rows, module.heads)
    else:
        module.rel_pos_table_list = nn.ModuleList([nn.Embedding(rows, module.heads)])
    if name == LIST:
        nn.init.zeros_(module.get_parameter(name))
    else:
        nn.init.trunc_normal_(module.get_parameter(name), std=STANDARD_DEVIATION)


def _table_of(module: RelativeBias, name: str) -> Tensor:
    """The table; raise where another one of other sizes was put in its place, or where hooks were to change it."""
    if module._forward_pre_hooks:
        raise ValueError(
            "bias: expected none with hooks, which nothing calls, got one with; make them permanent, as by prune.remove"
        )
    owner, _, last = name.rpartition(".")
    table = embedding_table(module.get_submodule(owner), module.rows) if owner else getattr(module, last)
    if table.shape != (module.rows, module.heads):
        raise ValueError(f"table: expected [rows, heads], {[module.rows, module.heads]}, got {describe(table)}")
    return table


def _with_cls_entries(entries: Tensor, table: Tensor | None) -> Tensor:
    """[entries, heads] and the three last rows of a table, or zeros, as a vector [heads, entries + 3]."""
    cls = entries.new_zeros(CLS_ENTRIES, entries.shape[1]) if table is None else table[-CLS_ENTRIES:]
    return torch.cat([entries, cls]).t().contiguous()


def _sides(window: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """A window's sides; an int stands for equal ones."""
    sides = (window,) * axes if isinstance(window, int) else tuple(window)
    fits = len(sides) == axes and all(isinstance(side, int) and side > 0 for side in sides)
    require(fits, f"window: expected {axes} positive sides, got {window}")
    return sides


def _require_positive(name: str, value: int) -> None:
    require(isinstance(value, int) and value > 0, f"{name}: expected a positive number, got {describe(value)}")
