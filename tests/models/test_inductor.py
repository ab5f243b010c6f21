"""torch.compile with its default compiler, which needs a C++ compiler on a CPU."""

import os
import subprocess
import sys

import pytest

# In a process of its own: the compiler imports setuptools, which minds what other tests have imported before.
SCRIPT = """
import torch
from onepeace_fast import RoutePlan
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers import TransformerLayer

torch.manual_seed(0)
config = TransformerConfig(embed_dim=32, ffn_embed_dim=48, attention_heads=2, layers=1, layer_scale=0.5, audio=None)
layer, plan = TransformerLayer(config), RoutePlan.from_lengths({"text": [5, 3], "image": [4, 4]}, first_is_cls=True)
bias = [torch.randn(2, 2 * offset + 4, requires_grad=True) for offset in plan.code_offsets]
x = torch.randn(plan.capacity, 32, requires_grad=True)
leaves = [x, *bias, *layer.parameters()]

def results(call):
    out = call(x, plan, bias)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

expected, got = results(layer), results(torch.compile(layer, fullgraph=True))
for value, want in zip(got, expected, strict=True):
    torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5 * (1 + want.abs().max().item()))
print(len(got), "tensors agree")
"""


@pytest.mark.requires_compiler
@pytest.mark.slow
def test_a_layer_compiled_by_inductor_gives_the_eager_gradients(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.endswith(" tensors agree\n")
