"""Tables: a token for each column, missing cells, a bias for each pair of columns, and what is refused."""

import math

import pytest
import torch
from data._refused import refused
from models._added import CONFIG, check_others_keep_their_bits, check_packed_is_padded, check_rows_stand_alone, extended
from models._mico import refusal

from onepeace_fast.layers.adapters import TableAdapter
from onepeace_fast.relative_position import distinct_difference_codes

NUMERIC = {"age": (40.0, 10.0), "pressure": (1013.0, 4.0)}
CATEGORICAL = {"colour": ["red", "green", "blue"], "size": ["small", "large"]}
ROWS = [
    {"age": 55, "pressure": 1011.0, "colour": "blue", "size": "small"},
    {"age": math.nan, "colour": "red", "size": None},
    {},
    {"age": -5.0, "pressure": 2000, "colour": "green", "size": "large"},
]


def make(config):
    return TableAdapter(config, NUMERIC, CATEGORICAL)


def batch(rows):
    return make(CONFIG).batch("other", rows)


def test_tables_leave_all_other_outputs_bitwise_alone():
    check_others_keep_their_bits(make)


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:1], ROWS[2:3], [ROWS[0]] * 3], ids=["mixed", "one", "empty", "duplicates"]
)
def test_tables_are_one_packed_and_padded_in_value_and_gradient(rows):
    unread = [] if rows == ROWS else ["embed_missing"] if rows[0] else ["embed_numbers", "embed_categories.weight"]
    check_packed_is_padded(make, batch(rows), tuple(unread))


@pytest.mark.parametrize(("numeric", "categorical"), [({"a": (0.0, 1.0)}, {}), ({}, {"a": ["x"]})])
def test_a_table_of_one_column_has_a_token_beside_cls(numeric, categorical):
    rows = [{"a": 3.0}] if numeric else [{"a": "x"}]

    def make_one(config):
        return TableAdapter(config, numeric, categorical)

    inputs = make_one(CONFIG).batch("other", [*rows, {}])
    check_packed_is_padded(make_one, inputs)
    assert extended(make_one).encode(**inputs)["other"].shape == (2, 2, 48)


def test_rows_embed_as_they_do_alone():
    check_rows_stand_alone(make, batch(ROWS), [batch([row]) for row in ROWS])


def test_numbers_are_standardised_and_categories_are_numbered_in_order():
    expected = [[1.5, -0.5, 2, 0], [math.nan, math.nan, 0, math.nan], [math.nan] * 4, [-4.5, 246.75, 1, 1]]
    torch.testing.assert_close(batch(ROWS)["other"], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_a_token_is_its_cell_s_embedding_beside_its_column_s():
    adapter = extended(make).encoder.adapter("other")
    found = adapter(batch(ROWS)["other"]) - adapter.embed_positions
    numbers, categories, missing = adapter.embed_numbers, adapter.embed_categories.weight, adapter.embed_missing
    expected = [
        [1.5 * numbers[0], -0.5 * numbers[1], categories[2], categories[3]],
        [missing[0], missing[1], categories[0], missing[3]],
        [*missing],
        [-4.5 * numbers[0], 246.75 * numbers[1], categories[1], categories[4]],
    ]
    for row, cells in enumerate(expected):
        torch.testing.assert_close(found[row], torch.stack([adapter.cls_embedding[0, 0], *cells]))


def test_a_missing_cell_has_finite_gradients_and_none_for_its_embedding():
    model = extended(make)
    model.embed(**batch([{"age": 55}])).sum().backward()
    adapter = model.encoder.adapter("other")
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters() if parameter.grad is not None)
    assert adapter.embed_numbers.grad.any(1).tolist() == [True, False]
    assert adapter.embed_missing.grad.any(1).tolist() == [False, True, True, True]
    assert not adapter.embed_categories.weight.grad.any()


def test_every_ordered_pair_of_columns_has_a_bias_of_its_own():
    for columns in (1, 2, 3, 4, 9, 30):
        adapter = TableAdapter(CONFIG, {f"c{i}": (0.0, 1.0) for i in range(columns)}, {})
        index = adapter.dense_table_index(1 + columns)
        inner, rows = index[1:, 1:], len(adapter.rel_pos_table_list[0].weight)
        apart = inner[~torch.eye(columns, dtype=torch.bool)]
        assert apart.tolist() == list(range(1, columns * (columns - 1) + 1)) and not inner.diag().any()
        assert (index[0, 1:] == rows - 3).all() and (index[1:, 0] == rows - 2).all() and index[0, 0] == rows - 1


@pytest.mark.parametrize("count", [1, 2, 3, 8, 25, 49, 128])
def test_codes_of_pairs_have_distinct_differences(count):
    codes = distinct_difference_codes(count)
    differences = (codes[:, None] - codes)[~torch.eye(count, dtype=torch.bool)]
    assert len(codes) == count and len(differences.unique()) == count * (count - 1) and not (differences == 0).any()


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"age": "old"}, "other, row 1, column 'age': expected a number, finite in float32, got str 'old'"),
        ({"age": True}, "other, row 1, column 'age': expected a number, finite in float32, got bool True"),
        ({"age": math.inf}, "other, row 1, column 'age': expected a number, finite in float32, got float inf"),
        ({"age": 1e300}, "other, row 1, column 'age': expected a number, finite in float32, got float 1e+300"),
        (
            {"age": 10**400},
            "other, row 1, column 'age': expected a number, finite in float32, got int 1" + 56 * "0" + "...",
        ),
        ({"size": "tiny"}, "other, row 1, column 'size': expected one of 'small', 'large', got str 'tiny'"),
        ({"colour": 2}, "other, row 1, column 'colour': expected one of 'red', 'green', 'blue', got int 2"),
        ({"weight": 2}, "other, row 1: expected columns 'age', 'pressure', 'colour', 'size', got 'weight'"),
        ([1, 2], "other, row 1: expected a mapping from column to cell, got list [1, 2]"),
    ],
    ids=str,
)
def test_cells_that_do_not_fit_are_refused_by_row_and_column(row, line):
    assert refusal(lambda: batch([ROWS[0], row])) == line


def test_a_line_shows_some_of_many_categories():
    adapter = TableAdapter(CONFIG, {}, {"city": [f"c{i}" for i in range(100)]})
    line = refused(lambda: adapter.batch("other", [{"city": "Rome"}]), "other, row 0, column 'city'")
    assert line.endswith("'c6', 'c7' and 92 more, got str 'Rome'")


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (torch.zeros(2, 3), "expected a number for each of 4 columns, got float32 [2, 3]"),
        (torch.zeros(2, 4, dtype=torch.int64), "expected float32 or float64 [rows, 4], got int64"),
        (torch.zeros(2, 4).bfloat16(), "expected float32 or float64 [rows, 4], got bfloat16"),
        (torch.tensor([[0, 0, 3.0, 0]]), "expected categories by number as batch gives them, got 1 others"),
        (torch.tensor([[0, 0, 0.5, -1.0]]), "expected categories by number as batch gives them, got 2 others"),
        (torch.tensor([[math.inf, 0, 0, 0]]), "expected finite numbers, NaN where missing, got 1 others"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(value, part):
    refused(lambda: extended(make).embed(other=value), "other: ", part)


def test_values_that_are_no_category_or_no_number_are_counted_and_missing_ones_are_not():
    value = torch.tensor([[math.inf, -math.inf, 3, 1], [math.nan, 0, math.nan, 2], [0, math.inf, -1, 0.5]])
    assert [int(count) for count, _ in make(CONFIG).faults("other", value, None)] == [3, 4]


@pytest.mark.parametrize(
    ("numeric", "categorical", "start"),
    [
        ({}, {}, "numeric, categorical: expected 1 to 128 columns"),
        ({"a": (0.0, 1.0)}, {"a": ["x"]}, "numeric, categorical: "),
        ({f"c{i}": (0.0, 1.0) for i in range(129)}, {}, "numeric, categorical: "),
        ({"a": (0.0, 0.0)}, {}, "numeric['a']: expected (mean, deviation above 0), got tuple (0.0, 0.0)"),
        ({}, {"a": []}, "categorical['a']: "),
        ({}, {"a": "xyz"}, "categorical['a']: "),
        ({}, {"a": ["x", "x"]}, "categorical['a']: "),
        ({}, {"a": [1, 2]}, "categorical['a']: expected a list of its categories' names, each once, got list [1, 2]"),
        ({}, {"a": {"x"}}, "categorical['a']: expected a list of its categories' names, each once, got set {'x'}"),
        ({}, {"a": 5}, "categorical['a']: "),
        ({"a": 5}, {}, "numeric['a']: expected (mean, deviation above 0), got int 5"),
        ({"a": (1.0, 2.0, 3.0)}, {}, "numeric['a']: expected (mean, deviation above 0), got tuple (1.0, 2.0, 3.0)"),
        (["a"], {}, "numeric: expected a mapping from columns, got list ['a']"),
    ],
)
def test_columns_that_do_not_fit_are_refused_in_one_line(numeric, categorical, start):
    refused(lambda: TableAdapter(CONFIG, numeric, categorical), start)


def test_no_rows_are_refused_in_one_line():
    refused(lambda: batch([]), "other: expected at least one of rows")


def test_a_model_in_half_precision_takes_a_table_and_keeps_the_numbers_of_categories():
    adapter = TableAdapter(CONFIG, {}, {"city": [f"c{i}" for i in range(1000)]}).bfloat16()
    inputs = adapter.batch("other", [{"city": "c999"}])["other"]
    assert torch.equal(adapter.tokens(inputs)[0, 1], adapter.embed_categories.weight[999])
