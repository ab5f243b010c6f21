"""``routed_linear``, by the reference, by its kernel and by a product for each modality."""

import sys
from itertools import pairwise

import pytest
import torch
from support import contract
from support.contract import normal
from support.kernels import (
    CHECKED,
    CONTRACT_DTYPES,
    DEVICE,
    HALF,
    PRODUCT_DTYPE,
    REFERENCE_ONLY,
    REPEATS,
    first,
    int32,
    on_device,
    product_size,
)
from support.linear_cases import leaves_of, lists_of, op, plain
from support.plans import ragged_offsets
from support.tiles import small_tiles

from onepeace_fast import routed_linear
from onepeace_fast.kernels import unavailable_reason

op_file = sys.modules["onepeace_fast.ops.routed_linear"]
COUNTS = first(([5, 0, 7], [1], [0, 1, 65], [0, 0], [40, 3, 70, 0]), 2)
DTYPES = CONTRACT_DTYPES if REFERENCE_ONLY or DEVICE == "cpu" else (torch.bfloat16,)
HOST = pytest.mark.parametrize("host", (False, True), ids=("offsets", "row counts"))


@pytest.fixture(autouse=True)
def tiles():
    with small_tiles():
        yield


def parts_of(counts):
    return [slice(a, b) for a, b in pairwise(ragged_offsets(counts).tolist())]


@HOST
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_values_and_gradients_follow_the_naive_ones(counts, dtype, host):
    slices = {"out0": parts_of(counts), "x": parts_of(counts)}
    for width, columns, bias, inert in first(((64, 96, False, 3), (96, 200, True, 2), (63, 7, True, 5))):
        leaves = on_device(leaves_of(counts, *product_size(width, columns), bias, inert))
        contract.check_against_naive(op(counts, host), plain(counts), leaves, dtype, slices)


def test_one_launch_runs_where_counts_are_unknown_and_products_where_they_are_known(monkeypatch):
    if REFERENCE_ONLY:
        pytest.skip("no kernel runs here")
    calls = []
    for name in ("routed_linear_reference", "routed_linear_backward_reference"):
        original = getattr(op_file, name)
        monkeypatch.setattr(op_file, name, lambda *given, f=original, n=name: calls.append(n) or f(*given))
    for host, expected in ((False, 0), (True, 2)):
        leaves = on_device(leaves_of([3, 2], *product_size(64, 96)), PRODUCT_DTYPE)
        contract.run(op([3, 2], host), leaves)
        assert len(calls) == expected


@pytest.mark.skipif(unavailable_reason() is not None, reason="the tiles need Triton")
@pytest.mark.parametrize(
    ("shape", "columns", "dtype", "said"),
    [
        ((3, 12), 16, torch.bfloat16, "x: one launch for all modalities takes multiples of 8 columns, got 12"),
        ((3, 16), 12, torch.float16, "weight: one launch for all modalities takes multiples of 8 rows, got 12"),
        ((3, 16), 16, torch.float32, None),
        ((3, 16), 16, torch.float64, "x: one launch for all modalities takes float16 and bfloat16"),
        ((3, 16), 16, torch.bfloat16, None),
    ],
)
def test_what_one_launch_cannot_take_is_said(shape, columns, dtype, said):
    reason = op_file._untaken_by_tiles(torch.empty(shape, dtype=dtype), columns, 2)
    assert reason is None if said is None else str(reason).startswith(said)
    assert op_file._untaken_by_tiles(torch.empty(3, 16, dtype=HALF), 16, 65).endswith("at most 64 modalities, got 65")


@HOST
def test_inert_rows_are_zero_and_nan_in_them_or_in_another_modality_reaches_nothing(host):
    counts, call = [5, 4, 7], op([5, 4, 7], host)
    leaves = on_device(leaves_of(counts, *product_size(64, 96), inert=3), CHECKED if REFERENCE_ONLY else PRODUCT_DTYPE)
    given = [normal(19, leaves["weight0"].shape[0], seed=9, dtype=leaves["x"].dtype).to(DEVICE)]
    expected = contract.run(call, leaves, given)
    assert not expected[0][0][16:].any() and not expected[1]["x"][16:].any()
    for tensor in (leaves["x"], given[0]):
        tensor[16:] = torch.nan
    contract.assert_same(contract.run(call, leaves, given), expected, "NaN in inert rows")
    leaves["x"][5:9] = torch.nan
    leaves["weight1"][:] = torch.nan
    actual, others = contract.run(call, leaves, given), [*range(5), *range(9, 16)]
    assert torch.equal(actual[0][0][others], expected[0][0][others])
    for name, gradient in expected[1].items():
        if name == "x":
            assert torch.equal(actual[1]["x"][others], gradient[others])
        elif not name.endswith("1"):
            assert torch.equal(actual[1][name], gradient), name


def test_finite_differences_agree():
    for bias in (True, False):
        contract.check_gradcheck(op([2, 0, 1]), leaves_of([2, 0, 1], 4, 3, bias, inert=1))


@HOST
def test_registration(host):
    for bias in (True, False):
        leaves = on_device(
            leaves_of([2, 0, 3], *product_size(16, 8), bias), CHECKED if REFERENCE_ONLY else PRODUCT_DTYPE
        )
        contract.check_registration(op([2, 0, 3], host), leaves, "routed_linear")


@HOST
def test_strides_of_inputs_and_gradients_do_not_matter(host):
    counts = [3, 0, 4]
    leaves = on_device(leaves_of(counts, *product_size(16, 24)), CHECKED if REFERENCE_ONLY else PRODUCT_DTYPE)
    call = op(counts, host)
    expected = contract.run(call, leaves)
    for layout in contract.LAYOUTS:
        for name in ("x", "weight0", "bias2"):
            actual = contract.run(call, {**leaves, name: layout(leaves[name])})
            contract.assert_close_gradients({"y": actual[0][0]}, {"y": expected[0][0]}, layout.__name__)
            contract.assert_close_gradients(actual[1], expected[1], layout.__name__)
    contract.check_gradient_layouts(call, leaves)


@HOST
def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros(host):
    counts = [5, 0, 2]
    leaves = on_device(leaves_of(counts, *product_size(16, 24)), CHECKED if REFERENCE_ONLY else PRODUCT_DTYPE)
    contract.check_frozen(op(counts, host), leaves)
    for name, gradient in contract.run(op(counts, host), leaves)[1].items():
        assert not gradient.any() if name.endswith("1") else gradient.any(), name


def test_second_derivative_is_refused():
    contract.check_second_derivative(op([2, 1]), on_device(leaves_of([2, 1], 8, 8), CHECKED))


@HOST
def test_repeats_are_bitwise_equal(host):
    counts = [33, 0, 40]
    dtype = HALF if DEVICE == "cuda" else torch.float32
    contract.check_deterministic(
        op(counts, host), on_device(leaves_of(counts, *product_size(64, 72), inert=2), dtype), REPEATS
    )


@HOST
def test_compiled_equals_eager(host):
    for bias in (True, False):
        leaves = leaves_of([2, 0, 3], *product_size(16, 8), bias)
        contract.check_compiled(op([2, 0, 3], host), on_device(leaves, CHECKED if REFERENCE_ONLY else PRODUCT_DTYPE))


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(x, offsets, first, second, **parameters):
        return routed_linear(x, **lists_of(parameters, 2), offsets=offsets, row_counts=[first, second])

    cases = []
    for counts in ([6, 4], [2, 9], [7, 5]):
        arguments = {"offsets": ragged_offsets(counts).to(DEVICE), "first": counts[0], "second": counts[1]}
        cases.append((on_device(leaves_of(counts, 16, 24), CHECKED), arguments))
    contract.check_compiled_once(cases, call)


def test_autocast_runs_the_products_in_its_dtype():
    counts = [3, 2]
    leaves = on_device(leaves_of(counts, 16, 24), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs, gradients = contract.run(op(counts, host=True), leaves)
    assert outputs[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients.values())
    half = {name: leaf.bfloat16() for name, leaf in leaves.items()}
    assert torch.equal(outputs[0], contract.run(op(counts, host=True), half)[0][0])


def test_bad_input_is_refused():
    x, w, b = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6)
    offsets = int32([0, 1, 4]).cpu()
    for bad in (torch.zeros(2, 2, 8), torch.zeros(4, 8, dtype=torch.int32), [[1.0]]):
        contract.refused("x", routed_linear, bad, [w, w], offsets=offsets)
    for bad in ([w], [w, w, w], []):
        contract.refused("weight", routed_linear, x, bad, offsets=offsets)
    for bad in (torch.zeros(6, 7), w.double(), w[None], torch.zeros(5, 8), w.to("meta"), torch.zeros(())):
        contract.refused("weight[1]", routed_linear, x, [w, bad], offsets=offsets)
    said = "weight[1]: expected dense float32, as x has, [6, 8], got sparse_coo float32 [6, 8] on cpu"
    assert contract.message_of(routed_linear, x, [w, w.to_sparse()], offsets=offsets) == said
    contract.refused("bias", routed_linear, x, [w, w], [b], offsets=offsets)
    for bad in (torch.zeros(7), b.double(), b[None], b.to("meta")):
        contract.refused("bias[1]", routed_linear, x, [w, w], [b, bad], offsets=offsets)
    for bad in (offsets.long(), offsets[None], offsets.to("meta")):
        contract.refused("offsets", routed_linear, x, [w, w], offsets=bad)
    contract.refused("offsets", routed_linear, x.double(), [w.double()] * 2, offsets=offsets.flip(0).contiguous())
    contract.refused("offsets", routed_linear, x, [], offsets=offsets[:1])
    for bad in ([1], [1, 1, 2], [1, 4]):
        contract.refused("row_counts", routed_linear, x, [w, w], offsets=offsets, row_counts=bad)
