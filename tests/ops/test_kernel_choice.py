"""Where an op runs its kernel and where its reference."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from onepeace_fast import kernels
from onepeace_fast.ops import kernel_choice

CUDA = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda", 0), shape=(1, 8))
RUN_EVERYTHING = """
import sys, torch, onepeace_fast
x = torch.ones(3, 8, requires_grad=True)
out, normed = onepeace_fast.residual_layer_norm(x, onepeace_fast.layer_norm(x), None, torch.ones(8))
(out + normed).sum().backward()
kernels = [name for name in sys.modules if name.startswith("onepeace_fast.kernels.")]
print("triton" in sys.modules, [name for name in kernels if hasattr(sys.modules[name], "triton")])
"""


def test_a_cpu_runs_references_and_imports_neither_triton_nor_a_kernel():
    command = [sys.executable, "-c", RUN_EVERYTHING]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "[]"]


@pytest.mark.parametrize("interpreted", (False, True))
def test_a_kernel_runs_on_cuda_and_where_the_interpreter_was_asked_for(monkeypatch, interpreted):
    monkeypatch.setattr(kernels, "INTERPRETED", interpreted)
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: None)
    assert kernel_choice.runs_kernel("layer_norm", CUDA)
    assert kernel_choice.runs_kernel("layer_norm", torch.zeros(1)) is interpreted
    assert not kernel_choice.runs_kernel("layer_norm", torch.zeros(1, device="meta"))
    for tensor in (torch.zeros(1).double(), SimpleNamespace(**{**vars(CUDA), "dtype": torch.float64})):
        assert not kernel_choice.runs_kernel("layer_norm", tensor)


def test_a_cuda_tensor_without_triton_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "Triton is not installed")
    with pytest.raises(RuntimeError) as caught:
        kernel_choice.runs_kernel("layer_norm", CUDA)
    message = str(caught.value)
    assert message.startswith("layer_norm: expected Triton for a tensor on cuda:0, got none") and "\n" not in message
    assert "Triton is not installed" in message
