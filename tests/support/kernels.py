"""Where the kernels' tests run: in Triton's interpreter on a CPU, or on a GPU. See ``tests/kernels/conftest.py``."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter's arithmetic in bfloat16 is wrong without a word.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
WIDTHS = (1, 63, 64, 768, 1536, 6144)
MANY_ROWS = 9500 if DEVICE == "cuda" else 1000
REPEATS = 50
