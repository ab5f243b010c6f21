"""The kernels of ``gated_sub_ln``: every form against the naive code, hostile layouts, repeats."""

import pytest
import torch
from ops.test_gated_sub_ln import (  # noqa: F401  what holds of the reference as well
    test_compiled_equals_eager,
    test_every_activation_follows_the_naive_one_with_and_without_gate_and_norm,
    test_frozen_norms_get_no_gradient_and_idle_ones_get_zeros,
    test_nan_in_inert_rows_reaches_nothing,
    test_nan_in_one_modality_leaves_the_others_alone,
    test_norms_may_have_another_dtype_than_u,
    test_offsets_alone_and_host_counts_give_the_same_bits,
    test_relu_has_the_derivative_zero_at_zero_and_keeps_what_is_no_number,
    test_repeats_are_bitwise_equal,
    test_rows_are_independent,
    test_strides_of_inputs_and_gradients_do_not_matter,
)
from support import contract
from support.contract import normal
from support.gated_cases import leaves_of, op, plain, slices_of
from support.kernels import (
    DEVICE,
    DTYPES,
    MANY_ROWS,
    WIDTHS,
    far_apart,
    first,
    int32,
    interpreter_only,
    on_device,
)

from onepeace_fast.ops.gated_sub_ln import GATED_SUB_LN, gated_sub_ln_backward_and_n
from onepeace_fast.structures import GatedSubLNGradients, GatedSubLNInputs, GatedSubLNSaved, Routing

MODALITIES = ([7], [5, 0, 7], [0, 1, 2, 0, 9, 3, 1])[DEVICE == "cuda" :]


def check(counts, width, dtype, activation="gelu", **form) -> None:
    contract.check_against_naive(
        op(counts, activation), plain(counts, activation), on_device(leaves_of(counts, width, **form)), dtype,
        slices_of(counts),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients_follow_the_naive_ones(width, dtype):
    for counts, inert in first((([5, 0, 2], 2), ([0, 0], 3), ([0], 0), ([1], 0)), 2):
        check(counts, width, dtype, inert=inert)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", MODALITIES, ids=str)
def test_one_modality_and_many_follow_the_naive_code(counts, dtype):
    for width in WIDTHS[:2]:
        check(counts, width, dtype, inert=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:] if DEVICE == "cuda" else WIDTHS[1:2])
def test_many_rows_follow_the_naive_code(width, dtype):
    check([MANY_ROWS - 313, 0, 300], width, dtype, inert=13)


def test_an_activation_without_gate_and_norm_follows_the_naive_one():
    check([3, 0, 2], 63, DTYPES[-1], "gelu_tanh", inert=1, gate=False, norm=False)


@interpreter_only
@pytest.mark.parametrize("absent", ({"gate": False}, {"norm": False}), ids=str)
def test_rows_in_parts_need_neither_gate_nor_norm(absent):
    check([2, 0, 1], 6144, torch.float32, inert=1, **absent)


@interpreter_only
def test_rows_of_one_element_have_nothing_left_but_the_bias():
    for dtype in DTYPES:
        counts, leaves = [5, 0, 3], on_device(leaves_of([5, 0, 3], 1), dtype)
        outputs, gradients = contract.run(op(counts), leaves)
        expected = torch.cat([leaves["bias0"].expand(5), leaves["bias2"].expand(3)])
        assert torch.equal(outputs[0][:, 0], expected)
        for name in ("u", "v", "weight0", "weight1", "weight2"):
            assert torch.equal(gradients[name], torch.zeros_like(gradients[name])), name
        check(counts, 1, dtype, norm=False)


def test_a_large_mean_of_h_does_not_cancel_its_variance():
    counts, leaves = [6, 3], on_device(leaves_of([6, 3], 768))
    leaves["u"], leaves["v"] = 0.25 * leaves["u"] + 24, 0.25 * leaves["v"] + 24
    contract.check_against_naive(op(counts), plain(counts), leaves, torch.float32, slices_of(counts))


def test_the_backward_kernel_gives_n_once_more():
    counts = [3, 0, 2]
    for absent in ({}, {"gate": False}, {"norm": False}):
        for dtype in DTYPES:
            leaves = on_device(leaves_of(counts, 6144, inert=1, **absent), dtype)
            norms = [[leaves[f"{kind}{m}"] for m in range(3) if "weight0" in leaves] for kind in ("weight", "bias")]
            offsets = int32([0, 3, 3, 5])
            u, v, needs = leaves["u"], leaves.get("v"), [False] * len(norms[0])
            n, *statistics = GATED_SUB_LN.run(GatedSubLNInputs(u, v, *norms, Routing(offsets), "gelu", 1e-5))
            saved = GatedSubLNSaved(u, u, v, *statistics, *norms, Routing(offsets), "gelu")
            _, again = gated_sub_ln_backward_and_n(saved, GatedSubLNGradients(True, True, needs, needs), n_needed=True)
            epsilon = torch.finfo(dtype).eps
            torch.testing.assert_close(again, n, rtol=2 * epsilon, atol=4 * epsilon)


def test_rows_may_lie_past_2_to_the_31_elements(tmp_path):
    leaves = on_device(leaves_of([3], 8), torch.float16)
    given = [normal(3, 8, seed=9, dtype=torch.float16).to(DEVICE)]
    expected = contract.run(op([3]), leaves, given)
    for name in ("u", "v"):
        actual = contract.run(op([3]), {**leaves, name: far_apart(leaves[name], tmp_path)}, given)
        contract.assert_same(actual, expected, f"{name} far apart")
    contract.assert_same(contract.run(op([3]), leaves, [far_apart(given[0], tmp_path)]), expected, "gradient far apart")
