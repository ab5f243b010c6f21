"""``relative_bias_attention``: packed self-attention with a relative position bias in code form."""

import pytest
import torch
from support import contract, naive
from support.attention_cases import Batch, kept_grid, kept_text, mixed, random_codes, series, text_only
from support.contract import normal
from support.plans import naive_layout, whole_rows

from onepeace_fast import relative_bias_attention
from onepeace_fast.tolerance import DTYPES

BATCHES = {
    "text": text_only,
    "kept text": kept_text,
    "kept grid": kept_grid,
    "small grid in a larger table": lambda: kept_grid(3, 5),
    "mixed": mixed,
}


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients_follow_the_dense_bias(name, dtype):
    batch = BATCHES[name]()
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(), dtype, batch.slices())


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("bias, head_scale", [(False, False), (True, False), (False, True)])
def test_bias_and_head_scale_are_each_optional(bias, head_scale, dtype):
    batch = mixed()
    leaves = batch.leaves(3, 5, bias, head_scale)
    contract.check_against_naive(batch.call, batch.plain, leaves, dtype, batch.slices(3))


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
def test_long_samples_follow_the_dense_bias(dtype):
    batch = mixed(long=True)
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 16), dtype, batch.slices())


@pytest.mark.parametrize("dim", (1, 64))
def test_any_head_size_and_scale(dim):
    batch = text_only()
    for scale in (None, 0.3):
        batch = Batch(batch.layout, batch.tables, scale)
        for dtype in (torch.float64, torch.bfloat16):
            contract.check_against_naive(batch.call, batch.plain, batch.leaves(3, dim), dtype, batch.slices(3))


@pytest.mark.parametrize("lengths", ([1], [65], [7, 1, 300], [0, 3, 2], [0], []), ids=str)
def test_every_length_of_sample(lengths):
    batch = Batch(naive_layout(whole_rows({"text": lengths})), (series(16, 300),))
    for dtype in (torch.float64, torch.float16):
        contract.check_against_naive(batch.call, batch.plain, batch.leaves(), dtype, batch.slices())


def test_codes_may_be_anything_whose_differences_lie_in_the_vector():
    layout, entries, offset = random_codes()
    leaves = {"qkv": normal(layout.capacity, 3, 2, 4, seed=1), "vector": normal(2, entries, seed=2)}

    def call(qkv, vector):
        return relative_bias_attention(qkv, bias=[vector], code_offsets=[offset], **layout.attention_arguments())

    def plain(qkv, vector):
        return naive.attention(qkv, layout, [vector.t()], [naive.vector_row(offset, entries)], None)

    for dtype in (torch.float64, torch.bfloat16):
        contract.check_against_naive(call, plain, leaves, dtype)
    contract.check_gradcheck(call, leaves)


def test_entries_that_no_pair_takes_have_a_gradient_of_exactly_zero():
    batch = kept_grid()
    leaves = batch.leaves()
    layout, table = batch.layout, batch.tables[0]
    taken = set()
    for sample in range(layout.samples):
        tokens = [layout.tokens[row] for row in layout.rows_of(sample)]
        taken |= {table.row(i, j) for i in tokens for j in tokens}
    gradient = contract.run(batch.call, leaves)[1]["table0"]
    untaken = [row for row in range(table.rows) if row not in taken]
    assert not gradient[untaken].any()
    assert gradient[sorted(taken)].all()

    batch = Batch(naive_layout(whole_rows({"text": [4, 3]})), (series(8, 20),))
    gradient = contract.run(batch.call, batch.leaves())[1]["table0"]
    reached = {row for row in range(4, 11)} | {15, 16, 17}  # CLS apart, distances -2 to 2; 7 is distance 0
    reached -= {4, 10}
    assert not gradient[[row for row in range(18) if row not in reached]].any()
    assert gradient[sorted(reached)].all()


def test_with_one_modality_every_head_s_bias_gradient_sums_to_zero():
    for batch in (text_only(), kept_text(), kept_grid()):
        gradient = contract.run(batch.call, batch.leaves())[1]["table0"]
        assert (gradient.sum(0).abs() < 1e-12 * gradient.abs().sum(0)).all()
        assert gradient.abs().sum(0).min() > 0.1


def test_finite_differences_agree():
    layout = naive_layout(whole_rows({"text": [3, 1], "image": [2]}), {"text": [1, 0], "image": [1]})
    batch = Batch(layout, (series(2, 3), series(2, 2)))
    contract.check_gradcheck(batch.call, batch.leaves(2, 2))
    contract.check_gradcheck(batch.call, batch.leaves(1, 2, bias=False, head_scale=False))


def test_registration():
    layout, entries, offset = random_codes()
    leaves = {"qkv": normal(layout.capacity, 3, 2, 4, seed=1), "vector": normal(2, entries, seed=2)}
    leaves["head_scale"] = normal(2, seed=3)

    def call(qkv, vector=None, head_scale=None):
        bias, offsets = ([], []) if vector is None else ([vector], [offset])
        arguments = layout.attention_arguments()
        return relative_bias_attention(qkv, bias=bias, code_offsets=offsets, head_scale=head_scale, **arguments)

    contract.check_registration(call, leaves, "relative_bias_attention")
    contract.check_registration(call, {"qkv": leaves["qkv"]}, "relative_bias_attention")


def test_strides_of_inputs_and_gradients_do_not_matter():
    batch = mixed()
    leaves = batch.leaves()
    contract.check_input_layouts(batch.call, leaves, ["qkv"])
    contract.check_gradient_layouts(batch.call, leaves)
    contract.check_gradient_layouts(batch.call, {name: leaf.bfloat16() for name, leaf in leaves.items()})


def test_qkv_may_be_a_part_of_a_larger_projection():
    batch = text_only()
    leaves = batch.leaves(2, 4)
    rows = batch.layout.capacity
    projection = torch.full((rows, 5 + 24 + 2), torch.nan, dtype=torch.float64)
    projection[:, 5:-2] = leaves["qkv"].flatten(1)
    part = projection[:, 5:-2].view(rows, 3, 2, 4)
    assert not part.is_contiguous()
    contract.assert_same(contract.run(batch.call, {**leaves, "qkv": part}), contract.run(batch.call, leaves), "slice")


def test_nan_in_another_sample_does_not_leak():
    batch = mixed()
    leaves = batch.leaves()
    expected = contract.run(batch.call, leaves)
    for sample in range(batch.layout.samples):
        rows = batch.layout.rows_of(sample)
        others = [row for row in range(batch.layout.capacity) if row not in rows]
        poisoned = {**leaves, "qkv": leaves["qkv"].clone()}
        poisoned["qkv"][rows] = torch.nan
        actual = contract.run(batch.call, poisoned)
        assert torch.equal(actual[0][0][others], expected[0][0][others])
        assert torch.equal(actual[1]["qkv"][others], expected[1]["qkv"][others])


def test_nan_in_inert_rows_reaches_nothing():
    batch = mixed()
    leaves = batch.leaves()
    given = [normal(batch.layout.capacity, 2, 4, seed=9)]
    expected = contract.run(batch.call, leaves, given)
    inert = slice(len(batch.layout.tokens), None)
    leaves["qkv"][inert], given[0][inert] = torch.nan, torch.nan
    contract.assert_same(contract.run(batch.call, leaves, given), expected, "NaN in inert rows")
    assert not expected[0][0][inert].any() and not expected[1]["qkv"][inert].any()


def test_large_scores_do_not_overflow():
    batch = text_only()
    leaves = {name: leaf.float() for name, leaf in batch.leaves().items()}
    leaves["qkv"] = leaves["qkv"] * 60
    outputs, gradients = contract.run(batch.call, leaves)
    assert outputs[0].isfinite().all() and all(gradient.isfinite().all() for gradient in gradients.values())


def test_samples_are_attended_alone():
    batch = mixed()
    leaves = batch.leaves()
    together = batch.call(**leaves)
    for sample in range(batch.layout.samples):
        rows = batch.layout.rows_of(sample)
        changed = {**leaves, "qkv": normal(*leaves["qkv"].shape, seed=77)}
        changed["qkv"][rows] = leaves["qkv"][rows]
        assert torch.equal(batch.call(**changed)[rows], together[rows])


def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros():
    batch = mixed()
    leaves = batch.leaves()
    contract.check_frozen(batch.call, leaves)
    gradients = contract.run(batch.call, leaves)[1]
    assert torch.equal(gradients["table3"], torch.zeros_like(leaves["table3"]))
    assert all(gradients[f"table{m}"].any() for m in range(3))


def test_second_derivative_is_refused():
    batch = text_only()
    contract.check_second_derivative(batch.call, batch.leaves())


def test_repeats_are_bitwise_equal():
    batch = mixed(long=True)
    for dtype in (torch.float32, torch.bfloat16):
        contract.check_deterministic(batch.call, {name: leaf.to(dtype) for name, leaf in batch.leaves().items()})


def test_compiled_equals_eager():
    batch = mixed()
    batch.arguments  # noqa: B018 (made outside the graph)
    contract.check_compiled(batch.call, batch.leaves())


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(qkv, table0, head_scale, entries, offset, **arguments):
        vector = table0[entries].t()
        return relative_bias_attention(qkv, bias=[vector], code_offsets=[offset], head_scale=head_scale, **arguments)

    cases = []
    for lengths in ([6, 3], [2, 9], [7, 4]):  # the first case's sizes are all different, so that none share a symbol
        batch = Batch(naive_layout(whole_rows({"text": lengths})), (series(4, max(lengths)),))
        table = batch.tables[0]
        cases.append((batch.leaves(), {"entries": table.entries, "offset": table.offset, **batch.arguments}))
    contract.check_compiled_once(cases, call)


def test_max_length_is_optional():
    batch = text_only()
    expected = batch.call(**batch.leaves())
    batch.arguments["max_length"] = 0
    assert torch.equal(batch.call(**batch.leaves()), expected)
