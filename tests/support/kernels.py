"""Where the kernels' tests run: in Triton's interpreter on a CPU, or on a GPU. See ``tests/kernels/conftest.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onepeace_fast import tolerance

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter's arithmetic in bfloat16 is wrong without a word.
# A GPU compiles a program for each dtype and width: there float32 is left to the tests that name it, and the widths are
# an odd one, the model's, and a hidden width that is held in parts.
DTYPES = (torch.bfloat16,) if DEVICE == "cuda" else (torch.float32, torch.float16)
WIDTHS = (63, 1536, 6144) if DEVICE == "cuda" else (63, 64, 768, 1536, 6144)
# Tensor cores multiply half precision alone: on a GPU grouped products refuse float32.
PRODUCT_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# float64 runs the reference everywhere: a test of the reference alone takes it.
REFERENCE_ONLY = DEVICE == "cpu" and not INTERPRETED
CHECKED = torch.float64 if REFERENCE_ONLY else torch.float32
HALF = torch.bfloat16 if REFERENCE_ONLY else DTYPES[-1]
CONTRACT_DTYPES = (torch.float64, *tolerance.DTYPES) if REFERENCE_ONLY else DTYPES
EVERY_DTYPE = tuple(dict.fromkeys((torch.float64, *CONTRACT_DTYPES)))  # the reference's wherever it runs, and more
# Every other width, hidden width or number of modalities is another program there, which takes seconds to compile.
PRODUCT_SIZE = (96, 200) if DEVICE == "cuda" else None
interpreter_only = pytest.mark.skipif(DEVICE == "cuda", reason="many programs to compile: a CPU runs these")
MANY_ROWS = 9500 if DEVICE == "cuda" else 400
REPEATS = 50 if DEVICE == "cuda" else 10 if REFERENCE_ONLY else 2  # the interpreter runs one program after another


def on_device(leaves: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The leaves where the kernels run, by default in the dtype they have."""
    return {name: leaf.to(DEVICE, dtype) for name, leaf in leaves.items()}


def product_size(width: int, hidden: int) -> tuple[int, int]:
    """Width and hidden width of a test of grouped products: what it asks for, on a GPU the same for all."""
    return PRODUCT_SIZE or (width, hidden)


def first(values: Sequence[Any], count: int = 1) -> list[Any]:
    """All of these, on a GPU the first ones: for what differs in programs alone."""
    return list(values[: count if DEVICE == "cuda" else None])


def int32(values: Sequence[int]) -> Tensor:
    """Offsets or a row index where the kernels run."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def far_apart(rows: Tensor, folder: Path) -> Tensor:
    """Three rows whose last begins past element 2**31, for which no memory but their own is touched on a CPU."""
    stride = 2**30 + 16
    size = 2 * stride + rows.shape[1]
    if DEVICE == "cuda":
        storage = torch.zeros(size, dtype=rows.dtype, device=DEVICE)
    else:
        storage = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=rows.dtype)
    return storage.as_strided(rows.shape, (stride, 1)).copy_(rows)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty hands out: NaN, and the largest number for integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # that fills what is not initialised
    yield
    torch.use_deterministic_algorithms(before)
