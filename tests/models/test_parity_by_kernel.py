"""The recordings of upstream ONE-PEACE with attention by the CUDA kernel, compiled for the CPU.

All but attention stays float32, so what differs from the recording is half precision inside attention: as much as the
tolerance rule allows against the reference in the same dtype.
"""

import pytest
import torch
from models._goldens import KINDS, golden, losses
from support.host_extension import use

from onepeace_fast import cuda_extension, relative_bias_attention
from onepeace_fast.layers import transformer
from onepeace_fast.tolerance import HALF, assert_within_rule

pytestmark = pytest.mark.requires_compiler
RECORDINGS = ("tiny", "flags", "perlayer")  # heads of 64, 32 and 32


def outputs(recording, model):
    """Outputs and embeddings of every kind of pass, real tokens alone."""
    result = {}
    with torch.no_grad():
        for kind, names in KINDS.items():
            encoded = model.encode(**recording.sources(kind))
            for place, name in enumerate(names):
                result[f"encoder.{kind}.{place}"] = encoded[name][recording.valid(name)]
            if len(names) == 1:
                result[f"logits.{kind}.0"] = model.embed(**recording.sources(kind))
    return result


def recorded(recording):
    result = {}
    for kind, names in KINDS.items():
        for place, name in enumerate(names):
            result[f"encoder.{kind}.{place}"] = recording.tensors[f"out.encoder.{kind}.{place}"][recording.valid(name)]
        if len(names) == 1:
            result[f"logits.{kind}.0"] = recording.tensors[f"out.logits.{kind}.0"]
    return result


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", RECORDINGS)
def test_the_kernel_reproduces_recorded_outputs(monkeypatch, host_extension, name, dtype):
    heads = set()

    def in_half(qkv, **arguments):
        heads.add(qkv.shape[-1])
        return relative_bias_attention(qkv.to(dtype), **arguments).float()

    monkeypatch.setattr(transformer, "relative_bias_attention", in_half)
    recording = golden(name)
    model = recording.model("fused")
    plain = outputs(recording, model)
    use(monkeypatch, host_extension)
    before = cuda_extension.launched()
    actual, exact = outputs(recording, model), recorded(recording)
    assert cuda_extension.launched() > before and heads <= {32, 64}
    for key, value in actual.items():
        # The rule's slack in units of the dtype in which attention ran.
        assert_within_rule(key, value.to(dtype), plain[key].to(dtype), exact[key])


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("kind", ["vl", "al"])
def test_losses_by_the_kernel_are_the_recorded_ones(monkeypatch, host_extension, name, kind):
    def in_half(qkv, **arguments):
        return relative_bias_attention(qkv.half(), **arguments).float()

    monkeypatch.setattr(transformer, "relative_bias_attention", in_half)
    use(monkeypatch, host_extension)
    recording = golden(name)
    found = losses(recording, recording.model("fused"), kind)
    wanted = {key: value for key, value in recording.pick(f"loss.{kind}.").items() if key.endswith("loss")}
    assert wanted
    bound = 2 * torch.finfo(torch.float16).eps
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].float(), value.float(), rtol=bound, atol=bound, msg=key)
