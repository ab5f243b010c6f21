"""What several tests of models need."""

import pytest
import torch.distributed as dist

from onepeace_fast import kernels
from onepeace_fast.layers import norms, transformer
from onepeace_fast.models.mico import layers as mico_layers
from onepeace_fast.models.unival import layers


@pytest.fixture(autouse=True)
def ops_on_a_cpu(request, monkeypatch):
    """The fused backend goes through the ops on a CPU too, as it does on a GPU, unless a test asks for the modules."""
    if "modules_on_a_cpu" not in request.fixturenames:
        for module in (norms, transformer, layers, mico_layers):
            monkeypatch.setattr(module, "calls_modules", lambda x: False)


@pytest.fixture
def modules_on_a_cpu(monkeypatch):
    """The fused backend as users have it on a CPU."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
