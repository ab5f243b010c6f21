"""Inputs of ``layer_norm`` and ``rms_norm``, the ops and the naive code on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import layer_norm, rms_norm
from support.contract import normal
from support.kernels import int32, on_device
from support.plans import ragged_offsets

GARBAGE = 2**31 - 1  # an entry of a row index that must not be read


def leaves_of(
    rows: int, width: int, modalities: int = 0, *, weight: bool = True, bias: bool = True, heads: int | None = None
) -> dict[str, Tensor]:
    """x, whose rows have a mean, and a norm for all rows, or with modalities one for each."""
    leaves = {"x": 2 * normal(rows, width, seed=5) + normal(rows, 1, seed=6)}
    for m in range(max(modalities, 1)):
        which = m if modalities else ""
        leaves |= {f"weight{which}": 1 + 0.5 * normal(width, seed=10 + m)} if weight else {}
        leaves |= {f"bias{which}": normal(width, seed=20 + m)} if bias else {}
    return on_device(leaves | ({"head_scale": 1 + 0.5 * normal(heads, seed=7)} if heads else {}))


def _of_kind(kind: str, parameters: dict[str, Tensor]) -> Tensor | list[Tensor] | None:
    """The parameter of all rows, or a list of one for each modality; None without any."""
    return parameters.get(kind, [value for name, value in parameters.items() if name.startswith(kind)] or None)


def op(
    counts: Sequence[int] | None = None, index: Sequence[int] | None = None, *, rms: bool = False, eps: float = 1e-5,
    host: bool = False,
) -> Callable:  # fmt: skip
    """The op, of modalities that the host knows or not, as ``call(**leaves)``."""

    def call(x: Tensor, head_scale: Tensor | None = None, **parameters: Tensor) -> Tensor:
        extra = {"offsets": ragged_offsets(counts).to(x.device)} if counts else {}
        extra |= {"row_counts": list(counts)} if host else {}
        extra |= {} if index is None else {"row_index": int32(index)}
        weight, bias = (_of_kind(kind, parameters) for kind in ("weight", "bias"))
        if rms:
            return rms_norm(x, weight, eps=eps, **extra)
        return layer_norm(x, weight, bias, head_scale=head_scale, eps=eps, **extra)

    return call


def plain(
    counts: Sequence[int] | None = None, index: Sequence[int] | None = None, *, rms: bool = False, eps: float = 1e-5
) -> Callable:
    """The same, written the obvious way: one norm per group of rows; rows past the groups are zero."""

    def call(x: Tensor, head_scale: Tensor | None = None, **parameters: Tensor) -> Tensor:
        if head_scale is not None:
            x = (x.unflatten(1, (head_scale.shape[0], -1)) * head_scale[:, None]).flatten(1)
        if index is not None:
            read = x[index[: sum(counts)] if counts else index]
            x = torch.cat([read, read.new_zeros(len(index) - len(read), x.shape[1])])
        sizes, parts = counts or [x.shape[0]], []
        for m, rows in enumerate(x[: sum(sizes)].split(sizes)):
            kinds = (_of_kind(kind, parameters) for kind in ("weight", "bias"))
            weight, bias = (kind[m] if isinstance(kind, list) else kind for kind in kinds)
            norm = F.rms_norm(rows, x.shape[1:], weight, eps) if rms else F.layer_norm(
                rows, x.shape[1:], weight, bias, eps
            )  # fmt: skip
            parts.append(norm)
        return torch.cat([*parts, torch.zeros_like(x[sum(sizes) :])])

    return call
