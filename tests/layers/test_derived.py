"""Buffers that follow from the arguments are right wherever a module's memory is new."""

import copy
from functools import partial

import pytest
import torch
from support.memory import filled_memory
from torch._subclasses.fake_tensor import FakeTensorMode

from onepeace_fast import RelativeBias
from onepeace_fast.config import TextAdapterConfig
from onepeace_fast.layers import TextAdapter
from onepeace_fast.layers.derived import DerivedBuffers

MODULES = {
    "t5": lambda: RelativeBias.t5(2),
    "one_peace": lambda: RelativeBias.one_peace(2, buckets=9),
    "alibi": lambda: RelativeBias.alibi(12),
    "adapter": lambda: TextAdapter(TextAdapterConfig(bucket_size=9), 8, 2, 1, 30),
}
EACH = pytest.mark.parametrize("name", MODULES)


def vector(module):
    return module.bias_vectors(30)[0] if isinstance(module, TextAdapter) else module.vector(30)


@EACH
@pytest.mark.parametrize("how", ["built on meta", "moved to meta", "emptied", "part by part"])
def test_a_module_emptied_and_loaded_computes_the_same(name, how):
    module = MODULES[name]()
    other = copy.deepcopy(module)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    if how == "built on meta":
        with torch.device("meta"):
            other = MODULES[name]()
    elif how != "emptied":
        other = other.to("meta")
    with filled_memory():
        for part in other.modules() if how == "part by part" else [other]:
            part.to_empty(device="cpu", recurse=how != "part by part")
    assert other.load_state_dict(module.state_dict()) == ([], [])
    assert torch.equal(vector(other), vector(module))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_slopes_have_the_dtype_that_a_module_was_cast_to(dtype):
    exact = torch.tensor([2.0 ** (-h / 2) for h in range(1, 17)], dtype=torch.float64)
    bias = RelativeBias.alibi(16).half().to(dtype)
    with filled_memory():
        bias.to_empty(device="cpu")
    assert bias.slopes.dtype == dtype and torch.equal(bias.slopes, exact.to(dtype))


@EACH
def test_memory_that_stays_is_kept(name):
    module = MODULES[name]()
    buffers = dict(module.named_buffers())
    module.share_memory().to("cpu")
    assert buffers and all(value is buffers[key] and value.is_shared() for key, value in module.named_buffers())
    assert not any(key in module.state_dict() for key in buffers)


@EACH
def test_fake_tensors_stay_fake(name):
    module, mode = MODULES[name](), FakeTensorMode()
    module._apply(mode.from_tensor)
    assert all(value.fake_mode is mode for value in module.buffers())


def test_a_default_device_is_obeyed():
    module = DerivedBuffers()
    with FakeTensorMode(), torch.device("cuda"):
        module.add_derived("places", partial(torch.arange, 4, device="cpu"))
    assert module.places.device.type == "cuda"
