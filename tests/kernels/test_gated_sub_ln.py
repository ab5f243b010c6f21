"""``gated_sub_ln``: activation, gate and Sub-LayerNorm per modality, by the reference and by the kernels."""

import pytest
import torch
from support import contract
from support.contract import normal
from support.gated_cases import leaves_of, op, plain, slices_of
from support.kernels import (
    CHECKED,
    CONTRACT_DTYPES,
    DEVICE,
    HALF,
    INTERPRETED,
    MANY_ROWS,
    REFERENCE_ONLY,
    REPEATS,
    WIDTHS,
    far_apart,
    first,
    interpreter_only,
    on_device,
)
from support.plans import ragged_offsets

from onepeace_fast import gated_sub_ln
from onepeace_fast.ops.gated_sub_ln import ACTIVATIONS, GATED_SUB_LN, gated_sub_ln_backward_and_n
from onepeace_fast.structures import GatedSubLNGradients, GatedSubLNInputs, GatedSubLNSaved, Routing

ABSENT = ({}, {"gate": False}, {"norm": False}, {"gate": False, "norm": False})
DTYPE = pytest.mark.parametrize("dtype", CONTRACT_DTYPES, ids=str)
MODALITIES = ([7], [5, 0, 7], [0, 1, 2, 0, 9, 3, 1])[DEVICE == "cuda" :]
MODALITIES += ([300, 7], [0, 1, 65]) if REFERENCE_ONLY else ()


def check(counts, width, dtype, activation="gelu", eps=1e-5, **form) -> None:
    contract.check_against_naive(
        op(counts, activation, eps=eps), plain(counts, activation, eps=eps),
        on_device(leaves_of(counts, width, **form)), dtype, slices_of(counts),
    )  # fmt: skip


@DTYPE
@pytest.mark.parametrize("width", (63, 64, 200) if REFERENCE_ONLY else WIDTHS)
def test_values_and_gradients_follow_the_naive_ones(width, dtype):
    shapes = (([5, 0, 2], 2), ([0, 0], 3), ([0], 0), ([1], 0))
    for counts, inert in shapes[:1] if width == 6144 and INTERPRETED else first(shapes, 2):
        check(counts, width, dtype, inert=inert)


@DTYPE
@pytest.mark.parametrize("counts", MODALITIES, ids=str)
def test_one_modality_and_many_follow_the_naive_code(counts, dtype):
    for width in WIDTHS[:2]:
        check(counts, width, dtype, inert=1)


@DTYPE
@pytest.mark.parametrize("width", WIDTHS[1:] if DEVICE == "cuda" else WIDTHS[1:2])
def test_many_rows_follow_the_naive_code(width, dtype):
    check([MANY_ROWS - 313, 0, 300], width, dtype, inert=13)


@interpreter_only
@pytest.mark.parametrize("absent", ABSENT[1:3], ids=str)
def test_rows_in_parts_need_neither_gate_nor_norm(absent):
    check([2, 0, 1], 6144, torch.float32, inert=1, **absent)


@pytest.mark.skipif(not INTERPRETED, reason="the reference's zeros are but for rounding")
def test_rows_of_one_element_have_nothing_left_but_the_bias():
    for dtype in CONTRACT_DTYPES:
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


def test_an_activation_without_gate_and_norm_follows_the_naive_one():
    check([3, 0, 2], 63, HALF, "gelu_tanh", inert=1, gate=False, norm=False)


@interpreter_only
@pytest.mark.parametrize("absent", ABSENT, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_follows_the_naive_one_with_and_without_gate_and_norm(activation, absent):
    for dtype in (CHECKED, HALF):
        check([5, 0, 7], 24, dtype, activation, eps=0.1, inert=1, **absent)


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
def test_smooth_activations_keep_the_rule_wherever_u_lies(activation):
    """Each row is a narrow range of u, held to the rule alone: near zero, where they bend, and in both tails."""
    centre = torch.cat([torch.logspace(-3, -0.5, 30), torch.linspace(0.4, 6, 50)])
    u = torch.cat([centre, -centre])[:, None] * (1 + 0.02 * normal(2 * len(centre), 64, seed=5))
    each = list(range(len(u)))
    rows = {"out0": each, "u": each}
    for dtype in (CHECKED, HALF):
        contract.check_against_naive(
            op([len(u)], activation), plain([len(u)], activation), on_device({"u": u}), dtype, rows
        )


@pytest.mark.skipif(REFERENCE_ONLY, reason="PyTorch's own gelu of infinity is no number on a CPU in bfloat16")
def test_gelu_keeps_what_is_no_number_and_ends_beyond_every_number():
    for dtype in (CHECKED, HALF):
        most = torch.finfo(dtype).max
        u = torch.tensor([[torch.inf, -torch.inf, torch.nan, most, -most, 0.0]], dtype=dtype, device=DEVICE)
        outputs, gradients = contract.run(op([1]), {"u": u}, [torch.ones_like(u)])
        assert torch.equal(outputs[0][0, [0, 3, 4, 5]], u.new_tensor([torch.inf, most, 0, 0]))
        assert torch.equal(gradients["u"][0, 3:], u.new_tensor([1, 0, 0.5]))
        for values in (outputs[0], gradients["u"]):
            assert values[0, 1:3].isnan().all()


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


@pytest.mark.parametrize("absent", first(ABSENT, 3), ids=str)
def test_the_backward_pass_gives_n_once_more(absent):
    counts, width = [3, 0, 2], 8 if REFERENCE_ONLY else 6144
    for dtype in CONTRACT_DTYPES:
        leaves = on_device(leaves_of(counts, width, inert=1, **absent), dtype)
        norms = [[leaves[f"{kind}{m}"] for m in range(3) if "weight0" in leaves] for kind in ("weight", "bias")]
        u, v, routing = leaves["u"], leaves.get("v"), Routing(ragged_offsets(counts).to(DEVICE))
        needs = [False] * len(norms[0])
        n, *statistics = GATED_SUB_LN.run(GatedSubLNInputs(u, v, *norms, routing, "gelu", 1e-5))
        saved = GatedSubLNSaved(u, u, v, *statistics, *norms, routing, "gelu")
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


def test_strides_of_inputs_and_gradients_do_not_matter():
    counts, leaves = [3, 4], on_device(leaves_of([3, 4], 70), CHECKED)
    contract.check_input_layouts(op(counts), leaves, ["u", "v"])
    contract.check_gradient_layouts(op(counts), leaves)
    contract.check_gradient_layouts(op(counts), on_device(leaves, HALF))


def test_without_modalities_every_row_is_inert():
    u, v = (normal(3, 8, seed=seed).to(DEVICE).requires_grad_() for seed in range(2))
    n = gated_sub_ln(u, v, None, None, offsets=torch.zeros(1, dtype=torch.int32, device=DEVICE))
    du, dv = torch.autograd.grad(n, (u, v), torch.ones_like(n))
    assert not n.any() and not du.any() and not dv.any()


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
