"""Tests of the Triton kernels, through the ops that run them: the same tests in Triton's interpreter and on a GPU.

Triton decides when it is imported whether it interprets its kernels, so the interpreter needs a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/kernels       on a CPU: small sizes, float32 and float16
    python -m pytest -m gpu tests/kernels                   on a GPU: real sizes too, bfloat16 as well

`tests/test_kernels.py` runs the first line inside the ordinary suite and prints how many tests passed; `make gpu` runs
the second. Where neither holds, nothing here is collected: there are no kernels to test.

A test takes the device, the dtypes and the numbers of rows from `support.kernels`. Memory that torch.empty hands out is
filled with NaN, so that an element that a kernel should have written and did not is seen.
"""

from typing import Any

import pytest
from support.kernels import DEVICE, INTERPRETED, poisoned_memory  # noqa: F401  a fixture of all tests here

collect_ignore_glob = [] if INTERPRETED or DEVICE == "cuda" else ["test_*.py"]


if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, *rest: Any) -> None:
        """A loop's bound may be a loaded number: Triton 3.6 takes int() of its array, which NumPy 2.4 refuses."""
        _patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU these are GPU tests, which `make gpu` runs."""
    if DEVICE == "cuda":
        for item in items:
            if item.path.parent.name == "kernels":
                item.add_marker(pytest.mark.gpu)
