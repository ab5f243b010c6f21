"""``gated_sub_ln``: activation, gate and Sub-LayerNorm per modality.

The tests that take ``CHECKED`` and ``on_device`` hold of the reference and of the kernels: tests/kernels runs them too.
"""

import pytest
import torch
from support import contract
from support.contract import normal
from support.gated_cases import leaves_of, op, plain, slices_of
from support.kernels import CHECKED, DEVICE, HALF, INTERPRETED, REPEATS, interpreter_only, on_device
from support.plans import ragged_offsets

from onepeace_fast import gated_sub_ln
from onepeace_fast.ops.gated_sub_ln import ACTIVATIONS, gated_sub_ln_backward_and_n, gated_sub_ln_reference
from onepeace_fast.structures import GatedSubLNGradients, GatedSubLNInputs, GatedSubLNSaved, Routing
from onepeace_fast.tolerance import DTYPES

ABSENT = ({}, {"gate": False}, {"norm": False}, {"gate": False, "norm": False})


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize(
    "counts, width, inert",
    [([5, 0, 7], 63, 0), ([1], 64, 2), ([0, 1, 65], 200, 3), ([300, 7], 8, 0), ([0, 0], 16, 1), ([0], 16, 0)],
    ids=str,
)
def test_values_and_gradients_follow_the_naive_ones_in_every_modality(counts, width, inert, dtype):
    leaves = leaves_of(counts, width, inert=inert)
    contract.check_against_naive(op(counts), plain(counts), leaves, dtype, slices_of(counts))


@interpreter_only
@pytest.mark.parametrize("absent", ABSENT, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_follows_the_naive_one_with_and_without_gate_and_norm(activation, absent):
    counts = [5, 0, 7]
    for dtype in (CHECKED, HALF):
        contract.check_against_naive(
            op(counts, activation, eps=0.1), plain(counts, activation, eps=0.1),
            on_device(leaves_of(counts, 24, inert=1, **absent)), dtype, slices_of(counts),
        )  # fmt: skip


def test_relu_has_the_derivative_zero_at_zero_and_keeps_what_is_no_number():
    u = torch.tensor([[0.0, -0.0, 3.0, -3.0, torch.inf, -torch.inf, torch.nan]], dtype=CHECKED, device=DEVICE)
    outputs, gradients = contract.run(op([1], "relu"), {"u": u}, [torch.ones_like(u)])
    assert torch.equal(outputs[0].nan_to_num(-1.0), u.new_tensor([[0, 0, 3, 0, torch.inf, 0, -1]]).nan_to_num(-1.0))
    assert torch.equal(gradients["u"], u.new_tensor([[0, 0, 1, 0, 1, 0, 1]]))


def test_norms_may_have_another_dtype_than_u():
    counts, leaves = [5, 0, 7], on_device(leaves_of([5, 0, 7], 64))
    dtypes = {name: HALF if name in ("u", "v") else torch.float32 for name in leaves}

    def by_hand(u, v, **norms):
        return plain(counts)(u.to(norms["bias0"].dtype), v.to(norms["bias0"].dtype), **norms).to(u.dtype)

    contract.check_against_naive(op(counts), by_hand, leaves, dtypes, slices_of(counts))


def test_offsets_alone_and_host_counts_give_the_same_bits():
    counts, leaves = [5, 0, 7], on_device(leaves_of([5, 0, 7], 64, inert=2), CHECKED)
    contract.assert_same(contract.run(op(counts, host=False), leaves), contract.run(op(counts), leaves), "host")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_finite_differences_agree(activation):
    for absent in ABSENT:
        contract.check_gradcheck(op([3, 0, 2], activation), leaves_of([3, 0, 2], 5, inert=1, **absent))


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_registration(absent):
    contract.check_registration(op([3, 0, 2]), leaves_of([3, 0, 2], 8, inert=1, **absent), "gated_sub_ln")


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_the_backward_pass_gives_n_once_more(absent):
    counts, leaves = [3, 0, 2], leaves_of([3, 0, 2], 8, inert=1, **absent)
    norms = [[leaves[f"{kind}{m}"] for m in range(3) if "weight0" in leaves] for kind in ("weight", "bias")]
    u, v, routing = leaves["u"], leaves.get("v"), Routing(ragged_offsets(counts), tuple(counts))
    needs = [False] * len(norms[0])
    n, *statistics = gated_sub_ln_reference(GatedSubLNInputs(u, v, *norms, routing, "gelu", 1e-5))
    saved = GatedSubLNSaved(u, u, v, *statistics, *norms, routing, "gelu")
    _, again = gated_sub_ln_backward_and_n(saved, GatedSubLNGradients(True, True, needs, needs), n_needed=True)
    torch.testing.assert_close(again, n, rtol=1e-12, atol=1e-12)


def test_strides_of_inputs_and_gradients_do_not_matter():
    counts, leaves = [3, 4], on_device(leaves_of([3, 4], 70), CHECKED)
    contract.check_input_layouts(op(counts), leaves, ["u", "v"])
    contract.check_gradient_layouts(op(counts), leaves)
    contract.check_gradient_layouts(op(counts), on_device(leaves, HALF))


def test_rows_are_independent():
    counts, leaves = [8], on_device(leaves_of([8], 64), CHECKED)
    expected = contract.run(op(counts), leaves)
    leaves["v"][3] = torch.nan
    actual = contract.run(op(counts), leaves)
    others = torch.arange(8) != 3
    assert torch.equal(actual[0][0][others], expected[0][0][others])
    for name in ("u", "v"):
        assert torch.equal(actual[1][name][others], expected[1][name][others])


@pytest.mark.parametrize("poisoned", ("u", "v", "gradient"))
def test_nan_in_inert_rows_reaches_nothing(poisoned):
    counts, width, inert = [5, 0, 7], 64, 3
    leaves = on_device(leaves_of(counts, width, inert=inert), CHECKED)
    given = [normal(sum(counts) + inert, width, seed=9).to(DEVICE)]
    expected = contract.run(op(counts), leaves, given)
    (given[0] if poisoned == "gradient" else leaves[poisoned])[-inert:] = torch.nan
    contract.assert_same(contract.run(op(counts), leaves, given), expected, "NaN in inert rows")
    for tensor in (expected[0][0], expected[1]["u"], expected[1]["v"]):
        assert not tensor[-inert:].any()


def test_nan_in_one_modality_leaves_the_others_alone():
    counts, leaves = [5, 4, 7], on_device(leaves_of([5, 4, 7], 63), CHECKED)
    expected = contract.run(op(counts), leaves)
    leaves["u"][5:9] = torch.nan
    leaves["weight1"][:] = torch.nan
    actual = contract.run(op(counts), leaves)
    real = [*range(5), *range(9, 16)]
    assert torch.equal(actual[0][0][real], expected[0][0][real])
    for name in ("weight0", "bias0", "weight2", "bias2"):
        assert torch.equal(actual[1][name], expected[1][name]), name
    for name in ("u", "v"):
        assert torch.equal(actual[1][name][real], expected[1][name][real]), name


def test_frozen_norms_get_no_gradient_and_idle_ones_get_zeros():
    counts, leaves = [5, 0, 2], on_device(leaves_of([5, 0, 2], 63), CHECKED)
    contract.check_frozen(op(counts), leaves)
    gradients = contract.run(op(counts), leaves)[1]
    for name in ("weight1", "bias1"):
        assert torch.equal(gradients[name], torch.zeros_like(leaves[name]))
    for name in ("weight0", "bias2"):
        assert gradients[name].all()


def test_second_derivative_is_refused():
    contract.check_second_derivative(op([3, 2]), leaves_of([3, 2], 8))


def test_repeats_are_bitwise_equal():
    counts = [19, 0, 10] if INTERPRETED else [4019, 0, 3010]
    for dtype in (torch.float32, HALF):
        contract.check_deterministic(op(counts), on_device(leaves_of(counts, 70, inert=4), dtype), REPEATS)


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_compiled_equals_eager(absent):
    contract.check_compiled(op([3, 0, 4]), on_device(leaves_of([3, 0, 4], 16, inert=2, **absent), CHECKED))


def test_one_dynamic_graph_serves_every_number_of_rows():
    def call(u, v, weight0, weight1, bias0, bias1, offsets, first, second):
        return gated_sub_ln(u, v, [weight0, weight1], [bias0, bias1], offsets=offsets, row_counts=[first, second])

    cases = [
        (leaves_of(counts, 16), {"offsets": ragged_offsets(counts), "first": counts[0], "second": counts[1]})
        for counts in ([6, 4], [2, 9], [7, 5])
    ]
    contract.check_compiled_once(cases, call)


def test_bad_input_is_refused():
    u, w, rows = torch.zeros(4, 8), [torch.ones(8)] * 2, {"offsets": ragged_offsets([1, 3])}
    contract.refused("u", gated_sub_ln, torch.zeros(2, 2, 8), **rows)
    contract.refused("u", gated_sub_ln, torch.zeros(4, 8, dtype=torch.int32), **rows)
    contract.refused("u", gated_sub_ln, torch.zeros(4, 16385), **rows)
    contract.refused("v", gated_sub_ln, u, u.half(), **rows)
    contract.refused("v", gated_sub_ln, u, u[:3], **rows)
    contract.refused("v", gated_sub_ln, u, u.to("meta"), **rows)
    contract.refused("norm_weight", gated_sub_ln, u, u, w[:1], w, **rows)
    contract.refused("norm_bias", gated_sub_ln, u, u, w, [*w, w[0]], **rows)
    contract.refused("norm_weight", gated_sub_ln, u, u, w, **rows)
    contract.refused("norm_weight[1]", gated_sub_ln, u, u, [w[0], torch.ones(7)], w, **rows)
    contract.refused("norm_bias[0]", gated_sub_ln, u, u, w, [torch.ones(8, device="meta"), w[0]], **rows)
    contract.refused("activation", gated_sub_ln, u, u, activation="elu", **rows)
    contract.refused("eps", gated_sub_ln, u, u, w, w, eps=0.0, **rows)


def test_bad_offsets_and_counts_are_refused():
    u, offsets = torch.zeros(4, 8), ragged_offsets([1, 3])
    contract.refused("offsets", gated_sub_ln, u, offsets=offsets.long())
    contract.refused("offsets", gated_sub_ln, u, offsets=offsets.to("meta"))
    contract.refused("row_counts", gated_sub_ln, u, offsets=offsets, row_counts=[1])
    contract.refused("row_counts", gated_sub_ln, u, offsets=offsets, row_counts=[1, 4])
