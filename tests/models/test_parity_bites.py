"""Every number that an op's reference returns matters: scaling any of them by 1% makes the parity checks fail."""

import contextlib
import sys
from collections.abc import Iterator
from functools import cache, partial

import pytest
import torch
from models._goldens import Report, check_losses, golden

LISTS = ("w0", "w1", "norm_weight", "norm_bias", "w2", "b2")
# What each op returns, and the recording that exercises it: gamma is in "perlayer", head scale in "flags".
OUTPUTS = {
    "layer_norm": [("y", 0, "flags"), ("mean", 1, "flags"), ("rstd", 2, "flags")],
    "layer_norm_backward": [("dx", 0, "flags"), ("dweights", 1, "flags"), ("dbiases", 2, "flags")],
    "residual": [("out", 0, "flags"), ("normed", 1, "flags"), ("mean", 2, "flags"), ("rstd", 3, "flags")],
    "residual_backward": [
        ("dx", 0, "flags"), ("dy", 1, "flags"), ("dgamma", 2, "perlayer"), ("dweight", 3, "flags"),
        ("dbias", 4, "flags"),
    ],
    "routed_ffn": [
        ("out", 0, "flags"), ("u", 1, "flags"), ("v", 2, "flags"), ("y", 3, "perlayer"), ("mean", 4, "flags"),
        ("rstd", 5, "flags"),
    ],
    "routed_ffn_backward": [
        ("dz", 0, "flags"), *((f"d{name}", (1, i), "flags") for i, name in enumerate(LISTS)), ("dgamma", 2, "perlayer"),
    ],
    "relative_bias_attention": [("out", 0, "flags")],
    "relative_bias_attention_backward": [("dqkv", 0, "flags"), ("dbias", 1, "flags"), ("dhead_scale", 2, "flags")],
}  # fmt: skip
NOT_IN_A_MODEL = {
    "relative_bias_attention": {1},  # log-sum-exp: the reference's backward computes it again
    "routed_ffn": {6},  # what the grouped strategy folds
    "layer_norm_backward": {3},  # dhead_scale: in a model attention applies the head scale
}
# Where no kernel runs, routed_ffn does their work itself.
ONLY_KERNELS_CALL = {"gated_sub_ln", "gated_sub_ln_backward"}
MUTANTS = [(op, *output) for op, outputs in OUTPUTS.items() for output in outputs]


def scale_half(tensor: torch.Tensor) -> None:
    """1% more in every second column: a factor on all of them could vanish in a LayerNorm that follows."""
    if tensor.numel():
        tensor[..., ::2] *= 1.01


@contextlib.contextmanager
def broken(op: str, place: int | tuple[int, int]) -> Iterator[list[int]]:
    """Scale one output of an op; yields the list of how many numbers were changed by each call."""
    reference = reference_of(op)
    calls: list[int] = []

    def mutant(*arguments):
        results = reference(*arguments)
        first, expert = place if isinstance(place, tuple) else (place, None)
        chosen = results[first]
        if expert is not None:  # gradients come as one flat list, one kind of parameter after another
            kinds = [len(kind) for kind in arguments[2:8]]
            chosen = chosen[sum(kinds[:expert]) : sum(kinds[: expert + 1])]
        chosen = [chosen] if isinstance(chosen, torch.Tensor) else chosen
        for tensor in chosen:
            scale_half(tensor)
        calls.append(sum(tensor.numel() for tensor in chosen))
        return results

    with torch.library._scoped_library("onepeace_fast", "IMPL") as library:
        library.impl(op, mutant, "CPU")
        yield calls


def reference_of(op: str):
    """What runs an op on a CPU; its module has the name of its public function."""
    module = sys.modules[f"onepeace_fast.ops.{op.removesuffix('_backward')}"]
    if op.startswith("routed_ffn"):  # has several strategies
        return partial(module._run_backward if op.endswith("_backward") else module._run, by_kernel=False)
    return getattr(module, f"{op}_reference")


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


def test_every_op_has_its_mutants():
    schemas = torch._C._dispatch_get_all_op_names()
    ops = {name.removeprefix("onepeace_fast::") for name in schemas if name.startswith("onepeace_fast::")}
    assert ops == set(OUTPUTS) | ONLY_KERNELS_CALL
    for op, outputs in OUTPUTS.items():
        returned = getattr(torch.ops.onepeace_fast, op).default._schema.returns
        places = {place[0] if isinstance(place, tuple) else place for _, place, _ in outputs}
        assert places | NOT_IN_A_MODEL.get(op, set()) == set(range(len(returned)))


@pytest.mark.parametrize(("op", "output", "place", "recording"), MUTANTS, ids=[f"{m[0]}-{m[1]}" for m in MUTANTS])
def test_parity_fails_when_an_output_is_one_percent_off(op, output, place, recording):
    with broken(op, place) as calls:
        assert failures(recording)
    assert sum(calls) > 0
    assert not failures(recording), "the op stayed broken"
