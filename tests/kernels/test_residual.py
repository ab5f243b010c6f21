"""``residual``, ``residual_layer_norm`` and ``residual_rms_norm``, by the reference and by the kernels."""

from itertools import accumulate, pairwise

import pytest
import torch
from support import contract
from support.contract import normal
from support.kernels import (
    CHECKED,
    CONTRACT_DTYPES,
    DEVICE,
    EVERY_DTYPE,
    HALF,
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
from support.residual_cases import DROP_PATH, GARBAGE, LAYER_NORM, NO_NORM, RMS_NORM, leaves_of, op, plain, sample_of

from onepeace_fast import layer_norm, residual, residual_layer_norm, residual_rms_norm, rms_norm
from onepeace_fast.kernels.launch_heuristic import Parameters
from onepeace_fast.kernels.launch_parameters import use_launch_parameters
from onepeace_fast.ops.arguments import MAX_WIDTH
from onepeace_fast.ops.dropout import dropout_factor
from onepeace_fast.ops.residual import residual_backward_and_sums
from onepeace_fast.structures import Dropout, DropPath, ResidualGradients, ResidualSaved, Routing
from onepeace_fast.tolerance import DTYPES

NORM = pytest.mark.parametrize("norm", (NO_NORM, LAYER_NORM, RMS_NORM))
CONTRACT_WIDTHS = WIDTHS[1:2] if DEVICE == "cuda" else (1, 63, 64, 200) if REFERENCE_ONLY else (1, *WIDTHS[:-1])


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@NORM
@pytest.mark.parametrize("width", CONTRACT_WIDTHS)
def test_values_and_gradients_follow_the_naive_ones(width, norm, dtype):
    for rows in (0, 1, 7):
        mine = norm if width > 1 else NO_NORM  # of one element a LayerNorm leaves nothing
        contract.check_against_naive(op(rows, mine), plain(rows, mine), leaves_of(rows, width, mine), dtype)


@NORM
def test_many_rows_follow_the_naive_ones_in_every_sample(norm):
    width = 1536 if DEVICE == "cuda" else 64
    parts = [torch.nonzero(sample_of(MANY_ROWS) == s).flatten() for s in range(5)]
    slices = {name: parts for name in ("x", "y", "out0", "out1")}
    for dtype in CONTRACT_DTYPES:
        leaves = leaves_of(MANY_ROWS, width, norm)
        contract.check_against_naive(op(MANY_ROWS, norm), plain(MANY_ROWS, norm), leaves, dtype, slices)


@interpreter_only
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@NORM
def test_every_combination_of_options_follows_the_naive_one(norm, dtype):
    rows, width = 7, 16
    for gamma in (False, True):
        for drop_path in (False, True):
            for dropout in (0.0, 0.4):
                options = {"norm": norm, "drop_path": drop_path, "dropout": dropout, "eps": 0.1}
                leaves = leaves_of(rows, width, norm, gamma, bias=gamma)
                contract.check_against_naive(op(rows, **options), plain(rows, **options), leaves, dtype)


@NORM
def test_the_stream_may_be_float32_and_the_norm_is_that_of_the_stream_as_it_is_stored(norm):
    leaves = leaves_of(65, 64, norm)
    dtypes = {name: HALF if name == "y" else torch.float32 for name in leaves}
    contract.check_against_naive(op(65, norm), plain(65, norm), leaves, dtypes)
    for given in (dtypes, dict.fromkeys(dtypes, HALF)):
        rounded = {name: leaf.to(given[name]) for name, leaf in leaves.items()}
        out, *normed = contract.run(op(65, norm), rounded)[0]
        assert [output.dtype for output in (out, *normed)] == [given["x"], HALF][: 1 + len(normed)]
        if normed:
            parameters = [rounded[name] for name in ("norm_weight", "norm_bias") if name in rounded]
            expected = (layer_norm if norm == LAYER_NORM else rms_norm)(out, *parameters).to(HALF)
            assert (normed[0] != expected).float().mean() < 0.01  # not before it is rounded


@pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
@NORM
@pytest.mark.parametrize("extent", first((4, None, 0), 2))
@pytest.mark.parametrize("dropout", first((0.4, 0.0)))
def test_a_row_index_adds_the_branch_to_these_rows(dropout, extent, norm, dtype):
    index = [11, 0, 5, 4, 9, 2, 12]
    index = [GARBAGE if i >= (7 if extent is None else extent) else entry for i, entry in enumerate(index)]
    options = {"norm": norm, "index": index, "extent": extent, "dropout": dropout}
    for width in first((63, 64)):
        leaves = leaves_of(13, width, norm, branch_rows=7)
        contract.check_against_naive(op(13, **options), plain(13, **options), leaves, dtype)


@pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
@NORM
@pytest.mark.parametrize("extent", (0, 5, 7))
def test_rows_past_the_extent_are_x(extent, norm, dtype):
    leaves = leaves_of(7, 64, norm)
    contract.check_against_naive(op(7, norm, extent=extent), plain(7, norm, extent=extent), leaves, dtype)


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("norm", (LAYER_NORM, RMS_NORM))
def test_an_output_without_a_gradient_counts_as_zero(norm, which):
    def pick(function):
        return lambda **mine: function(**mine)[which]

    for options in ({}, {"index": [5, 0, 6]}):
        leaves = leaves_of(7, 64, norm, branch_rows=3 if options else None)
        contract.check_against_naive(pick(op(7, norm, **options)), pick(plain(7, norm, **options)), leaves, CHECKED)


@NORM
def test_strides_of_inputs_and_gradients_do_not_matter(norm):
    for options in first(({"dropout": 0.3}, {"drop_path": False}, {"index": [5, 0, 6]})):
        leaves = leaves_of(7, 9, norm, branch_rows=3 if "index" in options else None)
        leaves = on_device(leaves, CHECKED)
        contract.check_input_layouts(op(7, norm, **options), leaves, ["x", "y", "gamma"])
        contract.check_gradient_layouts(op(7, norm, **options), leaves)
    bare = on_device(leaves_of(7, 9, norm, gamma=False), CHECKED)
    contract.check_gradient_layouts(op(7, norm, drop_path=False), bare)
    contract.check_gradient_layouts(op(7, norm), on_device(leaves_of(7, 9, norm), HALF))


@NORM
def test_nan_stays_in_its_row(norm):
    leaves = on_device(leaves_of(12, 64, norm), CHECKED)
    given = [normal(12, 64, seed=8 + i, dtype=CHECKED).to(DEVICE) for i in range(1 + (norm != NO_NORM))]
    call = op(12, norm, extent=9)
    expected = contract.run(call, leaves, given)
    assert not expected[1]["y"][9:].any()
    leaves["y"][9:] = torch.nan  # rows that are not read
    contract.assert_same(contract.run(call, leaves, given), expected, "NaN in inert rows")
    if norm == NO_NORM:  # the norm is over all rows of the stream
        given[0][9:] = torch.nan
        assert torch.equal(contract.run(call, leaves, given)[1]["gamma"], expected[1]["gamma"])
    others = torch.arange(12) != 4
    for name in ("x", "y"):
        poisoned = {**leaves, name: leaves[name].clone()}
        poisoned[name][4] = torch.nan
        actual = contract.run(call, poisoned, given)
        for a, b in zip(actual[0], expected[0], strict=True):
            assert torch.equal(a[others], b[others])
        for key in ("x", "y"):
            assert torch.equal(actual[1][key][:9][others[:9]], expected[1][key][:9][others[:9]])


@NORM
def test_frozen_parameters_get_no_gradient_and_no_rows_give_zeros(norm):
    for dropout in (0.0, 0.2):
        contract.check_frozen(op(7, norm, dropout=dropout), on_device(leaves_of(7, 9, norm), CHECKED))
    gradients = contract.run(op(0, norm), on_device(leaves_of(0, 9, norm), CHECKED))[1]
    assert {"gamma"} <= gradients.keys() and not any(gradient.any() for gradient in gradients.values())


@NORM
def test_repeats_are_bitwise_equal(norm):
    rows = 131 if REFERENCE_ONLY else 17
    for dtype in (torch.float32, HALF)[not REFERENCE_ONLY :]:
        contract.check_deterministic(op(rows, norm, dropout=0.3), on_device(leaves_of(rows, 65, norm), dtype), REPEATS)
        leaves = on_device(leaves_of(rows, 65, norm, branch_rows=12), dtype)
        contract.check_deterministic(op(rows, norm, index=[*range(16, 4, -1)]), leaves, REPEATS)


@NORM
def test_registration_and_compiled_graphs(norm):
    for options in first(({"dropout": 0.3}, {"index": [3, 0, GARBAGE], "extent": 2}, {}), 2):
        branch_rows = 3 if "index" in options else None
        leaves = on_device(leaves_of(5, 8, norm, gamma=bool(options), branch_rows=branch_rows), CHECKED)
        contract.check_registration(op(5, norm, **options), leaves, "residual")
        contract.check_compiled(op(5, norm, **options), leaves)


@pytest.mark.skipif(not REFERENCE_ONLY, reason="a kernel fuses what the test rounds twice")
def test_dropped_rows_keep_x_bitwise_and_kept_rows_add_the_scaled_branch():
    for dtype in DTYPES:
        leaves = {name: leaf.to(dtype) for name, leaf in leaves_of(30, 64, gamma=False).items()}
        outputs, gradients = contract.run(op(30), leaves)
        dropped = DROP_PATH[sample_of(30).long()] == 0
        assert dropped.any() and not dropped.all()
        assert torch.equal(outputs[0][dropped], leaves["x"][dropped])
        assert not gradients["y"][dropped].any()
        assert torch.equal(gradients["x"], contract.cotangents(outputs)[0])
        kept = (1.25 * leaves["y"].float() + leaves["x"].float()).to(dtype)
        assert torch.equal(outputs[0][~dropped], kept[~dropped])


def test_dropped_rows_hide_whatever_the_branch_gave_gamma():
    leaves = leaves_of(30, 16)
    expected = contract.run(op(30), leaves)[1]["gamma"]
    dropped = DROP_PATH[sample_of(30).long()] == 0
    leaves["y"] = torch.where(dropped[:, None], 1e6, leaves["y"])
    assert torch.equal(contract.run(op(30), leaves)[1]["gamma"], expected)


@NORM
def test_finite_differences_agree(norm):
    contract.check_gradcheck(op(4, norm), leaves_of(4, 3, norm))
    contract.check_gradcheck(op(4, norm, dropout=0.3), leaves_of(4, 3, norm))
    indexed = op(5, norm, dropout=0.3, index=[4, 0, GARBAGE], extent=2)
    contract.check_gradcheck(indexed, leaves_of(5, 3, norm, branch_rows=3))
    contract.check_gradcheck(op(4, norm, drop_path=False), leaves_of(4, 3, norm, gamma=False, bias=False))


def test_the_gradient_of_x_is_the_incoming_one_and_costs_no_copy():
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(7, 8).items()}
    out = op(7)(**leaves)
    given = normal(7, 8, seed=8).to(DEVICE)
    (dx,) = torch.autograd.grad(out, leaves["x"], given)
    assert dx.data_ptr() == given.data_ptr()


def test_gradients_of_leaves_do_not_share_memory():
    x, y = (leaf.requires_grad_() for leaf in leaves_of(7, 8, gamma=False).values())
    given = torch.ones_like(x)
    residual(x, y).backward(given)
    x.grad.add_(1)
    assert (y.grad == 1).all() and (given == 1).all()
    y.grad.add_(2)
    assert (x.grad == 2).all() and (given == 1).all()


@NORM
def test_second_derivative_is_refused(norm):
    contract.check_second_derivative(op(5, norm), leaves_of(5, 8, norm))


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(x, y, gamma, norm_weight, norm_bias, sample):
        return residual_layer_norm(x, y, gamma, norm_weight, norm_bias, drop_path=DROP_PATH, sample=sample)

    cases = [(leaves_of(rows, 16, LAYER_NORM), {"sample": sample_of(rows)}) for rows in (7, 12, 9)]
    contract.check_compiled_once(cases, call)


def test_bad_input_is_refused():
    x, sample, seed = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int32), torch.tensor(1)
    drop_path = DROP_PATH.cpu()
    for function in (residual, lambda *a, **k: residual_rms_norm(*a, *[None] * (3 - len(a)), torch.ones(8), **k)):
        contract.refused("x", function, torch.zeros(8), x)
        contract.refused("x", function, x.int(), x)
        contract.refused("y", function, x, x.int())
        contract.refused("y", function, x, torch.zeros(4, 7))
        contract.refused("y", function, x, x.to("meta"))
        contract.refused("y", function, x, None)
        contract.refused("y", function, x, x.double())
        contract.refused("y", function, x.half(), x)
        contract.refused("y", function, x.half(), x.bfloat16())
        contract.refused("x", function, torch.zeros(1, MAX_WIDTH + 1), torch.zeros(1, MAX_WIDTH + 1))
        index = torch.tensor([0, 2], dtype=torch.int32)
        contract.refused("y", function, x, x, row_index=index)
        for bad in (index.long(), index[None], index.to("meta"), index + 2, index - 1, index * 0):
            contract.refused("row_index", function, x.double(), x[:2].double(), row_index=bad)
        contract.refused("offsets", function, x, x, offsets=sample.long())
        contract.refused("offsets", function, x, x, offsets=sample.to("meta"))
        contract.refused("gamma", function, x, x, torch.ones(4))
        contract.refused("gamma", function, x, x, torch.ones(8, dtype=torch.int32))
        contract.refused("gamma", function, x, x, torch.ones(8, device="meta"))
        contract.refused("drop_path", function, x, x, drop_path=drop_path)
        contract.refused("drop_path", function, x, x, sample=sample)
        contract.refused("drop_path", function, x, x, drop_path=drop_path.bfloat16(), sample=sample)
        contract.refused("drop_path", function, x, x, drop_path=drop_path[None], sample=sample)
        contract.refused("drop_path", function, x, x, drop_path=drop_path.to("meta"), sample=sample)
        contract.refused("sample", function, x, x, drop_path=drop_path, sample=sample[:3])
        contract.refused("sample", function, x, x, drop_path=drop_path, sample=sample.float())
        contract.refused("sample", function, x, x, drop_path=drop_path, sample=sample.to("meta"))
        for number in (-1, len(drop_path)):
            wrong = dict(drop_path=drop_path, sample=sample.index_fill(0, torch.tensor(3), number))
            said = (
                f"sample: expected numbers from 0 to {len(drop_path) - 1}, which drop_path has factors of, got others"
            )
            assert contract.message_of(function, x, x, **wrong) == said
        contract.refused("dropout", function, x, x, dropout=1.0, seed=seed)
        contract.refused("dropout", function, x, x, dropout=-0.1, seed=seed)
        contract.refused("seed", function, x, x, dropout=0.1)
        contract.refused("seed", function, x, x, dropout=0.1, seed=seed.int())
        contract.refused("seed", function, x, x, dropout=0.1, seed=seed[None])
        contract.refused("seed", function, x, x, dropout=0.1, seed=seed.to("meta"))
    for function in (residual_layer_norm, residual_rms_norm):
        for bad in (torch.ones(7), torch.ones(8, device="meta"), None):
            contract.refused("norm_weight", function, x, x, None, bad)
        contract.refused("eps", function, x, x, None, torch.ones(8), eps=0.0)
        contract.refused("y", function, x, torch.zeros(4, 7), None, torch.ones(8))
    contract.refused("norm_bias", residual_layer_norm, x, x, None, torch.ones(8), torch.ones(2, 4))


@NORM
def test_rows_in_parts_take_a_row_index_and_dropout(norm):
    options = {"norm": norm, "index": [5, 0, 6], "dropout": 0.4}
    in_parts = Parameters(4096, 1, 8, 1, parts=2)  # the heuristic holds these rows whole
    with use_launch_parameters(norm, in_parts), use_launch_parameters(f"{norm}_backward", in_parts):
        leaves = leaves_of(7, 3000, norm, branch_rows=3)
        contract.check_against_naive(op(7, **options), plain(7, **options), leaves, torch.float32)


@NORM
def test_skipped_rows_are_x_and_the_others_have_the_bits_of_the_whole(norm):
    rows = 30
    dropped = DROP_PATH[sample_of(rows).long()] == 0
    index = torch.nonzero(~dropped).flatten().tolist()
    assert 0 < len(index) < rows
    for dtype in (torch.float32, HALF):
        for dropout in first((0.3, 0.0)):
            leaves = on_device(leaves_of(rows, 64, norm), dtype)
            leaves["x"][3] = -0.0
            given = [normal(rows, 64, seed=8 + i, dtype=dtype).to(DEVICE) for i in range(1 + (norm != NO_NORM))]
            whole, every = contract.run(op(rows, norm, dropout=dropout), leaves, given)
            some_leaves = {**leaves, "y": leaves["y"][index]}
            part, some = contract.run(op(rows, norm, dropout=dropout, index=index), some_leaves, given)
            for a, b in zip(part, whole, strict=True):
                assert torch.equal(a, b)
            assert torch.equal(some["x"], every["x"]) and torch.equal(some["y"], every["y"][index])
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(part[0][dropped].view(bits), leaves["x"][dropped].view(bits))


def test_the_gradient_of_rows_that_an_index_leaves_out_is_not_read_for_gamma():
    call, leaves = op(7, LAYER_NORM, index=[5, 0, 6]), on_device(leaves_of(7, 64, LAYER_NORM, branch_rows=3), CHECKED)
    given = [normal(7, 64, seed=seed, dtype=CHECKED).to(DEVICE) for seed in (8, 9)]
    expected = contract.run(call, leaves, given)[1]
    given[0][[1, 2, 3, 4]] = torch.nan
    actual = contract.run(call, leaves, given)[1]
    assert torch.equal(actual["gamma"], expected["gamma"]) and torch.equal(actual["y"], expected["y"])


@pytest.mark.parametrize("dtype", dict.fromkeys((CHECKED, torch.float64)), ids=str)
@pytest.mark.parametrize("counts", ([7], [0, 5, 9, 0, 3]))
def test_the_branch_s_gradient_is_summed_over_the_rows_of_each_modality(counts, dtype):
    bounds = [0, *accumulate(counts)]
    ranges, rows = [slice(start, stop) for start, stop in pairwise(bounds)], bounds[-1] + 2
    tensors = normal(rows, 64, seed=1), normal(64, seed=2), normal(rows, 64, seed=3)
    grad, gamma, y = (tensor.to(DEVICE, dtype) for tensor in tensors)
    nothing = dict.fromkeys(("grad_normed", "out", "norm_weight", "norm_bias", "mean", "rstd"))
    for scale in (gamma, None):
        saved = ResidualSaved(
            grad_out=grad, y=y, gamma=scale, drop_path=DropPath(), dropout=Dropout(), routing=Routing(int32(bounds)),
            y_dtype=dtype, **nothing,
        )  # fmt: skip
        sums = [None if m == 2 else torch.empty_like(gamma) for m in range(len(counts))]
        needs = ResidualGradients(False, scale is not None, scale is not None, False, False)
        found = residual_backward_and_sums(saved, needs, sums, ranges)
        dy = grad if scale is None else grad * scale
        for m, into in enumerate(sums):
            if into is not None:
                torch.testing.assert_close(into, dy[ranges[m]].sum(0))
        assert (found.y is None) == (scale is None)
        if scale is not None:
            torch.testing.assert_close(found.y[: bounds[-1]], dy[: bounds[-1]])
            torch.testing.assert_close(found.gamma, (grad * y)[: bounds[-1]].sum(0))


def test_offsets_are_read_on_the_device():
    x, y, offsets = torch.zeros(12, 64, device=DEVICE), torch.ones(12, 64, device=DEVICE), int32([0, 5])
    assert residual(x, y, offsets=offsets).sum() == 5 * 64
    offsets.copy_(int32([0, 9]))
    assert residual(x, y, offsets=offsets).sum() == 9 * 64


def test_elements_past_2_to_the_31st_are_reached(tmp_path):
    rows = normal(3, 64, seed=1, dtype=torch.float16).to(DEVICE)
    y = far_apart(normal(3, 64, seed=2, dtype=torch.float16).to(DEVICE), tmp_path)
    assert torch.equal(residual(rows, y), residual(rows, y.contiguous()))
    assert torch.equal(residual(y, rows), residual(y.contiguous(), rows))


def test_dropout_s_random_numbers_are_those_of_the_reference():
    x = torch.zeros(5, 70, device=DEVICE)
    for seed in (torch.tensor(value, device=DEVICE) for value in (0, -1, 2**63 - 1, 2**32)):
        out = residual(x, torch.ones_like(x), dropout=0.3, seed=seed)
        torch.testing.assert_close(out, dropout_factor(seed, out.shape, 0.3), rtol=1e-6, atol=0)
