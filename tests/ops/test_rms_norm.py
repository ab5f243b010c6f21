"""``rms_norm``: one weight for all rows or one per modality, by the reference and by the kernels."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support import contract
from support.contract import normal
from support.kernels import CHECKED, CONTRACT_DTYPES, DEVICE, HALF, INTERPRETED, MANY_ROWS, REPEATS, first, on_device
from support.plans import ragged_offsets

from onepeace_fast import rms_norm
from onepeace_fast.ops.arguments import MAX_WIDTH

pytestmark = pytest.mark.by_kernels
EVERY_DTYPE = tuple(dict.fromkeys((torch.float64, *CONTRACT_DTYPES)))  # the reference's wherever it runs, and more
GARBAGE = 2**31 - 1  # an entry of a row index that must not be read
COUNTS = first(([5, 0, 7], [0, 1, 65], [1], [300, 7], [0, 0]), 2)


def leaves_of(rows, width, modalities=0, weight=True):
    """x, whose rows have a mean, and one weight, or with modalities one for each."""
    leaves = {"x": 2 * normal(rows, width, seed=1) + normal(rows, 1, seed=2)}
    names = [f"weight{m}" for m in range(modalities)] or ["weight"] * weight
    return on_device(leaves | {name: 1 + 0.5 * normal(width, seed=3 + i) for i, name in enumerate(names)})


def places(counts, index, device):
    extra = {"offsets": ragged_offsets(counts).to(device)} if counts else {}
    return extra | ({} if index is None else {"row_index": torch.tensor(index, dtype=torch.int32, device=device)})


def op(counts=None, index=None, host=False, **extra):
    extra |= {"row_counts": counts} if host else {}

    def call(x, weight=None, **weights):
        return rms_norm(x, [*weights.values()] or weight, **places(counts, index, x.device), **extra)

    return call


def plain(counts=None, index=None, eps=1e-5):
    """``F.rms_norm`` of the rows of each modality; rows past them are zero."""

    def call(x, weight=None, **weights):
        if index is not None:
            read = x[index[: sum(counts)] if counts else index]
            x = torch.cat([read, read.new_zeros(len(index) - len(read), x.shape[1])])
        sizes, parts = counts or [x.shape[0]], []
        for m, rows in enumerate(x[: sum(sizes)].split(sizes)):
            mine = weights[f"weight{m}"] if weights else weight
            parts.append(F.rms_norm(rows, x.shape[1:], mine, eps))
        return torch.cat([*parts, torch.zeros_like(x[sum(sizes) :])])

    return call


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("width", first((63, 64, 200, 1)))
def test_a_norm_for_all_rows_follows_the_naive_one_at_every_number_of_rows(width, dtype):
    eps = 0.5 if width == 1 else 1e-5  # of a row of one element eps alone leaves a gradient
    for rows in (0, 1, 7, 65):
        contract.check_against_naive(op(eps=eps), plain(eps=eps), leaves_of(rows, width), dtype)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_many_rows_follow_the_naive_norm(dtype):
    counts = [MANY_ROWS // 3, 0, MANY_ROWS - MANY_ROWS // 3]
    contract.check_against_naive(op(counts), plain(counts), leaves_of(MANY_ROWS, 64, 3), dtype)


def test_rows_in_parts_take_a_row_index():
    counts, index = [6, 3], [4, 0, 5, 2, 9, 1, 11, 7, 6]  # more than one row for each program
    contract.check_against_naive(op(counts, index), plain(counts, index), leaves_of(12, 6144, 2), torch.float32)


@pytest.mark.parametrize("eps", (1e-5, 0.5))
@pytest.mark.parametrize("counts", (None, [3, 0, 2]), ids=str)
def test_the_weight_is_optional_and_eps_stands_inside_the_root(counts, eps):
    for weight in (True, False):
        leaves = leaves_of(7, 63, weight=weight)
        leaves["x"][3], leaves["x"][4] = 0, 1e-3  # rows of which eps is all, or most
        for dtype in dict.fromkeys((torch.float64, CHECKED, HALF)):
            contract.check_against_naive(op(counts, eps=eps), plain(counts, eps=eps), leaves, dtype)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_modality_has_its_own_weight(counts, dtype):
    parts = [slice(*bounds) for bounds in pairwise(ragged_offsets(counts).tolist())]
    for width, inert in ((63, 0), (64, 3)):
        leaves = leaves_of(sum(counts) + inert, width, len(counts))
        contract.check_against_naive(op(counts), plain(counts), leaves, dtype, {"out0": parts, "x": parts})


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("counts", (None, [4, 0, 1], [0, 0]), ids=str)
def test_a_row_index_reads_these_rows_and_writes_them_one_after_another(counts, dtype):
    index = [GARBAGE if i >= sum(counts or [5]) else row for i, row in enumerate([11, 0, 5, 4, 9])]
    leaves = leaves_of(12, 64, len(counts or ()))
    contract.check_against_naive(op(counts, index), plain(counts, index), leaves, dtype)


def test_offsets_alone_and_host_counts_give_the_same_bits():
    for index in (None, [3, 0, 9, 8, 7, 1, 2, 11, 13, 12, 10, 5]):
        counts, leaves = [5, 0, 7], on_device(leaves_of(14, 64, 3), CHECKED)
        host = contract.run(op(counts, index, host=True), leaves)
        contract.assert_same(contract.run(op(counts, index), leaves), host, "host")


def test_the_weight_may_have_another_dtype_than_x():
    def in_float32(x, weight):
        return plain()(x.to(weight.dtype), weight).to(x.dtype)

    contract.check_against_naive(op(), in_float32, leaves_of(65, 64), {"x": HALF, "weight": torch.float32})


def test_offsets_are_read_on_the_device():
    leaves, offsets = on_device(leaves_of(12, 64), CHECKED), torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    before = rms_norm(**leaves, offsets=offsets)
    offsets[1] = 9
    after = rms_norm(**leaves, offsets=offsets)
    assert not before[5:].any() and after[5:9].any(1).all() and not after[9:].any()


INDEXED = (op([1, 2], [4, 0, 2, GARBAGE]), leaves_of(5, 8, 2))
SHARED, ROUTED = (op(), leaves_of(5, 8)), (op([3, 0, 2]), leaves_of(6, 8, 3))


def test_finite_differences_agree():
    for call, leaves in (SHARED, ROUTED, INDEXED, (op(), leaves_of(4, 7, weight=False))):
        contract.check_gradcheck(call, leaves)


def test_registration():
    for call, leaves in (SHARED, ROUTED, INDEXED):
        contract.check_registration(call, on_device(leaves, CHECKED), "rms_norm")


def test_strides_of_inputs_and_gradients_do_not_matter():
    for call, leaves in ((op(), leaves_of(7, 9)), (op([3, 0, 4]), leaves_of(8, 9, 3))):
        contract.check_input_layouts(call, on_device(leaves, CHECKED), ["x"])
        for dtype in (CHECKED, HALF):
            contract.check_gradient_layouts(call, on_device(leaves, dtype))


def test_nan_stays_in_its_row_and_its_modality():
    counts, leaves = [5, 4, 7], on_device(leaves_of(18, 64, 3), CHECKED)
    given = [normal(18, 64, seed=9).to(DEVICE)]
    expected = contract.run(op(counts), leaves, given)
    assert not expected[0][0][16:].any() and not expected[1]["x"][16:].any()
    for tensor in (leaves["x"], given[0]):  # rows of no modality
        tensor[16:] = torch.nan
    contract.assert_same(contract.run(op(counts), leaves, given), expected, "NaN in inert rows")
    leaves["x"][7] = torch.nan
    actual, others = contract.run(op(counts), leaves, given), torch.arange(18) != 7
    assert actual[0][0][7].isnan().all()
    assert torch.equal(actual[0][0][others], expected[0][0][others])
    assert torch.equal(actual[1]["x"][others], expected[1]["x"][others])
    for name in ("weight0", "weight2"):
        assert torch.equal(actual[1][name], expected[1][name])


def test_frozen_weights_get_no_gradient_and_idle_ones_get_zeros():
    contract.check_frozen(op(), on_device(leaves_of(7, 9), CHECKED))
    counts, leaves = [5, 0, 2], on_device(leaves_of(7, 9, 3), CHECKED)
    contract.check_frozen(op(counts), leaves)
    gradients = contract.run(op(counts), leaves)[1]
    assert not gradients["weight1"].any() and gradients["weight0"].all() and gradients["weight2"].all()


def test_second_derivative_is_refused():
    contract.check_second_derivative(*SHARED)
    contract.check_second_derivative(*ROUTED)


def test_repeats_are_bitwise_equal():
    counts = [9, 0, 5] if INTERPRETED else [65, 0, 131]
    for dtype in (torch.float32, HALF):
        contract.check_deterministic(op(counts), on_device(leaves_of(sum(counts) + 4, 65, 3), dtype), REPEATS)


def test_compiled_equals_eager():
    for call, leaves in (SHARED, ROUTED, INDEXED):
        contract.check_compiled(call, on_device(leaves, CHECKED))


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(x, weight0, weight1, offsets, first, second):
        return rms_norm(x, [weight0, weight1], offsets=offsets, row_counts=[first, second])

    contract.check_compiled_once(
        [
            (leaves_of(sum(counts), 16, 2), {"offsets": ragged_offsets(counts).to(DEVICE), "first": counts[0],
                                             "second": counts[1]})
            for counts in ([6, 4], [2, 9], [7, 5])
        ],
        call,
    )  # fmt: skip


def test_bad_input_is_refused():
    x, w, offsets = torch.zeros(4, 8), torch.ones(8), ragged_offsets([1, 3])
    for bad in (torch.zeros(2, 2, 8), torch.zeros(4, 8, dtype=torch.int32), [[1.0]], torch.zeros(1, MAX_WIDTH + 1)):
        contract.refused("x", rms_norm, bad)
    for bad in (torch.ones(7), torch.ones(1, 8), w.long(), w.to("meta"), [w, w]):
        contract.refused("weight", rms_norm, x, bad)
    contract.refused("weight", rms_norm, x, [w], offsets=offsets)
    contract.refused("eps", rms_norm, x, w, eps=0.0)
    contract.refused("offsets", rms_norm, x, [w, w], offsets=offsets.long())
    for bad in ([1], [1, 1, 2], [1, 4]):
        contract.refused("row_counts", rms_norm, x, [w, w], offsets=offsets, row_counts=bad)
    for bad in ([4], [-1], [1, 1]):  # which the reference alone reads
        contract.refused("row_index", rms_norm, x.double(), w, row_index=torch.tensor(bad, dtype=torch.int32))
    contract.refused("row_index", rms_norm, x, w, row_index=offsets.long())
