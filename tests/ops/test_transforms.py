"""Derivatives that the ops do not have are refused in one line: forward mode, torch.func and torch.vmap."""

from functools import partial

import pytest
import torch
from support import contract
from torch.autograd import forward_ad

from onepeace_fast import (
    RoutePlan,
    gated_sub_ln,
    kernels,
    layer_norm,
    relative_bias_attention,
    residual,
    residual_layer_norm,
    routed_ffn,
)
from onepeace_fast.ops import kernel_choice
from onepeace_fast.ops.gated_sub_ln import GATED_SUB_LN
from onepeace_fast.ops.layer_norm import LAYER_NORM
from onepeace_fast.ops.residual import RESIDUAL
from onepeace_fast.ops.routed_ffn import ROUTED_FFN

OFFSETS = torch.tensor([0, 2, 4], dtype=torch.int32)
PLAN = RoutePlan.from_lengths({"text": [2, 2]}, first_is_cls=True)
PLACES = {name: getattr(PLAN, name) for name in ("cu_seqlens", "modality", "code", "is_cls")}


normal = partial(contract.normal, seed=0, dtype=torch.float32)
OTHER, WIDE = normal(4, 16, seed=1), [normal(32, 16, seed=seed) for seed in range(4)]
NARROW = [weight.t().contiguous() for weight in WIDE[:2]]
OPS = {
    "layer_norm": layer_norm,
    "residual": lambda x: residual(x, OTHER, OTHER[0]),
    "residual's branch": lambda x: residual(OTHER, x, OTHER[0]),
    "residual_layer_norm": lambda x: residual_layer_norm(x, OTHER, None, OTHER[0])[1],
    "gated_sub_ln": lambda x: gated_sub_ln(x, OTHER, offsets=OFFSETS),
    "routed_ffn": lambda x: routed_ffn(x, WIDE[:2], WIDE[2:], NARROW, offsets=OFFSETS),
    "routed_ffn's weight": lambda x: routed_ffn(
        OTHER, [weight + x[0] for weight in WIDE[:2]], WIDE[2:], NARROW, offsets=OFFSETS
    ),
    "relative_bias_attention": lambda x: relative_bias_attention(x[:, None, None, :].expand(4, 3, 1, 16), **PLACES),
}


def by_forward_ad(function):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(normal(4, 16), OTHER))


def by_dual_cotangent(function):
    x = normal(4, 16).requires_grad_()
    out = function(x)
    with forward_ad.dual_level():
        out.backward(forward_ad.make_dual(torch.ones_like(out), out.detach()))


def by_batched_gradients(function):
    x = normal(4, 16).requires_grad_()
    out = function(x)
    torch.autograd.grad(out, x, normal(3, *out.shape), is_grads_batched=True)


TRANSFORMS = {
    "func.jvp": lambda f: torch.func.jvp(f, (normal(4, 16),), (OTHER,)),
    "func.jvp of a leaf": lambda f: torch.func.jvp(f, (normal(4, 16).requires_grad_(),), (OTHER,)),
    "forward_ad": by_forward_ad,
    "func.grad": lambda f: torch.func.grad(lambda x: f(x).sum())(normal(4, 16)),
    "func.hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(normal(4, 16)),
    "vmap": lambda f: torch.func.vmap(f)(normal(3, 4, 16)),
    "batched gradients": by_batched_gradients,
}


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_a_transform_is_refused_in_one_line_that_names_the_op(op, transform, by_kernel, monkeypatch):
    forced = None
    if by_kernel and transform != "batched gradients":  # of these the forward pass runs

        def launch(*_):
            raise AssertionError("a kernel was launched")

        monkeypatch.setattr(kernels, "unavailable_reason", lambda: None)
        for operation in (LAYER_NORM, RESIDUAL, GATED_SUB_LN, ROUTED_FFN):
            monkeypatch.setattr(operation, "kernel", launch)
        forced = True
    with kernel_choice.force_kernels(forced), pytest.raises(RuntimeError) as caught:
        TRANSFORMS[transform](OPS[op])
    message = str(caught.value)
    assert message.startswith("onepeace_fast::" + op.partition("'")[0].removesuffix("_layer_norm"))
    assert ": expected " in message and ", got " in message and "\n" not in message
    assert message.endswith("; OnePeacePretrain alone has a reference backend for it")


@pytest.mark.parametrize("op", OPS)
def test_a_backward_pass_with_a_tangent_is_refused(op):
    with pytest.raises(
        RuntimeError, match=r"^onepeace_fast::\w+_backward: expected plain reverse mode, got a forward-mode derivative"
    ):
        by_dual_cotangent(OPS[op])


@pytest.mark.parametrize("op", OPS)
def test_without_a_derivative_of_its_own_an_op_runs_inside_a_transform(op):
    x, expected = normal(4, 16), OPS[op](normal(4, 16))
    _, tangent = torch.func.jvp(lambda t: t * OPS[op](x).sum(), (torch.tensor(2.0),), (torch.tensor(1.0),))
    torch.testing.assert_close(tangent, expected.sum())
    with forward_ad.dual_level():
        assert torch.equal(OPS[op](x), expected)
