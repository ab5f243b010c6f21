"""Autocast chooses dtypes in front of an op and changes nothing inside it, eager as compiled."""

import pytest
import torch

from onepeace_fast import RoutePlan, layer_norm, relative_bias_attention, residual_layer_norm, rms_norm, routed_ffn

PLAN = RoutePlan.from_lengths({"text": [5, 3], "image": [4, 4]}, first_is_cls=True)
ROWS, HEADS, DIM = PLAN.capacity, 2, 8


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attention(qkv, *bias):
    return relative_bias_attention(
        qkv, cu_seqlens=PLAN.cu_seqlens, modality=PLAN.modality, code=PLAN.code, is_cls=PLAN.is_cls, bias=bias,
        code_offsets=PLAN.code_offsets,
    )  # fmt: skip


def feed_forward(z, *weights):
    w0, w1, w2 = weights[:2], weights[2:4], weights[4:]
    return routed_ffn(z, w0, w1, w2, offsets=PLAN.offsets, row_counts=PLAN.row_counts)


def branch(x, y, weight):
    return residual_layer_norm(x, y, None, weight)[1]


CASES = {
    "attention": (
        attention,
        [3 * normal(ROWS, 3, HEADS, DIM), *(normal(HEADS, 2 * o + 4, dtype=torch.float32) for o in PLAN.code_offsets)],
    ),
    "ffn": (feed_forward, [normal(ROWS, 8), *[normal(16, 8)] * 4, *[normal(8, 16)] * 2]),
    "residual": (branch, [normal(ROWS, 8, dtype=torch.float32), normal(ROWS, 8), normal(8)]),
}


def results(call, inputs, backward_inside, enabled):
    leaves = [value.clone().requires_grad_() for value in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        out = call(*leaves)
        if backward_inside:
            out.float().square().sum().backward()
    if not backward_inside:
        out.float().square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_autocast_leaves_an_op_of_the_same_dtypes_alone(case, backward_inside):
    call, inputs = CASES[case]
    expected = results(call, inputs, backward_inside, enabled=False)
    got = results(call, inputs, backward_inside, enabled=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_compiled_and_eager_agree_under_autocast(case):
    call, inputs = CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = results(call, inputs, False, enabled=True)
    assert all(torch.equal(a, b) for a, b in zip(results(compiled, inputs, False, True), expected, strict=True))


def test_outputs_are_contiguous_whatever_the_strides_of_the_inputs():
    x, y = normal(8, ROWS, dtype=torch.float32).t(), normal(8, ROWS, dtype=torch.float32).t()
    out, normed = residual_layer_norm(x, y, None, torch.ones(8))
    assert out.is_contiguous() and normed.is_contiguous()
    z, weights = normal(ROWS, 8, dtype=torch.float32), [normal(16, 8, dtype=torch.float32)] * 2
    w2 = [normal(8, 16, dtype=torch.float32)] * 2
    out = routed_ffn(z, weights, weights, w2, offsets=PLAN.offsets, residual=x)
    assert out.is_contiguous()


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_their_gradients_are_contiguous_whatever_the_strides(norm, dtype):
    (rows, gradient), weight = normal(2, 5, 8, dtype=dtype), normal(8, dtype=dtype)
    found = []
    for turn in (torch.clone, lambda x: x.t().contiguous().t()):
        x = turn(rows).requires_grad_()
        y = norm(x, weight)
        found.append((y, *torch.autograd.grad(y, x, turn(gradient))))
    assert all(one.is_contiguous() for pair in found for one in pair)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
