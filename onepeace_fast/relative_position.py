"""Relative positions: the bucketing of public models, and the code form that replaces their [length, length] index.

Every token carries an integer code; the bias of a query i and a key j of one modality depends on ``code_i - code_j``
alone (CLS apart), so each head's table expands once per step into a vector

    vector[h, code_i - code_j + offset],   then three CLS entries: CLS as query, CLS as key, both.

An index here says which row of the bias table each entry of that vector takes. Sources: ONE-PEACE (arXiv 2305.11172),
T5 (arXiv 1910.10683), Swin (arXiv 2103.14030), ALiBi (arXiv 2108.12409).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_POSITIONS = 1024
CLS_ENTRIES = 3


def series_table_rows(bucket_size: int) -> int:
    """Rows of a 1-D bias table: one per bucket and three for CLS."""
    return 2 * bucket_size - 1 + CLS_ENTRIES


def grid_table_rows(grid: int) -> int:
    """Rows of a bias table over a ``grid`` x ``grid`` image: one per 2-D distance and three for CLS."""
    return (2 * grid - 1) ** 2 + CLS_ENTRIES


def series_index(bucket_size: int, max_positions: int = MAX_POSITIONS) -> Tensor:
    """Table row of every 1-D distance from ``1 - max_positions`` to ``max_positions - 1``: int64 on the CPU.

    Exact up to half the bucket size, logarithmic beyond. Computed in float32 as upstream does, so that ceil agrees.
    """
    distance = torch.arange(1 - max_positions, max_positions, device="cpu")
    middle = bucket_size // 2
    magnitude = distance.abs().clamp(min=middle - 1)
    steps = torch.log(magnitude.to(torch.float32) / middle) / math.log((max_positions - 1) / middle) * (middle - 1)
    logarithmic = (middle + torch.ceil(steps).long()) * distance.sign()
    return torch.where(magnitude <= middle, distance, logarithmic) + bucket_size - 1


def series_vector_index(index: Tensor, bucket_size: int, width: int) -> Tensor:
    """Table rows of the vector for positions 0 to ``width - 1``: int64 [2 * width - 1 + 3].

    ``index`` is ``series_index(bucket_size)``, whose centre is distance 0.
    """
    centre = index.shape[0] // 2
    first_cls_row = 2 * bucket_size - 1
    cls = torch.arange(first_cls_row, first_cls_row + CLS_ENTRIES, device=index.device)
    return torch.cat([index[centre - (width - 1) : centre + width], cls])


def t5_index(buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """T5's bucket of every distance query - key from ``-max_distance`` to ``max_distance``: int64 on the CPU.

    Exact up to half the buckets of a direction, logarithmic up to ``max_distance``, then the last one. Bidirectional,
    the second half of the buckets is that of keys behind the query; otherwise these share the bucket of distance 0.
    Computed in float32 as public code does, so that rounding agrees.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    if bidirectional:
        buckets //= 2
        first, magnitude = (distance < 0).long() * buckets, distance.abs()
    else:
        first, magnitude = torch.zeros_like(distance), distance.clamp(min=0)
    exact = buckets // 2
    far = magnitude.clamp(min=exact).to(torch.float32)
    steps = torch.log(far / exact) / math.log(max_distance / exact) * (buckets - exact)
    logarithmic = (exact + steps.long()).clamp(max=buckets - 1)
    return first + torch.where(magnitude < exact, magnitude, logarithmic)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head: float64 on the CPU, 2 ** (-8 h / heads) for h from 1, of a power of two of heads.

    Other numbers take the slopes of the power of two below, then every second one of the power of two above.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float64, device="cpu")


def window_table_rows(window: Sequence[int]) -> int:
    """Rows of a bias table over a window of any number of axes, CLS not counted: one per distance."""
    return math.prod([2 * side - 1 for side in window])


def window_codes(
    window: Sequence[int], table_window: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Codes of the tokens of a window, row by row: int32 [tokens].

    The strides are those of the table's own window, so a smaller window shares a larger table.
    """
    codes = torch.zeros(1, dtype=torch.int32, device=device)
    for side, table_side in zip(window, table_window, strict=True):
        place = torch.arange(side, dtype=torch.int32, device=device)
        codes = (codes[:, None] * (2 * table_side - 1) + place).flatten()
    return codes


def window_code_offset(table_window: Sequence[int]) -> int:
    """Entry of a window's vector that belongs to distance zero on all axes: the middle one."""
    return window_table_rows(table_window) // 2


def grid_codes(grid: int, table_grid: int, device: torch.device | str | None = None) -> Tensor:
    """Codes of the tokens of a square image, CLS (whose code is never used) first: int32 [grid * grid + 1].

    The stride is that of the table's own grid, so a smaller image shares a larger table.
    """
    codes = window_codes((grid, grid), (table_grid, table_grid), device)
    return torch.cat([codes.new_zeros(1), codes])


def grid_code_offset(table_grid: int) -> int:
    """Entry of the grid's vector that belongs to distance (0, 0)."""
    return window_code_offset((table_grid, table_grid))


def distinct_difference_codes(count: int) -> Tensor:
    """Codes whose differences are all distinct, so that each ordered pair has an entry of its own: int64 [count].

    2 p k + (k^2 mod p) with a prime p (Erdos and Turan, 1941); the largest is below 2 p^2.
    """
    prime = max(count, 2)
    while any(prime % divisor == 0 for divisor in range(2, math.isqrt(prime) + 1)):
        prime += 1
    k = torch.arange(count, device="cpu")
    return 2 * prime * k + k * k % prime


def pair_table_rows(count: int) -> int:
    """Rows of a bias table with one for each ordered pair of unlike tokens, one for equal ones and three for CLS."""
    return 1 + count * (count - 1) + CLS_ENTRIES


def pair_vector_index(count: int) -> Tensor:
    """Table rows of the vector for ``distinct_difference_codes(count)``, whose middle is difference 0: int64 [entries].

    Equal tokens have row 0; then come the pairs, query by query. A difference that no pair has takes row 0 too.
    """
    codes = distinct_difference_codes(count)
    offset, rows = int(codes[-1]), pair_table_rows(count)
    index = torch.zeros(2 * offset + 1, dtype=torch.int64, device="cpu")
    unlike = ~torch.eye(count, dtype=torch.bool, device="cpu")
    index[(codes[:, None] - codes)[unlike] + offset] = torch.arange(1, rows - CLS_ENTRIES, device="cpu")
    return torch.cat([index, torch.arange(rows - CLS_ENTRIES, rows, device="cpu")])


def dense_index(
    code: Tensor, is_cls: Tensor, offset: int, entries: int, keys: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Entry of a vector for every pair of tokens: int64 [..., length, length], queries before keys.

    ``code`` and ``is_cls`` are [..., length], and so are the two of ``keys``, where these are other tokens; ``entries``
    is the vector's length, its three CLS entries included.
    """
    key_code, key_is_cls = (code, is_cls) if keys is None else keys
    index = code.unsqueeze(-1).long() - key_code.unsqueeze(-2).long() + offset
    query, key = is_cls.unsqueeze(-1), key_is_cls.unsqueeze(-2)
    index = torch.where(key, entries - 2, torch.where(query, entries - 3, index))
    return torch.where(query & key, entries - 1, index)
