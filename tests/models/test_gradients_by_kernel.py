"""The recorded losses and gradients of upstream ONE-PEACE with attention by the CUDA kernels, compiled for the CPU.

All but attention, of which both passes run so, stays float32. Plain PyTorch is dense attention in the same dtype.
"""

import pytest
import torch
from models._goldens import LOSS_MASKS, golden, losses
from support import contract
from support.dense_attention import dense_attention
from support.host_extension import use

from onepeace_fast import cuda_extension, relative_bias_attention
from onepeace_fast.layers import transformer
from onepeace_fast.relative_position import CLS_ENTRIES
from onepeace_fast.tolerance import HALF, assert_within_rule

pytestmark = pytest.mark.requires_compiler
# Heads of 64, 32 and 32. The other dtype of the latter two takes seconds and shows the same.
IN_TURN = [("tiny", dtype) for dtype in HALF] + [("flags", HALF[0]), ("perlayer", HALF[1])]
SELDOM = [pytest.param(*other, marks=pytest.mark.slow) for other in (("flags", HALF[1]), ("perlayer", HALF[0]))]


class Attention:
    """Attention in half precision inside a float32 model; keeps the calls that need a gradient, and their gradients."""

    def __init__(self, attend, dtype):
        self.attend, self.dtype, self.calls = attend, dtype, []

    def __call__(self, qkv, **arguments):
        inside = torch.stack(qkv, 1).to(self.dtype)  # a model gives the three apart on a CPU
        out = self.attend(inside, **arguments)
        if out.requires_grad:
            leaves = {"qkv": inside, "head_scale": arguments["head_scale"]}
            leaves |= {f"bias{m}": vector for m, vector in enumerate(arguments["bias"])}
            self.calls.append((arguments, {name: leaf for name, leaf in leaves.items() if leaf is not None}, []))
            out.register_hook(self.calls[-1][-1].append)
        return out.float()


def gradients(monkeypatch, attention, recording, model, kind):
    """Losses, the gradient of every parameter that has one, and how many launches the backward pass made."""
    monkeypatch.setattr(transformer, "relative_bias_attention", attention)
    model.zero_grad(set_to_none=True)
    parts = losses(recording, model, kind)
    before = cuda_extension.launched()
    parts["loss"].backward()
    found = model.to_upstream_state_dict(grads=True)
    found = {key: value.clone() for key, value in found.items() if value is not None}
    return parts, found, cuda_extension.launched() - before


@pytest.mark.parametrize("kind", LOSS_MASKS)
@pytest.mark.parametrize("name, dtype", IN_TURN + SELDOM, ids=str)
def test_the_kernels_reproduce_recorded_losses_and_gradients(monkeypatch, host_extension, name, dtype, kind):
    recording = golden(name)
    model = recording.model("fused")
    _, plain, _ = gradients(monkeypatch, Attention(dense_attention, dtype), recording, model, kind)
    use(monkeypatch, host_extension)
    by_kernel = Attention(relative_bias_attention, dtype)
    parts, actual, launches = gradients(monkeypatch, by_kernel, recording, model, kind)
    assert launches == len(by_kernel.calls) > recording.config.encoder.layers
    exact = {key: value for key, value in recording.pick(f"grad.{kind}.").items() if value.any()}
    assert actual.keys() == plain.keys()
    for part in ("text_adapter.rel_pos_table", "self_attn.q_proj", "self_attn.out_proj", "ffn", "decoder"):
        assert any(part in key for key in exact), part
    for key, value in exact.items():
        # The rule's slack in units of the dtype in which attention ran; gradients are too small to be converted to it.
        largest = value.abs().max()
        mine, theirs = ((found[key] / largest).to(dtype) for found in (actual, plain))
        assert_within_rule(key, mine, theirs, value / largest)
    wanted = {key: value for key, value in recording.pick(f"loss.{kind}.").items() if key.endswith("loss")}
    assert wanted
    bound = 2 * torch.finfo(dtype).eps
    for key, value in wanted.items():
        torch.testing.assert_close(parts[key].float(), value.float(), rtol=bound, atol=bound, msg=key)


def on_leaves(attend, arguments):
    """An attention as a call on its leaves."""

    def call(qkv, head_scale=None, **bias):
        return attend(qkv, **{**arguments, "bias": list(bias.values()), "head_scale": head_scale})

    return call


def slices(name, value, cu_seqlens):
    """Every modality's rows and head of qkv; every head of a vector, its entries of CLS apart."""
    if name == "qkv":
        parts = [slice(int(bounds[0]), int(bounds[-1])) for bounds in cu_seqlens]
        return [(part, which, head) for part in parts for which in range(3) for head in range(value.shape[2])]
    parts = (slice(None, -CLS_ENTRIES), slice(-CLS_ENTRIES, None))
    return [(head, part) for head in range(value.shape[0]) for part in parts] if name != "head_scale" else ()


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [("vl", torch.float16), ("al", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ("tiny", "flags", "perlayer"))
def test_every_launch_of_a_recorded_loss_follows_the_dense_bias(monkeypatch, host_extension, name, dtype, kind):
    recording = golden(name)
    use(monkeypatch, host_extension)
    by_kernel = Attention(relative_bias_attention, dtype)
    gradients(monkeypatch, by_kernel, recording, recording.model("fused"), kind)
    vectors = 0
    for arguments, leaves, given in by_kernel.calls:
        dense = on_leaves(dense_attention, arguments)
        (out,), actual = contract.run(on_leaves(relative_bias_attention, arguments), leaves, given)
        (plain_out,), plain = contract.run(dense, leaves, given)
        (exact_out,), exact = contract.run(dense, {key: leaf.double() for key, leaf in leaves.items()}, given)
        assert_within_rule("out", out, plain_out, exact_out)
        for key, value in exact.items():
            assert_within_rule(key, actual[key], plain[key], value, slices(key, value, arguments["cu_seqlens"]))
        vectors += sum(key.startswith("bias") for key in exact)
    assert vectors >= 2 * recording.config.encoder.layers
