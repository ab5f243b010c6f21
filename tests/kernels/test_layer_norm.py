"""``layer_norm`` and ``rms_norm``, for all rows and per modality, by the reference and by the kernels."""

from itertools import pairwise

import pytest
import torch
from support import contract
from support.contract import normal
from support.kernels import (
    CHECKED,
    DEVICE,
    EVERY_DTYPE,
    HALF,
    INTERPRETED,
    MANY_ROWS,
    REFERENCE_ONLY,
    REPEATS,
    WIDTHS,
    far_apart,
    first,
    int32,
    interpreter_only,
    on_device,
)
from support.layer_norm_cases import GARBAGE, leaves_of, op, plain
from support.plans import ragged_offsets

from onepeace_fast import layer_norm, rms_norm
from onepeace_fast.ops import arguments, operation
from onepeace_fast.ops.arguments import MAX_WIDTH
from onepeace_fast.ops.layer_norm import layer_norm_and_stream

ROWS = (0, 1, 7, 65, 300) if REFERENCE_ONLY else (0, 1, 7)
MODALITIES = first(([5, 0, 7], [30, 7, 0, 0, 90], [1], [0, 1, 65], [0, 0]), 2)
MODALITIES += [[300, 7]] if REFERENCE_ONLY else []
RMS = pytest.mark.parametrize("rms", (False, True), ids=("layer_norm", "rms_norm"))
DTYPE = pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)


def check(leaves, dtype, *form, rms=False, eps=1e-5, slices=None):
    contract.check_against_naive(op(*form, rms=rms, eps=eps), plain(*form, rms=rms, eps=eps), leaves, dtype, slices)


def forms(rms):
    """Calls and their leaves: a norm for all rows, one of each modality, and these by a row index."""
    kinds = {"bias": not rms}
    return (
        (op(rms=rms), leaves_of(5, 8, **kinds)),
        (op([3, 0, 2], rms=rms), leaves_of(6, 8, 3, **kinds)),
        (op([1, 2], [4, 0, 2, GARBAGE], rms=rms), leaves_of(5, 8, 2, heads=None if rms else 2, **kinds)),
    )


@DTYPE
@RMS
@pytest.mark.parametrize("width", (63, 64, 200) if REFERENCE_ONLY else WIDTHS)
def test_a_norm_for_all_rows_follows_the_naive_one_at_every_number_of_rows(width, rms, dtype):
    for rows in ROWS:
        check(leaves_of(rows, width, bias=not rms), dtype, rms=rms)


@DTYPE
@RMS
def test_many_rows_follow_the_naive_norm(rms, dtype):
    for width in WIDTHS[1:2] if DEVICE == "cuda" else (64, 63):
        check(leaves_of(MANY_ROWS, width, bias=not rms), dtype, rms=rms)
        counts = [MANY_ROWS // 3, 0, MANY_ROWS - MANY_ROWS // 3]
        check(leaves_of(MANY_ROWS, width, 3, bias=not rms), dtype, counts, rms=rms)


@RMS
def test_rows_in_parts_take_a_row_index_and_a_head_scale(rms):
    index, counts = [4, 0, 5, 2, 9, 1, 11, 7, 6], [6, 3]  # more than one row for each program
    leaves = leaves_of(12, 6144, 2, bias=not rms, heads=None if rms else 8)
    check(leaves, torch.float32, counts, index, rms=rms)


def test_rows_of_one_element_have_nothing_left_but_the_bias():
    for dtype in (CHECKED, torch.float32, HALF):
        leaves = on_device(leaves_of(65, 1), dtype)
        outputs, gradients = contract.run(op(), leaves)
        assert torch.equal(outputs[0], leaves["bias"].expand(65, 1))
        given = contract.cotangents(outputs)[0]
        torch.testing.assert_close(gradients["bias"], given.double().sum(0).to(dtype), rtol=2e-2, atol=1e-5)
        for name in ("x", "weight"):  # exactly zero but for rounding: 1 / sqrt(eps) times the magnitude of x
            assert gradients[name].abs().max() < 1e-2
        check(leaves_of(65, 1, bias=False), dtype, rms=True, eps=0.5)  # where eps alone leaves a gradient


@interpreter_only
@pytest.mark.parametrize("eps", (1e-5, 0.5))
@pytest.mark.parametrize("weight", (False, True))
@RMS
def test_weight_and_bias_are_each_optional_and_eps_stands_inside_the_root(rms, weight, eps):
    for bias in (False,) if rms else (False, True):
        leaves = leaves_of(7, 63, weight=weight, bias=bias)
        leaves["x"][3] = 0 if rms else 0.25  # of which eps is all
        leaves["x"][4] *= 1e-3 if rms else 1  # and most
        for counts in (None, [3, 0, 2]):
            half = (HALF,) if rms or counts is None else ()
            for dtype in dict.fromkeys((torch.float64, CHECKED, *half)):
                check(leaves, dtype, counts, rms=rms, eps=eps)


@pytest.mark.parametrize("kind", ("weight", "bias"))
@pytest.mark.parametrize("counts", [[3, 4], [2, 0, 5]], ids=str)
def test_every_modality_has_its_own_weight_without_bias_and_its_own_bias_without_weight(counts, kind):
    leaves = leaves_of(9, 63, len(counts), weight=kind == "weight", bias=kind == "bias")
    for dtype in dict.fromkeys((torch.float64, CHECKED, HALF)):
        check(leaves, dtype, counts)


@DTYPE
@RMS
@pytest.mark.parametrize("counts", MODALITIES, ids=str)
def test_routed_norm_follows_the_naive_one_in_every_modality(counts, rms, dtype):
    parts = [slice(a, b) for a, b in pairwise(ragged_offsets(counts).tolist())]
    for width, inert in ((63, 0), (64, 3)):
        leaves = leaves_of(sum(counts) + inert, width, len(counts), bias=not rms)
        check(leaves, dtype, counts, rms=rms, slices={"out0": parts, "x": parts})


@DTYPE
@pytest.mark.parametrize("width, heads", first([(768, 12), (63, 3), (64, 64), (8, 1)]))
def test_a_head_scale_stands_in_front_of_the_norm(width, heads, dtype):
    for counts in first(([3, 0, 4], [9], None)):
        check(leaves_of(10, width, len(counts or ()), heads=heads), dtype, counts)


@DTYPE
@RMS
@pytest.mark.parametrize("counts", (None, [4, 0, 3], [0, 0]), ids=str)
def test_a_row_index_reads_these_rows_and_writes_them_one_after_another(counts, rms, dtype):
    index = [11, 0, 5, 4, 9, 2, 12] + ([GARBAGE] * 3 if counts else [])
    index = [GARBAGE if i >= sum(counts or [7]) else entry for i, entry in enumerate(index)]
    for width, heads in first(((64, None if rms else 4), (63, None))):
        check(leaves_of(13, width, len(counts or ()), bias=not rms, heads=heads), dtype, counts, index, rms=rms)
    check(leaves_of(13, 64, bias=not rms), dtype, counts, index, rms=rms)


def both(norm, counts=None, index=None):
    """A norm, and x beside it: the op's or the naive one's."""
    extra = {} if index is None else {"row_index": int32(index), "offsets": ragged_offsets(counts).to(DEVICE)}

    def call(x, **norms):
        return layer_norm_and_stream(x, **norms, **extra) if norm is None else (norm(x, **norms), x * 1)

    return call


@DTYPE
@pytest.mark.parametrize("index", (None, [11, 0, 5, 4, 9, 2, 12, GARBAGE]), ids=("all rows", "some rows"))
def test_the_gradient_of_x_elsewhere_is_added_to_that_of_the_norm(index, dtype):
    counts = None if index is None else [4, 0, 3]
    for width in first((64, 63)):
        leaves = leaves_of(13, width)
        contract.check_against_naive(both(None, counts, index), both(plain(counts, index)), leaves, dtype)
    call, leaves = both(None, counts, index), on_device(leaves_of(13, 64), CHECKED)
    contract.check_gradient_layouts(call, leaves)
    alone, stream = call(**{name: leaf.requires_grad_(name == "weight") for name, leaf in leaves.items()})
    assert stream is leaves["x"] and alone.requires_grad


@pytest.mark.parametrize("index", (None, [11, 0, 5, 4, 9, 2, 12, GARBAGE]), ids=("all rows", "some rows"))
def test_a_norm_of_another_dtype_is_that_of_x_rounded(index):
    leaves = on_device(leaves_of(13, 64), torch.float32)
    extra = {} if index is None else {"row_index": int32(index), "offsets": ragged_offsets([4, 0, 3]).to(DEVICE)}
    rounded = contract.run(lambda **mine: layer_norm_and_stream(**mine, **extra, dtype=HALF)[0], leaves)
    expected = contract.run(lambda **mine: layer_norm(**mine, **extra).to(HALF), leaves)
    assert rounded[0][0].dtype == HALF
    contract.assert_same(rounded, expected, "rounded")


def test_x_beside_its_norm_is_there_in_every_kind_of_execution(monkeypatch):
    """Autograd adds both gradients where the kernel does not."""
    call, leaves = both(None), on_device(leaves_of(5, 64), CHECKED)
    expected = contract.run(call, leaves)
    for alone in range(2):  # the other has no gradient
        actual = contract.run(lambda alone=alone, **mine: call(**mine)[alone], {"x": leaves["x"]})
        (plainly,) = (contract.run(lambda x, a=alone: (layer_norm(x), x * 1)[a], {"x": leaves["x"]}),)
        contract.assert_same(actual, plainly, f"output {alone} alone")
    monkeypatch.setattr(operation, "is_eager", lambda tensors: False)
    registered = contract.run(call, leaves)
    assert all(map(torch.equal, registered[0], expected[0]))
    contract.assert_close_gradients(registered[1], expected[1], "registered")


def test_parameters_may_be_shared_by_the_modalities_of_offsets():
    counts, leaves = [3, 0, 4], leaves_of(9, 64)
    check(leaves, torch.float64, counts)
    offsets = ragged_offsets(counts).to(DEVICE)
    one_list = lambda x, weight, bias: layer_norm(x, weight, [bias] * 3, offsets=offsets)  # noqa: E731
    contract.check_against_naive(one_list, plain(counts), leaves, torch.float64)


@RMS
def test_parameters_may_have_another_dtype_than_x(rms):
    leaves = leaves_of(65, 64, bias=not rms)
    dtypes = {name: HALF if name == "x" else torch.float32 for name in leaves}

    def in_float32(x, **parameters):
        return plain(rms=rms)(x.to(torch.promote_types(x.dtype, torch.float32)), **parameters).to(x.dtype)

    contract.check_against_naive(op(rms=rms), in_float32, leaves, dtypes)


@RMS
def test_offsets_alone_and_host_counts_give_the_same_bits(rms):
    counts, leaves = [5, 0, 7], on_device(leaves_of(14, 64, 3, bias=not rms), CHECKED)
    for index in (None, [3, 0, 9, 8, 7, 1, 2, 11, 13, 12, 10, 5]):
        host = contract.run(op(counts, index, rms=rms, host=True), leaves)
        contract.assert_same(contract.run(op(counts, index, rms=rms), leaves), host, "host")


@RMS
def test_rows_read_by_an_index_have_the_bits_of_the_whole_norm(rms):
    for dtype in (CHECKED, HALF):
        index = [11, 0, 5, 4, 9, 2, 12]
        leaves = on_device(leaves_of(13, 768, bias=not rms), dtype)
        given = normal(13, 768, seed=8, dtype=dtype).to(DEVICE)
        whole, every = contract.run(op(rms=rms), leaves, [given])
        part, some = contract.run(op(None, index, rms=rms), leaves, [given[index]])
        assert torch.equal(part[0], whole[0][index])
        assert torch.equal(some["x"][index], every["x"][index])
        assert not some["x"][[row for row in range(13) if row not in index]].any()


def test_strides_of_offsets_and_index_do_not_matter():
    leaves = on_device(leaves_of(8, 16, 3), CHECKED)
    offsets, index = int32([0, 3, 3, 5]), int32([7, 1, 0, 4, 5, GARBAGE])
    norms = [[leaves[f"{kind}{m}"] for m in range(3)] for kind in ("weight", "bias")]
    expected = layer_norm(leaves["x"], *norms, row_index=index, offsets=offsets)
    apart = [torch.stack([value, torch.full_like(value, 3)], dim=1)[:, 0] for value in (index, offsets)]
    assert torch.equal(layer_norm(leaves["x"], *norms, row_index=apart[0], offsets=apart[1]), expected)


def test_nan_in_rows_that_an_index_leaves_out_reaches_nothing():
    index, counts = [3, 0, 6, GARBAGE], [1, 2]
    leaves = on_device(leaves_of(8, 64, 2), CHECKED)
    given = [normal(4, 64, seed=9, dtype=CHECKED).to(DEVICE)]
    expected = contract.run(op(counts, index), leaves, given)
    leaves["x"][[1, 2, 4, 5, 7]] = torch.nan
    given[0][3] = torch.nan
    contract.assert_same(contract.run(op(counts, index), leaves, given), expected, "NaN in rows left out")


@pytest.mark.parametrize("norm", (layer_norm, rms_norm))
def test_offsets_are_read_on_the_device_and_do_not_overrun_the_rows(norm, monkeypatch):
    leaves, offsets = on_device(leaves_of(12, 64, bias=False), CHECKED), int32([0, 5])
    before = norm(**leaves, offsets=offsets)
    offsets.copy_(int32([0, 9]))
    after = norm(**leaves, offsets=offsets)
    assert not before[5:].any() and after[5:9].any(1).all() and not after[9:].any()
    few = leaves | {"x": leaves["x"][:6]}
    monkeypatch.setattr(arguments, "is_on_host", lambda x: False)  # a device's are not looked at
    assert torch.equal(norm(**few, offsets=offsets), norm(**few))


def test_elements_past_2_to_the_31st_are_reached(tmp_path):
    leaves = on_device(leaves_of(3, 64, bias=False), torch.float16)
    given = [normal(3, 64, seed=2, dtype=torch.float16).to(DEVICE)]
    expected = contract.run(op(), leaves, given)
    contract.assert_same(
        contract.run(op(), {**leaves, "x": far_apart(leaves["x"], tmp_path)}, given), expected, "far apart"
    )


@RMS
def test_finite_differences_agree(rms):
    for call, leaves in (*forms(rms), (op(rms=rms), leaves_of(4, 7, weight=False, bias=False))):
        contract.check_gradcheck(call, leaves)


@RMS
def test_registration(rms):
    for call, leaves in forms(rms):
        contract.check_registration(call, on_device(leaves, CHECKED), "rms_norm" if rms else "layer_norm")


@RMS
def test_strides_of_inputs_and_gradients_do_not_matter(rms):
    routed = leaves_of(8, 9, 3, bias=not rms, heads=None if rms else 3)
    for counts, leaves in ((None, leaves_of(7, 9, bias=not rms)), ([3, 0, 4], routed)):
        call = op(counts, rms=rms)
        contract.check_input_layouts(call, on_device(leaves, CHECKED), ["x", *({"head_scale"} & leaves.keys())])
        for dtype in (CHECKED, HALF):
            contract.check_gradient_layouts(call, on_device(leaves, dtype))


@RMS
def test_nan_stays_in_its_row_and_its_modality_and_reaches_nothing_from_inert_rows(rms):
    counts, call = [5, 4, 7], op([5, 4, 7], rms=rms)
    leaves = on_device(leaves_of(19, 64, 3, bias=not rms, heads=None if rms else 4), CHECKED)
    given = [normal(19, 64, seed=9, dtype=CHECKED).to(DEVICE)]
    expected = contract.run(call, leaves, given)
    assert not expected[0][0][sum(counts) :].any() and not expected[1]["x"][sum(counts) :].any()
    for tensor in (leaves["x"], given[0]):
        tensor[sum(counts) :] = torch.nan
    contract.assert_same(contract.run(call, leaves, given), expected, "NaN in inert rows")
    leaves["x"][7] = torch.nan
    actual, others = contract.run(call, leaves, given), torch.arange(19) != 7
    assert actual[0][0][7].isnan().all()
    assert torch.equal(actual[0][0][others], expected[0][0][others])
    assert torch.equal(actual[1]["x"][others], expected[1]["x"][others])
    for name in {"weight0", "bias0", "weight2", "bias2"} & leaves.keys():
        assert torch.equal(actual[1][name], expected[1][name])


@RMS
def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros(rms):
    contract.check_frozen(op(rms=rms), on_device(leaves_of(7, 9, bias=not rms), CHECKED))
    call = op([5, 0, 2], rms=rms)
    leaves = on_device(leaves_of(7, 9, 3, bias=not rms, heads=None if rms else 3), CHECKED)
    contract.check_frozen(call, leaves)
    for name, gradient in contract.run(call, leaves)[1].items():
        assert not gradient.any() if name.endswith("1") else gradient.all(), name


@RMS
def test_second_derivative_is_refused(rms):
    for call, leaves in forms(rms)[:2]:
        contract.check_second_derivative(call, leaves)


@RMS
def test_repeats_are_bitwise_equal(rms):
    counts = [9, 0, 5] if INTERPRETED else [65, 0, 131]
    leaves = leaves_of(sum(counts) + 4, 65, 3, bias=not rms, heads=None if rms else 5)
    for dtype in (torch.float32, HALF):
        contract.check_deterministic(op(counts, rms=rms), on_device(leaves, dtype), REPEATS)


@RMS
def test_compiled_equals_eager(rms):
    for call, leaves in forms(rms):
        contract.check_compiled(call, on_device(leaves, CHECKED))


@RMS
def test_one_dynamic_graph_serves_every_number_of_rows(rms):
    def call(x, offsets, first, second, **parameters):
        lists = [[parameters[f"{kind}{m}"] for m in range(2)] for kind in ("weight", "bias")[: 2 - rms]]
        return (rms_norm if rms else layer_norm)(x, *lists, offsets=offsets, row_counts=[first, second])

    cases = []
    for counts in ([6, 4], [2, 9], [7, 5]):
        arguments = {"offsets": ragged_offsets(counts).to(DEVICE), "first": counts[0], "second": counts[1]}
        cases.append((leaves_of(sum(counts), 16, 2, bias=not rms), arguments))
    contract.check_compiled_once(cases, call)


@pytest.mark.parametrize("norm", (layer_norm, rms_norm))
def test_bad_input_is_refused(norm):
    x, w, offsets = torch.zeros(4, 8), torch.ones(8), ragged_offsets([1, 3])
    for bad in (torch.zeros(2, 2, 8), torch.zeros(4, 8, dtype=torch.int32), [[1.0]], torch.zeros(1, MAX_WIDTH + 1)):
        contract.refused("x", norm, bad)
    for bad in (torch.ones(7), torch.ones(1, 8), w.long(), w.to("meta"), [w, w]):
        contract.refused("weight", norm, x, bad)
    contract.refused("weight", norm, x, [w], offsets=offsets)
    contract.refused("eps", norm, x, w, eps=0.0)
    for bad in (offsets.long(), offsets[None], offsets.to("meta")):
        contract.refused("offsets", norm, x, [w, w], offsets=bad)
    for bad in ([1], [1, 1, 2], [1, 4]):
        contract.refused("row_counts", norm, x, [w, w], offsets=offsets, row_counts=bad)
    index = torch.tensor([0, 1], dtype=torch.int32)
    contract.refused("row_counts", norm, x, [w, w], row_index=index, offsets=offsets, row_counts=[1, 3])
    for bad in (index.long(), index[None], index.to("meta"), index + 3, index - 1, index * 0):
        contract.refused("row_index", norm, x.double(), w, row_index=bad)  # in a dtype that the reference takes


def test_a_bad_bias_or_head_scale_is_refused():
    x, w = torch.zeros(4, 8), torch.ones(8)
    contract.refused("bias", layer_norm, x, w, torch.ones(1, 8))
    contract.refused("bias", layer_norm, x, [w, w], [w, w, w], offsets=ragged_offsets([1, 3]))
    for bad in (torch.ones(3), torch.ones(2, 4), torch.ones(2, dtype=torch.int64), torch.ones(2, device="meta")):
        contract.refused("head_scale", layer_norm, x, w, head_scale=bad)
