"""``routed_ffn``: one GeGLU network per modality, with Sub-LayerNorm, bias, LayerScale, DropPath and residual.

They hold of the reference and, where kernels run, of each strategy of theirs; a test without one takes "hybrid", or
"per_modality" where the tiles cannot take its tensors.
"""

import pytest
import torch
from support import contract
from support.ffn_cases import (
    ALL,
    DROP_PATH,
    NO_GATE,
    OPTIONS,
    check_nan_in_inert_rows,
    check_nan_in_one_modality,
    leaves_of,
    lists_of,
    op,
    plain,
    sample_of,
    slices_of,
)
from support.kernels import (
    CHECKED,
    CONTRACT_DTYPES,
    HALF,
    PRODUCT_DTYPE,
    REFERENCE_ONLY,
    REPEATS,
    first,
    interpreter_only,
    on_device,
    product_size,
)
from support.plans import ragged_offsets
from support.tiles import small_tiles

from onepeace_fast import routed_ffn
from onepeace_fast.ops.gated_sub_ln import ACTIVATIONS
from onepeace_fast.tolerance import DTYPES

IN_PARTS = pytest.param([2, 0, 1], 32, 6144, 2, marks=pytest.mark.slow)  # a kernel holds such rows in parts
SHAPES = [([5, 0, 7], 16, 40, 0), IN_PARTS, ([1, 0, 6], 63, 64, 0), ([7, 65], 64, 200, 3), ([0, 0], 8, 16, 1)]
SHAPES += [([300, 1, 7], 8, 16, 2), ([7, 1], 1, 63, 0)] if REFERENCE_ONLY else []
# The kernels between the products of "per_modality" have tests of their own.
SELDOM = pytest.param("per_modality", marks=pytest.mark.slow)
STRATEGY = pytest.mark.parametrize("strategy", (None,) if REFERENCE_ONLY else ("grouped", "hybrid", SELDOM))


@pytest.fixture(autouse=True)
def tiles():
    with small_tiles():
        yield


def checked(strategy):
    """The dtype of most tests; a GPU's own products take half precision alone."""
    return PRODUCT_DTYPE if strategy in ("grouped", "hybrid") else CHECKED


@pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
@pytest.mark.parametrize("counts, width, hidden, inert", first(SHAPES, 2), ids=str)
def test_values_and_gradients_follow_the_naive_ones(counts, width, hidden, inert, dtype):
    leaves = on_device(leaves_of(counts, width, hidden, inert=inert))
    contract.check_against_naive(op(counts, inert=inert), plain(counts, inert=inert), leaves, dtype, slices_of(counts))


@interpreter_only
@pytest.mark.parametrize("dtype", (CHECKED, HALF)[: 1 + REFERENCE_ONLY], ids=str)
@pytest.mark.parametrize(
    "strategy", (None,) if REFERENCE_ONLY else ("hybrid", SELDOM, pytest.param("grouped", marks=pytest.mark.slow))
)
def test_every_combination_of_options_follows_the_naive_one(strategy, dtype):
    counts = [5, 0, 7]
    for number in range(2 ** len(OPTIONS)):
        options = frozenset(name for i, name in enumerate(OPTIONS) if number >> i & 1)
        if "residual" in options or not options & {"gamma", "drop_path"}:
            form = {"options": options, "inert": 1, "eps": 0.1}
            leaves = on_device(leaves_of(counts, 8, 12, options, 1))
            contract.check_against_naive(
                op(counts, **form, strategy=strategy), plain(counts, **form), leaves, dtype, slices_of(counts)
            )


@interpreter_only
@pytest.mark.parametrize("gate", ("gate", NO_GATE))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "strategy", (None,) if REFERENCE_ONLY else ("grouped", SELDOM, pytest.param("hybrid", marks=pytest.mark.slow))
)
def test_every_activation_follows_the_naive_one_with_and_without_a_gate(strategy, activation, gate):
    counts, form = [5, 0, 40], {"options": ALL | {gate}, "inert": 1, "activation": activation}
    leaves = on_device(leaves_of(counts, 32, 72, form["options"], 1))
    for dtype in (CHECKED, HALF)[: 2 if strategy == "per_modality" or REFERENCE_ONLY else 1]:
        contract.check_against_naive(
            op(counts, **form, strategy=strategy), plain(counts, **form), leaves, dtype, slices_of(counts)
        )


@STRATEGY
def test_the_residual_may_be_float32_over_half_precision_products(strategy):
    counts, leaves = [7, 0, 40], on_device(leaves_of([7, 0, 40], *product_size(64, 96)))
    dtypes = {name: torch.float32 if name in ("residual", "gamma") else HALF for name in leaves}
    contract.check_against_naive(op(counts, strategy=strategy), plain(counts), leaves, dtypes, slices_of(counts))


def test_autocast_runs_the_products_in_its_dtype_and_returns_parameter_gradients_in_theirs():
    counts = [7, 12]
    leaves = {name: leaf.float() for name, leaf in leaves_of(counts, 64, 96).items()}
    products = ("z", "w0", "w1", "w2", "b2")

    def autocast(**mine):
        with torch.autocast("cpu", torch.bfloat16):
            return op(counts)(**mine)

    def by_hand(**mine):
        return op(counts)(**{k: v.bfloat16() if k.startswith(products) else v for k, v in mine.items()})

    actual = contract.run(autocast, leaves)
    contract.assert_same(actual, contract.run(by_hand, leaves), "autocast")
    assert {gradient.dtype for gradient in actual[1].values()} == {torch.float32}


@STRATEGY
def test_offsets_alone_and_host_counts_give_the_same_bits(strategy):
    counts = [5, 0, 40]
    leaves = on_device(leaves_of(counts, *product_size(32, 72), inert=2), checked(strategy))
    by_offsets, by_counts = (op(counts, host=host, inert=2, strategy=strategy) for host in (False, True))
    contract.assert_same(contract.run(by_offsets, leaves), contract.run(by_counts, leaves), "host counts")


@pytest.mark.skipif(not REFERENCE_ONLY, reason="a kernel fuses what the test rounds twice")
def test_dropped_rows_keep_x_bitwise_and_kept_rows_add_the_scaled_branch():
    counts = [6, 9]
    for dtype in DTYPES:
        leaves = {name: leaf.to(dtype) for name, leaf in leaves_of(counts, 32, 48).items()}
        outputs, gradients = contract.run(op(counts), leaves)
        dropped = DROP_PATH[sample_of(counts).long()] == 0
        assert dropped.any() and not dropped.all()
        assert torch.equal(outputs[0][dropped], leaves["residual"][dropped])
        assert not gradients["z"][dropped].any() and gradients["z"][~dropped].any(1).all()
        branch = {name: leaf for name, leaf in leaves.items() if name not in ("residual", "gamma")}
        y = op(counts, ALL - {"drop_path"})(**branch).float()
        kept = (leaves["residual"].float() + y * (leaves["gamma"].float() * 1.25)).to(dtype)
        assert torch.equal(outputs[0][~dropped], kept[~dropped])


def test_dropped_samples_leave_no_trace_in_parameter_gradients():
    counts, leaves = [6, 9], leaves_of([6, 9], 16, 24)
    expected = contract.run(op(counts), leaves)[1]
    dropped = DROP_PATH[sample_of(counts).long()] == 0
    leaves["z"] = torch.where(dropped[:, None], 7 * leaves["z"].flip(0), leaves["z"])
    actual = contract.run(op(counts), leaves)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_finite_differences_agree():
    contract.check_gradcheck(op([2, 0, 2]), leaves_of([2, 0, 2], 2, 3))
    bare = frozenset()
    contract.check_gradcheck(op([2, 1], bare, inert=1), leaves_of([2, 1], 2, 3, bare, 1))


def test_registration():
    contract.check_registration(op([3, 0, 2]), leaves_of([3, 0, 2], 4, 6), "routed_ffn")
    bare = frozenset()
    contract.check_registration(op([3, 2], bare, host=False), leaves_of([3, 2], 4, 6, bare), "routed_ffn")


def test_strides_of_inputs_and_gradients_do_not_matter():
    counts, leaves = [3, 4], leaves_of([3, 4], 6, 8)
    contract.check_input_layouts(op(counts), leaves, ["z", "residual", "w0_0", "w2_1"])
    contract.check_gradient_layouts(op(counts), leaves)
    bare = leaves_of(counts, 6, 8, frozenset())
    contract.check_gradient_layouts(op(counts, frozenset()), bare)
    contract.check_gradient_layouts(op(counts, frozenset()), {name: leaf.bfloat16() for name, leaf in bare.items()})


@pytest.mark.skipif(REFERENCE_ONLY, reason="products in another order, of kernels")
@pytest.mark.parametrize("options", (ALL, frozenset()), ids=("all options", "bare"))
def test_strides_do_not_matter_to_the_kernels_between_products(options):
    counts = [5, 0, 7]
    leaves = on_device(leaves_of(counts, 6, 8, options), torch.float32)
    contract.check_gradient_layouts(op(counts, options), leaves)
    expected = contract.run(op(counts, options), leaves)
    for layout in contract.LAYOUTS:
        for name in {"z", "residual", "w0_0", "w2_1"} & set(leaves):
            actual = contract.run(op(counts, options), {**leaves, name: layout(leaves[name])})
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
            contract.assert_close_gradients(actual[1], expected[1], f"{name} {layout.__name__}")


@STRATEGY
def test_nan_in_one_modality_leaves_the_others_alone(strategy):
    counts, options = [33, 40, 9], ALL - {"gamma"}
    leaves = on_device(leaves_of(counts, *product_size(96, 72), options), checked(strategy))
    check_nan_in_one_modality(op(counts, options, strategy=strategy), counts, leaves)


def test_nan_in_one_row_leaves_the_other_rows_alone():
    counts, leaves = [5, 4], leaves_of([5, 4], 16, 24)
    expected = contract.run(op(counts), leaves)
    leaves["z"][2] = torch.nan
    actual = contract.run(op(counts), leaves)
    others = torch.arange(9) != 2
    assert torch.equal(actual[0][0][others], expected[0][0][others])
    assert torch.equal(actual[1]["z"][others], expected[1]["z"][others])


@STRATEGY
def test_nan_in_inert_rows_reaches_nothing(strategy):
    counts = [5, 0, 40]
    leaves = on_device(leaves_of(counts, *product_size(16, 24), inert=3), checked(strategy))
    check_nan_in_inert_rows(op(counts, inert=3, strategy=strategy), counts, leaves)


@STRATEGY
def test_inert_rows_keep_the_residual_and_are_zero_without_one(strategy):
    counts = [5, 0, 40]
    leaves = on_device(leaves_of(counts, *product_size(16, 24), inert=3), checked(strategy))
    assert torch.equal(op(counts, inert=3, strategy=strategy)(**leaves)[-3:], leaves["residual"][-3:])
    bare = {name: leaf for name, leaf in leaves.items() if name not in ("residual", "gamma")}
    assert not op(counts, frozenset(), inert=3, strategy=strategy)(**bare)[-3:].any()


def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros():
    counts, leaves = [3, 0, 2], on_device(leaves_of([3, 0, 2], 4, 8), CHECKED)
    contract.check_frozen(op(counts), leaves)
    gradients = contract.run(op(counts), leaves)[1]
    idle = [name for name in leaves if name.endswith("_1")]
    assert len(idle) == 6
    for name in idle:
        assert torch.equal(gradients[name], torch.zeros_like(leaves[name])), name
    for name in ("w0_0", "w1_2", "w2_0", "b2_2", "norm_weight_0", "norm_bias_2"):
        assert gradients[name].any(), name


def test_second_derivative_is_refused():
    contract.check_second_derivative(op([3, 2]), leaves_of([3, 2], 4, 6))


@STRATEGY
def test_repeats_are_bitwise_equal(strategy):
    counts, size = ([65, 0, 67], (31, 33)) if REFERENCE_ONLY else ([9, 0, 33], product_size(32, 40))
    for dtype in (torch.float32, HALF)[not REFERENCE_ONLY :]:
        leaves = on_device(leaves_of(counts, *size, inert=3), dtype)
        contract.check_deterministic(op(counts, inert=3, strategy=strategy), leaves, REPEATS)


@STRATEGY
def test_compiled_equals_eager(strategy):
    for counts, options, inert in (([3, 0, 4], ALL, 1), ([3, 4], frozenset(), 0)):
        leaves = on_device(leaves_of(counts, *product_size(8, 16), options, inert), checked(strategy))
        contract.check_compiled(op(counts, options, inert=inert, strategy=strategy), leaves)


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(z, residual, gamma, offsets, first, second, sample, **parameters):
        lists = lists_of(parameters, 2)
        rows = [first, second]
        return routed_ffn(
            z,
            offsets=offsets,
            row_counts=rows,
            residual=residual,
            gamma=gamma,
            drop_path=DROP_PATH,
            sample=sample,
            **lists,
        )

    cases = []
    for counts in ([5, 4], [2, 9], [7, 6]):
        arguments = {"offsets": ragged_offsets(counts), "first": counts[0], "second": counts[1]}
        cases.append((leaves_of(counts, 8, 12), arguments | {"sample": sample_of(counts)}))
    contract.check_compiled_once(cases, call)
