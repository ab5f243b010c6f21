"""The recordings of upstream ONE-PEACE with attention by the CUDA kernel, compiled for the CPU.

All but attention stays float32, so what differs from the recording is half precision inside attention: as much as the
tolerance rule allows against the reference in the same dtype.
"""

import pytest
import torch
from models._goldens import KINDS, golden
from support.host_extension import use

from onepeace_fast import cuda_extension, relative_bias_attention
from onepeace_fast.layers import transformer
from onepeace_fast.tolerance import HALF, assert_within_rule

pytestmark = pytest.mark.requires_compiler
RECORDINGS = ("tiny", "flags", "perlayer")  # heads of 64, 32 and 32


def outputs(recording, model):
    """Outputs and embeddings of every kind of pass, real tokens alone, and what was recorded."""
    found, recorded = {}, {}
    with torch.no_grad():
        for kind, names in KINDS.items():
            encoded = model.encode(**recording.sources(kind))
            for place, name in enumerate(names):
                key, valid = f"out.encoder.{kind}.{place}", recording.valid(name)
                found[key], recorded[key] = encoded[name][valid], recording.tensors[key][valid]
            if len(names) == 1:
                key = f"out.logits.{kind}.0"
                found[key], recorded[key] = model.embed(**recording.sources(kind)), recording.tensors[key]
    return found, recorded


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", RECORDINGS)
def test_the_kernel_reproduces_recorded_outputs(monkeypatch, host_extension, name, dtype):
    heads = set()

    def in_half(qkv, **arguments):
        heads.add(qkv[0].shape[-1])
        return relative_bias_attention(tuple(x.to(dtype) for x in qkv), **arguments).float()

    monkeypatch.setattr(transformer, "relative_bias_attention", in_half)
    recording = golden(name)
    model = recording.model("fused")
    plain, exact = outputs(recording, model)
    use(monkeypatch, host_extension)
    before = cuda_extension.launched()
    actual, _ = outputs(recording, model)
    assert cuda_extension.launched() > before and heads <= {32, 64}
    for key, value in actual.items():
        # The rule's slack in units of the dtype in which attention ran.
        assert_within_rule(key, value.to(dtype), plain[key].to(dtype), exact[key])
