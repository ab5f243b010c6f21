"""``residual`` and ``residual_layer_norm``: LayerScale, DropPath, dropout, and the LayerNorm behind them."""

import pytest
import torch
import torch.nn.functional as F
from support import contract, naive
from support.contract import normal
from support.plans import ragged_offsets

from onepeace_fast import residual, residual_layer_norm
from onepeace_fast.ops.arguments import MAX_WIDTH
from onepeace_fast.tolerance import DTYPES

GARBAGE = 2**31 - 1  # an entry of a row index that must not be read
DROP_PATH = torch.tensor([1.25, 0.0, 1.25, 1.25, 0.0])
SEED = 2**40 + 12345


def sample_of(rows: int) -> torch.Tensor:
    """Samples in runs, as packed rows have them, twice over."""
    return (torch.arange(rows) * 10 // max(rows, 1) % 5).int()


def leaves_of(rows: int, width: int, gamma: bool = True, norm: bool = False, bias: bool = True) -> dict:
    leaves = {"x": 2 * normal(rows, width, seed=1) + normal(rows, 1, seed=2), "y": 3 * normal(rows, width, seed=3)}
    leaves |= {"gamma": 0.5 + normal(width, seed=4)} if gamma else {}
    leaves |= {"norm_weight": 1 + 0.5 * normal(width, seed=5)} if norm else {}
    return leaves | ({"norm_bias": normal(width, seed=6)} if norm and bias else {})


def op(rows: int, drop_path: bool = True, dropout: float = 0.0, eps: float = 1e-5, seed: int = SEED):
    extra = {"drop_path": DROP_PATH, "sample": sample_of(rows)} if drop_path else {}
    extra |= {"dropout": dropout, "seed": torch.tensor(seed)} if dropout else {}

    def call(x, y, gamma=None, norm_weight=None, norm_bias=None):
        if norm_weight is None:
            return residual(x, y, gamma, **extra)
        return residual_layer_norm(x, y, gamma, norm_weight, norm_bias, eps=eps, **extra)

    return call


def plain(rows: int, width: int, drop_path: bool = True, dropout: float = 0.0, eps: float = 1e-5):
    factor = naive.dropout_factor(SEED, rows, width, dropout) if dropout else None

    def call(x, y, gamma=None, norm_weight=None, norm_bias=None):
        out = naive.residual(x, y, gamma, DROP_PATH if drop_path else None, sample_of(rows), factor)
        if norm_weight is None:
            return out
        weight, bias = (None if p is None else p.to(out.dtype) for p in (norm_weight, norm_bias))
        return out, F.layer_norm(out, out.shape[1:], weight, bias, eps).to(y.dtype)

    return call


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))
@pytest.mark.parametrize("rows, width", [(0, 64), (1, 63), (7, 1), (7, 64), (65, 200), (300, 63)])
def test_values_and_gradients_follow_the_naive_ones(rows, width, norm, dtype):
    leaves = leaves_of(rows, width, norm=norm and width > 1)
    sample = sample_of(rows)
    parts = [torch.nonzero(sample == s).flatten() for s in range(5)]
    slices = {name: parts for name in ("x", "y", "out0", "out1")}
    contract.check_against_naive(op(rows), plain(rows, width), leaves, dtype, slices)


def indexed(index: list[int] | None, extent: int | None, rows: int, dropout: float = 0.0):
    """The op with a row index, and with offsets whose last entry is ``extent``."""
    extra = {"drop_path": DROP_PATH, "sample": sample_of(rows), "dropout": dropout, "seed": torch.tensor(SEED)}
    extra |= {} if index is None else {"row_index": torch.tensor(index, dtype=torch.int32)}
    extra |= {} if extent is None else {"offsets": ragged_offsets([extent // 2, 0, extent - extent // 2])}

    def call(x, y, gamma=None, norm_weight=None, norm_bias=None):
        if norm_weight is None:
            return residual(x, y, gamma, **extra)
        return residual_layer_norm(x, y, gamma, norm_weight, norm_bias, **extra)

    return call


def naive_indexed(index: list[int] | None, extent: int | None, rows: int, dropout: float = 0.0):
    places = list(range(rows)) if index is None else index
    places = places if extent is None else places[:extent]

    def call(x, y, gamma=None, norm_weight=None, norm_bias=None):
        factor = naive.dropout_factor(SEED, rows, x.shape[1], dropout)[places] if dropout else None
        out = x.clone()
        out[places] = naive.residual(x[places], y[: len(places)], gamma, DROP_PATH, sample_of(rows)[places], factor)
        if norm_weight is None:
            return out
        return out, F.layer_norm(out, out.shape[1:], norm_weight, norm_bias).to(y.dtype)

    return call


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))
@pytest.mark.parametrize("extent", (None, 3, 0))
def test_a_row_index_adds_the_branch_to_these_rows(extent, norm, dtype):
    index = [11, 0, 5, 4, 9]
    index = [GARBAGE if i >= (5 if extent is None else extent) else row for i, row in enumerate(index)]
    leaves = leaves_of(12, 16, norm=norm) | {"y": 3 * normal(5, 16, seed=3)}
    for dropout in (0.0, 0.3):
        arguments = (index, extent, 12, dropout)
        contract.check_against_naive(indexed(*arguments), naive_indexed(*arguments), leaves, dtype)


@pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))
def test_rows_of_the_branch_past_the_extent_are_not_read(norm):
    leaves = leaves_of(7, 16, norm=norm)
    contract.check_against_naive(indexed(None, 5, 7), naive_indexed(None, 5, 7), leaves, torch.float64)
    expected = contract.run(indexed(None, 5, 7), leaves)
    leaves["y"][5:] = torch.nan
    contract.assert_same(contract.run(indexed(None, 5, 7), leaves), expected, "NaN in inert rows")


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))
def test_every_combination_of_options_follows_the_naive_one(norm, dtype):
    rows, width = 7, 16
    for gamma in (False, True):
        for drop_path in (False, True):
            for dropout in (0.0, 0.4):
                leaves = leaves_of(rows, width, gamma, norm, bias=gamma)
                contract.check_against_naive(
                    op(rows, drop_path, dropout, eps=0.1),
                    plain(rows, width, drop_path, dropout, eps=0.1),
                    leaves,
                    dtype,
                )


@pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))
def test_the_stream_may_be_float32_over_a_half_precision_branch(norm):
    leaves = leaves_of(65, 64, norm=norm)
    dtypes = {name: torch.bfloat16 if name == "y" else torch.float32 for name in leaves}
    contract.check_against_naive(op(65), plain(65, 64), leaves, dtypes)
    outputs = contract.run(op(65), {name: leaf.to(dtypes[name]) for name, leaf in leaves.items()})[0]
    assert [output.dtype for output in outputs] == [torch.float32, torch.bfloat16][: len(outputs)]


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


@pytest.mark.parametrize("which", (0, 1))
def test_an_output_without_a_gradient_counts_as_zero(which):
    def pick(function):
        return lambda **mine: function(**mine)[which]

    leaves = leaves_of(7, 16, norm=True)
    mine = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    theirs = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    given = normal(7, 16, seed=8)
    pick(op(7))(**mine).backward(given)
    pick(plain(7, 16))(**theirs).backward(given)
    for name, leaf in mine.items():
        expected = torch.zeros_like(leaf) if theirs[name].grad is None else theirs[name].grad
        actual = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(actual, expected, msg=name)


def test_finite_differences_agree():
    contract.check_gradcheck(op(4), leaves_of(4, 3))
    contract.check_gradcheck(op(4, dropout=0.3), leaves_of(4, 3, norm=True))
    indexed_leaves = leaves_of(5, 3, norm=True) | {"y": normal(3, 3, seed=3)}
    contract.check_gradcheck(indexed([4, 0, GARBAGE], 2, 5, dropout=0.3), indexed_leaves)
    contract.check_gradcheck(op(4, drop_path=False), leaves_of(4, 3, gamma=False, norm=True, bias=False))


def test_registration():
    contract.check_registration(op(5), leaves_of(5, 8), "residual")
    contract.check_registration(op(5, dropout=0.3), leaves_of(5, 8, norm=True), "residual")
    contract.check_registration(op(5), leaves_of(5, 8, gamma=False), "residual")
    leaves = leaves_of(5, 8, norm=True) | {"y": normal(3, 8, seed=3)}
    contract.check_registration(indexed([4, 0, GARBAGE], 2, 5, dropout=0.3), leaves, "residual")


@pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))
def test_strides_of_inputs_and_gradients_do_not_matter(norm):
    leaves = leaves_of(7, 9, norm=norm)
    contract.check_input_layouts(op(7, dropout=0.3), leaves, ["x", "y"])
    contract.check_gradient_layouts(op(7, dropout=0.3), leaves)
    contract.check_gradient_layouts(op(7, drop_path=False), leaves_of(7, 9, gamma=False, norm=norm))
    contract.check_gradient_layouts(op(7), {name: leaf.bfloat16() for name, leaf in leaves.items()})


def test_the_gradient_of_x_is_the_incoming_one_and_costs_no_copy():
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(7, 8).items()}
    out = op(7)(**leaves)
    given = normal(7, 8, seed=8)
    (dx,) = torch.autograd.grad(out, leaves["x"], given)
    assert dx.data_ptr() == given.data_ptr()


def test_gradients_of_leaves_do_not_share_memory():
    x, y = (leaf.requires_grad_() for leaf in leaves_of(7, 8, gamma=False).values())
    given = torch.ones(7, 8, dtype=x.dtype)
    residual(x, y).backward(given)
    x.grad.add_(1)
    assert (y.grad == 1).all() and (given == 1).all()
    y.grad.add_(2)
    assert (x.grad == 2).all() and (given == 1).all()


def test_rows_are_independent():
    leaves = leaves_of(30, 16, norm=True)
    expected = contract.run(op(30), leaves)
    others = torch.arange(30) != 4
    for name in ("x", "y"):
        poisoned = {**leaves, name: leaves[name].clone()}
        poisoned[name][4] = torch.nan
        actual = contract.run(op(30), poisoned)
        for a, b in zip(actual[0], expected[0], strict=True):
            assert torch.equal(a[others], b[others])
        for key in ("x", "y"):
            assert torch.equal(actual[1][key][others], expected[1][key][others])


def test_frozen_parameters_get_no_gradient_and_no_rows_give_zeros():
    contract.check_frozen(op(7), leaves_of(7, 9, norm=True))
    contract.check_frozen(op(7, dropout=0.2), leaves_of(7, 9))
    gradients = contract.run(op(0), leaves_of(0, 9, norm=True))[1]
    for name in ("gamma", "norm_weight", "norm_bias"):
        assert torch.equal(gradients[name], torch.zeros(9, dtype=torch.float64))


def test_second_derivative_is_refused():
    contract.check_second_derivative(op(5), leaves_of(5, 8))
    contract.check_second_derivative(op(5), leaves_of(5, 8, norm=True))


def test_repeats_are_bitwise_equal():
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {name: leaf.to(dtype) for name, leaf in leaves_of(131, 65, norm=True).items()}
        contract.check_deterministic(op(131, dropout=0.3), leaves)


def test_compiled_equals_eager():
    contract.check_compiled(op(7), leaves_of(7, 16))
    contract.check_compiled(op(7, dropout=0.3), leaves_of(7, 16, norm=True))
    contract.check_compiled(indexed([4, 0, GARBAGE], 2, 5), leaves_of(5, 8) | {"y": normal(3, 8, seed=3)})


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(x, y, gamma, norm_weight, norm_bias, sample):
        return residual_layer_norm(x, y, gamma, norm_weight, norm_bias, drop_path=DROP_PATH, sample=sample)

    cases = [(leaves_of(rows, 16, norm=True), {"sample": sample_of(rows)}) for rows in (7, 12, 9)]
    contract.check_compiled_once(cases, call)


def test_bad_input_is_refused():
    x, sample, seed = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int32), torch.tensor(1)
    for function in (residual, lambda *a, **k: residual_layer_norm(*a, *[None] * (3 - len(a)), torch.ones(8), **k)):
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
            contract.refused("row_index", function, x, x[:2], row_index=bad)
        contract.refused("offsets", function, x, x, offsets=sample.long())
        contract.refused("offsets", function, x, x, offsets=sample.to("meta"))
        contract.refused("gamma", function, x, x, torch.ones(4))
        contract.refused("gamma", function, x, x, torch.ones(8, dtype=torch.int32))
        contract.refused("gamma", function, x, x, torch.ones(8, device="meta"))
        contract.refused("drop_path", function, x, x, drop_path=DROP_PATH)
        contract.refused("drop_path", function, x, x, sample=sample)
        contract.refused("drop_path", function, x, x, drop_path=DROP_PATH.bfloat16(), sample=sample)
        contract.refused("drop_path", function, x, x, drop_path=DROP_PATH[None], sample=sample)
        contract.refused("drop_path", function, x, x, drop_path=DROP_PATH.to("meta"), sample=sample)
        contract.refused("sample", function, x, x, drop_path=DROP_PATH, sample=sample[:3])
        contract.refused("sample", function, x, x, drop_path=DROP_PATH, sample=sample.float())
        contract.refused("sample", function, x, x, drop_path=DROP_PATH, sample=sample.to("meta"))
        contract.refused("dropout", function, x, x, dropout=1.0, seed=seed)
        contract.refused("dropout", function, x, x, dropout=-0.1, seed=seed)
        contract.refused("seed", function, x, x, dropout=0.1)
        contract.refused("seed", function, x, x, dropout=0.1, seed=seed.int())
        contract.refused("seed", function, x, x, dropout=0.1, seed=seed[None])
        contract.refused("seed", function, x, x, dropout=0.1, seed=seed.to("meta"))
    contract.refused("norm_weight", residual_layer_norm, x, x, None, torch.ones(7))
    contract.refused("norm_weight", residual_layer_norm, x, x, None, torch.ones(8, device="meta"))
    contract.refused("norm_bias", residual_layer_norm, x, x, None, torch.ones(8), torch.ones(2, 4))


def test_a_norm_without_weight_and_an_eps_of_zero_are_refused():
    x = torch.zeros(4, 8)
    contract.refused("norm_weight", residual_layer_norm, x, x, None, None)
    contract.refused("eps", residual_layer_norm, x, x, None, torch.ones(8), eps=0.0)
