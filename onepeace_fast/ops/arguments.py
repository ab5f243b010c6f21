"""Checks of arguments that several ops take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from onepeace_fast.checks import (
    checks_devices,
    describe,
    is_on_host,
    require,
    require_device,
    require_tensor,
    require_values,
    require_vector,
)
from onepeace_fast.structures import DropPath, Routing

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_WIDTH = 16384
# Asked once: torch.compile traces a set, and in torch 2.11 not the question.
AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs this tensor's matrix products, None where it leaves them alone."""
    kind = tensor.device.type
    enabled = kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled and tensor.dtype != torch.float64 else None


def check_routing(routing: Routing, x: Tensor) -> None:
    """Raise unless a plan's offsets and row counts fit x's rows and device."""
    offsets, counts, _ = routing
    require_tensor("offsets", offsets, (torch.int32,), "[modalities + 1]", 1)
    require_device("offsets", offsets, x.device, of_plan=True)
    modalities = offsets.shape[0] - 1
    fit = len(counts) == modalities and sum(counts) <= x.shape[0] and all(count >= 0 for count in counts)
    if len(counts) > 0 and not fit:
        raise ValueError(
            f"row_counts: expected one per modality, {modalities}, in all at most {x.shape[0]} rows, got {list(counts)}"
        )


def check_offsets(routing: Routing, rows: int) -> None:
    """Raise where offsets decrease, end past the rows or are not those of the row counts; the host reads a CPU alone.

    Every op asks in its forward pass, where no tensor is fake. On a device it is asserted, if the environment asks.
    """
    offsets, counts, _ = routing
    if offsets is None:
        return
    message = f"offsets: expected row numbers from 0 to at most {rows} that do not decrease, got "
    if is_on_host(offsets):
        bounds = offsets.tolist()
        if bounds[:1] != [0] or bounds[-1] > rows or bounds != sorted(bounds):
            raise ValueError(f"{message}{bounds}")
        if counts and [*accumulate(counts, initial=0)] != bounds:
            expected = [stop - start for start, stop in pairwise(bounds)]
            raise ValueError(f"row_counts: expected those of offsets, {expected}, got {list(counts)}")
    elif checks_devices():
        require_values((offsets[0] == 0) & (offsets[-1] <= rows) & (offsets.diff() >= 0).all(), message + "others")
        for m, count in enumerate(counts):
            require_values(
                offsets[m + 1] - offsets[m] == count, f"row_counts: expected those of offsets, got {list(counts)}"
            )


def require_rows(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point matrix whose rows a kernel can hold."""
    require_tensor(name, x, FLOATS, "[rows, width]", 2)
    if x.shape[1] > MAX_WIDTH:
        raise ValueError(f"{name}: expected rows of at most {MAX_WIDTH} columns, got {describe(x)}; split them")


def require_row_index(row_index: Tensor | None, x: Tensor) -> None:
    """Raise unless ``row_index`` is absent or a row index on x's device."""
    if row_index is not None:
        require_tensor("row_index", row_index, (torch.int32,), "[N]", 1)
        require_device("row_index", row_index, x.device)


def check_row_index(row_index: Tensor, offsets: Tensor | None, x: Tensor) -> None:
    """Raise unless the index, up to the last of ``offsets``, is of distinct rows of x; the host reads a CPU's alone."""
    if not is_on_host(row_index):
        return
    rows = row_index if offsets is None else row_index[: int(offsets[-1])]
    least, most = (int(rows.min()), int(rows.max())) if rows.numel() else (0, -1)
    if least < 0 or most >= x.shape[0]:
        raise ValueError(f"row_index: expected rows of x, 0 to {x.shape[0] - 1}, got an index from {least} to {most}")
    if rows.unique().numel() != rows.numel():
        raise ValueError("row_index: expected distinct rows, got an index that repeats a row")


def require_drop_path(drop_path: DropPath, x: Tensor) -> None:
    """Raise ``ValueError`` unless DropPath's scale, floating point [samples], and sample, int32 or int64 [rows], fit x.

    Both may be absent.
    """
    scale, sample = drop_path
    require((scale is None) == (sample is None), "drop_path, sample: expected both or none, got one of them")
    if scale is not None:
        require_tensor("drop_path", scale, (torch.float32, torch.float64), "[samples]", 1)
        require_tensor("sample", sample, (torch.int32, torch.int64), "[rows]", 1)
        if sample.shape[0] != x.shape[0]:
            raise ValueError(f"sample: expected one per row, [{x.shape[0]}], got {describe(sample)}")
        for name, value in (("drop_path", scale), ("sample", sample)):
            require_device(name, value, x.device)


def check_sample(drop_path: DropPath) -> None:
    """Raise where a row's sample has no factor; the host reads a CPU's alone, a device is asked as for ``offsets``."""
    scale, sample = drop_path
    if scale is not None and (is_on_host(sample) or checks_devices()):
        message = f"sample: expected numbers from 0 to {scale.shape[0] - 1}, which drop_path has factors of, got others"
        require_values(((sample >= 0) & (sample < scale.shape[0])).all(), message)


def factor_of_rows(drop_path: DropPath, dtype: torch.dtype) -> Tensor:
    """DropPath's factor of each row, [rows]; raise on a CPU where a row's sample has none."""
    try:  # no subscript, which takes negative numbers
        return drop_path.scale.to(dtype).index_select(0, drop_path.sample)
    except IndexError:
        check_sample(drop_path)
        raise


def require_lists(**given: Sequence[Tensor] | None) -> None:
    """Raise where a tensor stands in the place of one tensor per modality."""
    for name, tensors in given.items():
        if isinstance(tensors, Tensor):
            raise ValueError(f"{name}: expected a list of one tensor per modality, got {describe(tensors)}")


def require_one_per_modality(name: str, tensors: Sequence[Tensor], modalities: int, optional: bool = True) -> None:
    """Raise unless there is one tensor per modality, or none where they are optional."""
    if not (len(tensors) == modalities or (optional and not tensors)):
        raise ValueError(f"{name}: expected one tensor per modality, {modalities}, got {len(tensors)}")


def require_eps(eps: float) -> None:
    """Raise unless what is added to a variance is positive."""
    require(eps > 0, lambda: f"eps: expected a positive number, got {eps}")


def require_norm_routing(routing: Routing, x: Tensor) -> int:
    """Raise unless offsets, row counts and row index, each optional, fit x; returns the number of modalities."""
    offsets, _, row_index = routing
    require_row_index(row_index, x)
    if offsets is None:
        return 1
    check_routing(routing, x if row_index is None else row_index)
    return offsets.shape[0] - 1


def norm_vectors(name: str, value: Tensor | Sequence[Tensor] | None, modalities: int, x: Tensor) -> list[Tensor]:
    """A norm's vectors: none, one for all rows, or one of each modality."""
    values = [] if value is None else [value] if isinstance(value, Tensor) else list(value)
    require(
        isinstance(value, Tensor) or not values or len(values) == modalities,
        lambda: f"{name}: expected {modalities} tensors, one per modality, or a tensor for all, got {len(values)}",
    )
    for item in values:
        require_vector(name, item, x.shape[1], x.device)
    return values
