"""Upstream's bucketing of distances, and the code form that stands for its [length, length] index."""

import random

import pytest
import torch
from support import naive
from support.attention_cases import grid, series
from support.plans import Token, kept_positions

from onepeace_fast.relative_position import (
    dense_index,
    grid_code_offset,
    grid_codes,
    grid_table_rows,
    series_index,
    series_table_rows,
    series_vector_index,
)

BUCKETS = (2, 4, 16, 256, 512)


def tokens_of(positions: list[int], codes: list[int] | None = None) -> list[Token]:
    """CLS (position 0) and patches or words at the given positions."""
    return [Token(0, 0, p, p if codes is None else codes[p], 0, p, 0) for p in positions]


def index_of(tokens: list[Token], offset: int, entries: int) -> torch.Tensor:
    code = torch.tensor([token.code for token in tokens], dtype=torch.int32)
    return dense_index(code, torch.tensor([token.is_cls for token in tokens]), offset, entries)


@pytest.mark.parametrize("buckets", BUCKETS)
def test_a_distance_s_row_is_the_textbook_bucket(buckets):
    index = series_index(buckets)
    assert index.dtype == torch.int64 and index.shape == (2047,)
    expected = [naive.series_bucket(distance, buckets) + buckets - 1 for distance in range(-1023, 1024)]
    assert index.tolist() == expected


@pytest.mark.parametrize("buckets", BUCKETS)
def test_buckets_are_symmetric_growing_exact_up_to_the_middle_and_end_at_1023(buckets):
    bucket = series_index(buckets) - (buckets - 1)
    assert torch.equal(bucket, -bucket.flip(0))
    assert (bucket.diff() >= 0).all()
    middle, centre = buckets // 2, 1023
    assert bucket[centre - middle : centre + middle + 1].tolist() == list(range(-middle, middle + 1))
    assert bucket[-1] == buckets - 1 and bucket[0] == 1 - buckets
    assert series_index(buckets).min() == 0 and series_index(buckets).max() == series_table_rows(buckets) - 4


def test_rows_of_tables():
    assert series_table_rows(256) == 2 * 256 + 2
    assert grid_table_rows(16) == 31 * 31 + 3


@pytest.mark.parametrize("buckets, width", [(4, 1), (4, 9), (256, 72), (512, 750), (256, 1024)])
def test_a_vector_takes_the_rows_of_its_distances_and_ends_with_the_three_of_cls(buckets, width):
    rows = series_vector_index(series_index(buckets), buckets, width).tolist()
    assert len(rows) == 2 * width - 1 + 3
    assert rows[:-3] == [naive.series_bucket(d, buckets) + buckets - 1 for d in range(1 - width, width)]
    assert rows[-3:] == [2 * buckets - 1, 2 * buckets, 2 * buckets + 1]


@pytest.mark.parametrize("buckets, limit", [(4, 12), (256, 1023)])
def test_the_code_form_of_a_series_is_the_dense_index_also_for_visible_subsets(buckets, limit):
    table = series(buckets, limit + 1)
    for seed, count in enumerate((1, 2, 13)):
        positions = kept_positions([count], limit, seed)[0]
        positions[-1] = limit if count > 1 else 0
        random.Random(seed).shuffle(positions)
        tokens = tokens_of(positions)
        index = table.entries[index_of(tokens, table.offset, len(table.entries))]
        assert index.tolist() == [[table.row(i, j) for j in tokens] for i in tokens]


@pytest.mark.parametrize("side, table_grid", [(1, 1), (3, 3), (3, 5), (4, 4), (1, 4)])
def test_the_code_form_of_a_grid_is_the_dense_index_also_for_smaller_images_and_visible_subsets(side, table_grid):
    table, codes = grid(table_grid, side), grid_codes(side, table_grid)
    assert codes.dtype == torch.int32 and codes.shape == (side * side + 1,)
    total = side * side + 1
    for positions in (list(range(total)), [*range(1, total), 0], kept_positions([(total + 1) // 2], total - 1, 5)[0]):
        tokens = tokens_of(positions, codes.tolist())
        index = index_of(tokens, grid_code_offset(table_grid), grid_table_rows(table_grid))
        assert index.tolist() == [[table.row(i, j) for j in tokens] for i in tokens]


def test_a_smaller_image_takes_the_table_rows_of_the_same_distances():
    small, large = (grid_codes(side, 5) for side in (3, 5))
    places = [0] + [1 + y * 5 + x for y in range(3) for x in range(3)]
    assert torch.equal(small[1:], large[places[1:]])


def test_dense_index_takes_leading_dimensions():
    code = torch.tensor([[1, 2, 0], [0, 5, 3]], dtype=torch.int32)
    is_cls = torch.tensor([[False, False, True], [False, False, False]])
    both = dense_index(code, is_cls, 6, 16)
    assert both.shape == (2, 3, 3)
    for i in range(2):
        assert torch.equal(both[i], dense_index(code[i], is_cls[i], 6, 16))
    assert both[0].tolist() == [[6, 5, 14], [7, 6, 14], [13, 13, 15]]
    assert both[1].tolist() == [[6, 1, 3], [11, 6, 8], [9, 4, 6]]


def test_codes_follow_the_device():
    assert grid_codes(3, 3, torch.device("meta")).device.type == "meta"


def test_buckets_are_computed_in_float32_as_upstream_s(monkeypatch):
    """In float64 some distances fall into the next bucket, of 74 buckets for instance."""
    seen, log = [], torch.log
    monkeypatch.setattr(torch, "log", lambda x: seen.append(x.dtype) or log(x))
    series_index(74)
    assert seen == [torch.float32]
