"""Every number that an op's reference returns matters: scaling any of them by 1% makes the parity checks fail."""

import contextlib
from collections.abc import Iterator
from functools import cache
from operator import attrgetter

import pytest
import torch
from models._goldens import Report, check_losses, golden
from torch.utils._python_dispatch import TorchDispatchMode

from onepeace_fast.ops.layer_norm import LAYER_NORM
from onepeace_fast.ops.linear_residual import LINEAR_RESIDUAL
from onepeace_fast.ops.relative_bias_attention import RELATIVE_BIAS_ATTENTION
from onepeace_fast.ops.residual import RESIDUAL
from onepeace_fast.ops.routed_ffn import ROUTED_FFN

OPERATIONS = [
    op for operation in (LAYER_NORM, RESIDUAL, LINEAR_RESIDUAL, ROUTED_FFN, RELATIVE_BIAS_ATTENTION)
    for op in (operation, operation.backward)
]  # fmt: skip
NOT_IN_A_MODEL = {
    "relative_bias_attention": {"log_sum_exp"},  # the reference's backward computes it again
    "relative_bias_attention_backward": {"qkv"},  # on a CPU a model gives the three apart
    "residual_backward": {"gamma"},  # with LayerScale these models join the residual with a product
    "linear_residual": {"y"},  # kept in float16 or beside a frozen weight
    "routed_ffn": {"folded"},  # the grouped strategy's
    "routed_ffn_backward": {"residual"},  # the output's own gradient
    "layer_norm_backward": {"head_scale"},  # in a model attention applies the head scale
}
# The recording that exercises an output: gamma is in "perlayer", head scale in "flags", whose encoder has a norm behind
# the output projection.
PER_LAYER = {("routed_ffn", "y"), ("routed_ffn_backward", "gamma")}
MUTANTS = [
    (op, ".".join(leaf.path)) for op in OPERATIONS for leaf in op.outputs.leaves
    if ".".join(leaf.path) not in NOT_IN_A_MODEL.get(op.name, ())
]  # fmt: skip


def scale_half(tensor: torch.Tensor) -> None:
    """1% more in every second column: a factor on all of them could vanish in a LayerNorm that follows."""
    if tensor.numel():
        tensor[..., ::2] *= 1.01


@contextlib.contextmanager
def broken(op, output: str) -> Iterator[list[int]]:
    """Scale one output of an op; yields the list of how many numbers were changed by each call."""
    reference = op.reference
    calls: list[int] = []

    def mutant(*given):
        results = reference(*given)
        chosen = attrgetter(output)(results)
        changed = [tensor for tensor in (chosen if isinstance(chosen, list) else [chosen]) if tensor is not None]
        for tensor in changed:
            scale_half(tensor)
        calls.append(sum(tensor.numel() for tensor in changed))
        return results

    op.reference = mutant
    try:
        yield calls
    finally:
        op.reference = reference


@cache
def subject(name: str):
    """A recording and a model of it, shared by all mutants; no test changes it."""
    recording = golden(name)
    return recording, recording.model("fused")


def failures(name: str) -> list[str]:
    """The failed checks of audio-language pretraining: losses and gradients."""
    recording, model = subject(name)
    report = Report()
    check_losses(report, recording, model, "al")
    assert report.count > 100
    return report.failures


class Called(TorchDispatchMode):
    """Notes the names of the library's ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "onepeace_fast":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def test_every_op_that_the_model_calls_has_its_mutants():
    with Called() as called:
        assert not failures("flags")
    assert called.names == {op.name for op in OPERATIONS}
    assert all(missing <= {".".join(leaf.path) for op in OPERATIONS if op.name == name for leaf in op.outputs.leaves}
               for name, missing in NOT_IN_A_MODEL.items())  # fmt: skip


@pytest.mark.parametrize(("op", "output"), MUTANTS, ids=[f"{op.name}-{output}" for op, output in MUTANTS])
def test_parity_fails_when_an_output_is_one_percent_off(op, output):
    joined = op in (LINEAR_RESIDUAL, LINEAR_RESIDUAL.backward)
    recording = "perlayer" if joined or (op.name, output) in PER_LAYER else "flags"
    with broken(op, output) as calls:
        assert failures(recording)
    assert sum(calls) > 0
    assert not failures(recording), "the op stayed broken"
