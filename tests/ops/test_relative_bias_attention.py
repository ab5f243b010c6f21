"""``relative_bias_attention``: packed self-attention with a relative position bias in code form, in all its ways."""

import importlib

import pytest
import torch
from support import contract
from support.attention_cases import (
    BATCHES,
    Batch,
    kept_grid,
    kept_text,
    long_range,
    mixed,
    random_codes,
    series,
    text_only,
)
from support.attention_ways import CHECKED, DTYPES_OF_WAYS, HEAD_SIZE, in_each, in_each_dtype, in_each_way
from support.contract import normal
from support.kernels import poisoned_memory  # noqa: F401  a fixture of all tests here
from support.plans import naive_layout, whole_rows

from onepeace_fast import relative_bias_attention

BATCHES = {**BATCHES, "long range": long_range, "codes that are no positions": random_codes}
LENGTHS = {
    "reference": ([1], [65], [4, 90, 4], [7, 1, 300], [0, 3, 2], [0, 0], [0], []),
    "padded": ([1], [65], [7, 1, 300], [0, 3, 2], [0, 0], [0], []),
    "slower_path": ([0, 3, 2], [0, 0], [0], []),
    "kernel": ([0, 3, 2], [0, 0], [0], []),
}


def rounded(batch, way, heads=2, dim=32):
    """The batch's leaves in the dtype in which a way is tried."""
    return batch.leaves(heads, dim, dtype=CHECKED[way])


@in_each_dtype
@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients_follow_the_dense_bias(name, way, dtype):
    batch = BATCHES[name]()
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, HEAD_SIZE[way]), dtype, batch.slices())


@in_each_dtype
@pytest.mark.parametrize("bias, head_scale", [(False, False), (True, False), (False, True)])
def test_bias_and_head_scale_are_each_optional(bias, head_scale, way, dtype):
    batch = mixed()
    leaves = batch.leaves(3, 64, bias, head_scale)
    contract.check_against_naive(batch.call, batch.plain, leaves, dtype, batch.slices(3))


@in_each("dtype", {way: dtypes for way, dtypes in DTYPES_OF_WAYS.items() if way != "kernel"})
def test_long_samples_follow_the_dense_bias(way, dtype):
    batch = mixed(long=True)
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 32), dtype, batch.slices())


@in_each_dtype
def test_any_head_size_and_scale(way, dtype):
    signs = (-0.2, 0.0) if way == "kernel" else ()  # which the kernel gives to the queries
    for dim in (64, 128) if way == "kernel" else (1, 64):
        for scale in (None, 0.3, *signs):
            batch = Batch(text_only().layout, text_only().tables, scale)
            contract.check_against_naive(batch.call, batch.plain, batch.leaves(3, dim), dtype, batch.slices(3))


@in_each("lengths", LENGTHS)
def test_every_length_of_sample(lengths, way):
    for inert in (2, 0):
        layout = naive_layout(whole_rows({"text": lengths}), capacity=sum(lengths) + inert)
        batch = Batch(layout, (series(16, 300),))
        for dtype in {CHECKED[way], torch.float16} & {torch.float64, torch.float16}:
            contract.check_against_naive(
                batch.call, batch.plain, batch.leaves(2, HEAD_SIZE[way]), dtype, batch.slices()
            )


@in_each_way
def test_entries_that_no_pair_takes_have_a_gradient_of_exactly_zero(way):
    batch = kept_grid()
    layout, table = batch.layout, batch.tables[0]
    taken = set()
    for sample in range(layout.samples):
        tokens = [layout.tokens[row] for row in layout.rows_of(sample)]
        taken |= {table.row(i, j) for i in tokens for j in tokens}
    gradient = contract.run(batch.call, rounded(batch, way))[1]["table0"]
    untaken = [row for row in range(table.rows) if row not in taken]
    assert not gradient[untaken].any()
    assert gradient[sorted(taken)].all()

    batch = Batch(naive_layout(whole_rows({"text": [4, 3]})), (series(8, 20),))
    gradient = contract.run(batch.call, rounded(batch, way))[1]["table0"]
    reached = {row for row in range(4, 11)} | {15, 16, 17}  # CLS apart, distances -2 to 2; 7 is distance 0
    reached -= {4, 10}
    assert not gradient[[row for row in range(18) if row not in reached]].any()
    assert gradient[sorted(reached)].all()


@in_each_way
def test_with_one_modality_every_head_s_bias_gradient_sums_to_zero(way):
    for batch in (text_only(), kept_text(), kept_grid()):
        leaves = rounded(batch, way)
        if way == "kernel":
            leaves |= {name: leaf.float() for name, leaf in batch.leaves(2, 32).items() if name != "qkv"}
        gradient = contract.run(batch.call, leaves)[1]["table0"]
        bound = {"kernel": 2e-3, "slower_path": 1e-5}.get(way, 1e-12)
        assert (gradient.sum(0).abs() < bound * gradient.abs().sum(0)).all()
        assert gradient.abs().sum(0).min() > 0.1


@pytest.mark.parametrize("way", ["reference", "padded"], indirect=True)
def test_finite_differences_agree(way):
    layout = naive_layout(whole_rows({"text": [3, 1], "image": [2]}), {"text": [1, 0], "image": [1]})
    batch = Batch(layout, (series(2, 3), series(2, 2)))
    contract.check_gradcheck(batch.call, batch.leaves(2, 2))
    contract.check_gradcheck(batch.call, batch.leaves(1, 2, bias=False, head_scale=False))
    contract.check_gradcheck(random_codes().call, random_codes().leaves(head_scale=False))


@in_each_way
def test_registration(way):
    batch = random_codes()
    leaves = rounded(batch, way)
    contract.check_registration(batch.call, leaves, "relative_bias_attention")
    contract.check_registration(batch.call, {"qkv": leaves["qkv"]}, "relative_bias_attention")


@in_each_way
def test_strides_of_inputs_and_gradients_do_not_matter(way):
    batch = mixed()
    contract.check_gradient_layouts(batch.call, rounded(batch, way))
    contract.check_gradient_layouts(batch.call, batch.leaves(2, 32, dtype=torch.float16))
    if way in ("reference", "padded"):  # what a GPU cannot read is refused: see test_relative_bias_attention_on_gpu.py
        contract.check_input_layouts(batch.call, rounded(batch, way), ["qkv"])


@in_each_way
def test_qkv_may_be_a_part_of_a_larger_projection(way):
    batch = mixed()
    leaves = rounded(batch, way)
    rows = batch.layout.capacity
    projection = leaves["qkv"].new_full((rows, 8 + 192 + 16), torch.nan)
    projection[:, 8:-16] = leaves["qkv"].flatten(1)
    part = projection[:, 8:-16].view(rows, 3, 2, 32)
    assert not part.is_contiguous()
    contract.assert_same(contract.run(batch.call, {**leaves, "qkv": part}), contract.run(batch.call, leaves), "slice")


@in_each_way
def test_nan_in_another_sample_does_not_leak(way):
    batch = mixed()
    leaves = rounded(batch, way)
    expected = contract.run(batch.call, leaves)
    for sample in range(batch.layout.samples):
        rows = batch.layout.rows_of(sample)
        others = [row for row in range(batch.layout.capacity) if row not in rows]
        poisoned = {**leaves, "qkv": leaves["qkv"].clone()}
        poisoned["qkv"][rows] = torch.nan
        actual = contract.run(batch.call, poisoned)
        assert torch.equal(actual[0][0][others], expected[0][0][others])
        assert torch.equal(actual[1]["qkv"][others], expected[1]["qkv"][others])


@in_each_way
def test_nan_in_inert_rows_and_in_memory_that_nobody_wrote_reaches_nothing(way):
    batch = mixed()
    leaves = rounded(batch, way)
    given = [normal(batch.layout.capacity, 2, 32, seed=9)]
    expected = contract.run(batch.call, leaves, given)
    inert = slice(len(batch.layout.tokens), None)
    leaves["qkv"][inert], given[0][inert] = torch.nan, torch.nan
    assert torch.empty(3).isnan().all()
    contract.assert_same(contract.run(batch.call, leaves, given), expected, "NaN")
    assert not expected[0][0][inert].any() and not expected[1]["qkv"][inert].any() and len(expected[0][0][inert])


@in_each_way
@pytest.mark.parametrize("rows, factor", [(slice(None), 60), (0, 1e3)], ids=["all", "another sample's"])
def test_large_scores_do_not_overflow(way, rows, factor):
    batch = mixed()
    leaves = batch.leaves(2, 32, dtype=torch.bfloat16 if way == "kernel" else torch.float32)
    leaves["qkv"][rows] *= factor
    outputs, gradients = contract.run(batch.call, leaves)
    assert outputs[0].isfinite().all() and all(gradient.isfinite().all() for gradient in gradients.values())


@in_each_way
def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros(way):
    batch = mixed()
    leaves = rounded(batch, way)
    contract.check_frozen(batch.call, leaves)
    outputs, gradients = contract.run(batch.call, leaves)
    tables = [name for name in leaves if name.startswith("table")]
    for frozen in (tables, tables[1:], [*tables, "head_scale"], [name for name in leaves if name != "head_scale"]):
        actual = contract.run(batch.call, leaves, frozen=frozen)
        contract.assert_same(actual, (outputs, gradients | dict.fromkeys(frozen)), f"{frozen} frozen")
    assert torch.equal(gradients["table3"], torch.zeros_like(leaves["table3"]))
    assert all(gradients[f"table{m}"].any() for m in range(3))


@in_each_way
def test_second_derivative_is_refused(way):
    batch = text_only()
    contract.check_second_derivative(batch.call, rounded(batch, way))


@in_each_way
def test_repeats_are_bitwise_equal(way):
    batch = mixed(long=way != "kernel")
    for dtype in (torch.float32, torch.bfloat16)[way == "kernel" :]:
        contract.check_deterministic(batch.call, batch.leaves(2, 32, dtype=dtype))


@in_each_way
@pytest.mark.parametrize("name", ["kept grid", "three of four modalities"])
def test_compiled_equals_eager(name, way):
    batch = BATCHES[name]()
    batch.arguments  # noqa: B018 (made outside the graph)
    contract.check_compiled(batch.call, rounded(batch, way))


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


@in_each_way
def test_max_length_may_be_unknown_or_too_large(way):
    batch = mixed()
    expected = contract.run(batch.call, rounded(batch, way))
    for max_length in (0, batch.layout.max_length + 3):
        batch.arguments["max_length"] = max_length
        (out,), gradients = contract.run(batch.call, rounded(batch, way))
        torch.testing.assert_close(out, expected[0][0])
        contract.assert_close_gradients(gradients, expected[1], f"max_length {max_length}")


@pytest.mark.parametrize("way", ["padded", "slower_path"], indirect=True)
def test_heads_and_samples_one_at_a_time_give_what_all_at_once_give(monkeypatch, way):
    batch = mixed()
    leaves = rounded(batch, way, 3, 8)
    together = contract.run(batch.call, leaves)
    segments = importlib.import_module("onepeace_fast.ops.segments")  # the padded way has a copy of it
    assert len(list(segments.head_slices(3, 4, *[batch.layout.max_length] * 2))) == 1
    for name in ("PAIRS_OF_DEVICE_HEADS", "PAIRS_OF_A_DEVICE_GROUP"):
        monkeypatch.setattr(segments, name, 1)
        assert list(segments.head_slices(3, 4, 9, 9)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
        apart = contract.run(batch.call, leaves)
        torch.testing.assert_close(apart[0][0], together[0][0])
        contract.assert_close_gradients(apart[1], together[1], f"{name} 1")
