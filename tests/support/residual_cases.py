"""Inputs of ``residual`` and its forms with a norm, the ops and the naive code: for their tests and the kernels'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import residual, residual_layer_norm, residual_rms_norm
from support import naive
from support.contract import normal
from support.kernels import DEVICE, int32, on_device

GARBAGE = 2**31 - 1  # an entry of a row index that must not be read
DROP_PATH = torch.tensor([1.25, 0.0, 1.25, 1.25, 0.0], device=DEVICE)
SEED = 2**40 + 12345
NO_NORM, LAYER_NORM, RMS_NORM = "residual", "residual_layer_norm", "residual_rms_norm"

naive_factor = functools.lru_cache(naive.dropout_factor)


def sample_of(rows: int) -> Tensor:
    """Samples in runs, as packed rows have them, twice over."""
    return (torch.arange(rows, device=DEVICE) * 10 // max(rows, 1) % 5).int()


def leaves_of(
    rows: int, width: int, norm: str = NO_NORM, gamma: bool = True, bias: bool = True, branch_rows: int | None = None
) -> dict[str, Tensor]:
    """The stream, its branch, by default of as many rows, and what the options ask for."""
    branch_rows = rows if branch_rows is None else branch_rows
    leaves = {"x": 2 * normal(rows, width, seed=1) + normal(rows, 1, seed=2)}
    leaves |= {"y": 3 * normal(branch_rows, width, seed=3)}
    leaves |= {"gamma": 0.5 + normal(width, seed=4)} if gamma else {}
    leaves |= {"norm_weight": 1 + 0.5 * normal(width, seed=5)} if norm != NO_NORM else {}
    return on_device(leaves | ({"norm_bias": normal(width, seed=6)} if norm == LAYER_NORM and bias else {}))


def op(
    rows: int, norm: str = NO_NORM, drop_path: bool = True, dropout: float = 0.0, index: Sequence[int] | None = None,
    extent: int | None = None, eps: float = 1e-5,
) -> Callable:  # fmt: skip
    """The op with a row index, and with offsets whose last entry is ``extent``."""
    extra = {"drop_path": DROP_PATH, "sample": sample_of(rows)} if drop_path else {}
    extra |= {"dropout": dropout, "seed": torch.tensor(SEED, device=DEVICE)} if dropout else {}
    extra |= {} if index is None else {"row_index": int32(index)}
    extra |= {} if extent is None else {"offsets": int32([0, extent // 2, extent // 2, extent])}

    def call(x, y, gamma=None, **parameters):
        if norm == NO_NORM:
            return residual(x, y, gamma, **extra)
        return (residual_layer_norm if norm == LAYER_NORM else residual_rms_norm)(
            x, y, gamma, **parameters, eps=eps, **extra
        )

    return call


def plain(
    rows: int, norm: str = NO_NORM, drop_path: bool = True, dropout: float = 0.0, index: Sequence[int] | None = None,
    extent: int | None = None, eps: float = 1e-5,
) -> Callable:  # fmt: skip
    """The same, written the obvious way."""
    places = (list(range(rows)) if index is None else list(index))[:extent]

    def call(x, y, gamma=None, norm_weight=None, norm_bias=None):
        factor = naive_factor(SEED, *x.shape, dropout).to(DEVICE)[places] if dropout else None
        scale, sample = DROP_PATH if drop_path else None, sample_of(rows)[places]
        out = x.clone()
        out[places] = naive.residual(x[places], y[: len(places)], gamma, scale, sample, factor)
        if norm == NO_NORM:
            return out
        weight, bias = (None if p is None else p.to(out.dtype) for p in (norm_weight, norm_bias))
        if norm == RMS_NORM:
            return out, F.rms_norm(out, out.shape[1:], weight, eps).to(y.dtype)
        return out, F.layer_norm(out, out.shape[1:], weight, bias, eps).to(y.dtype)

    return call
