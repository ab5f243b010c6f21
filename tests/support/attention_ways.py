"""Fixtures: the ways by which ``relative_bias_attention`` computes, all of them here on the CPU.

The reference of a CPU, samples by their length, needs no fixture. Elsewhere it pads all samples to the longest. A GPU
runs the CUDA kernels, whose own source and binding g++ compiles here, and PyTorch's attention where it cannot.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType

import pytest
import torch

from onepeace_fast import cuda_extension
from onepeace_fast.tolerance import DTYPES, HALF
from support.host_extension import force_gpu_paths, use

DTYPES_OF_WAYS = {
    "reference": (torch.float64, *DTYPES), "padded": (torch.float64, *DTYPES), "slower_path": DTYPES, "kernel": HALF,
}  # fmt: skip
# In what tests that compare bits or are exact run each way, and a head size for it.
CHECKED = {"reference": torch.float64, "padded": torch.float64, "slower_path": torch.float32, "kernel": torch.bfloat16}
HEAD_SIZE = {"reference": 4, "padded": 4, "slower_path": 8, "kernel": 32}


def in_each(name: str, values: Mapping[str, Iterable[object]]) -> pytest.MarkDecorator:
    """Run a test in these ways, in each with these values of another argument."""
    pairs = [pytest.param(way, value, id=f"{way} {value}") for way, several in values.items() for value in several]
    return pytest.mark.parametrize(f"way, {name}", pairs, indirect=["way"])


in_each_way = pytest.mark.parametrize("way", DTYPES_OF_WAYS, indirect=True)
in_each_dtype = in_each("dtype", DTYPES_OF_WAYS)


@pytest.fixture
def way(request: pytest.FixtureRequest) -> str:
    """The name of the way that the op takes."""
    if request.param != "reference":
        request.getfixturevalue(request.param)
    return request.param


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference as it is elsewhere: its question for the CPU is answered by no."""
    for name in ("segments", "pair_bias", "relative_bias_attention"):
        module = importlib.import_module(f"onepeace_fast.ops.{name}")
        monkeypatch.setattr(module, "is_on_host", lambda x: False)


@pytest.fixture
def slower_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No extension is there."""
    force_gpu_paths(monkeypatch)
    monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: "there is no extension")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, host_extension: ModuleType) -> Iterator[ModuleType]:
    """The kernels run, and none of them in vain; a slower path would be heard."""
    use(monkeypatch, host_extension)
    before = cuda_extension.launched()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield host_extension
    assert cuda_extension.launched() > before
