"""What ``routed_ffn`` takes, and which strategy computes it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onepeace_fast import kernels
from onepeace_fast.checks import describe, require, require_device, require_vector
from onepeace_fast.kernels.launch import architecture_and_multiprocessors
from onepeace_fast.kernels.tile_table import refusal
from onepeace_fast.ops.arguments import MAX_WIDTH, check_routing, require_row_index, require_rows
from onepeace_fast.ops.gated_sub_ln import ACTIVATIONS
from onepeace_fast.ops.kernel_choice import kernels_forced
from onepeace_fast.ops.residual import check_drop_path
from onepeace_fast.ops.strategies import STRATEGIES, strategy_for

MAX_MODALITIES = 64
TILE_ALIGNMENT = 16  # bytes, of the distance of two rows in a tensor descriptor
OPTIONAL = ("b2", "norm_weight", "norm_bias")


def check(
    z: Tensor, lists: Mapping[str, Sequence[Tensor]], has_gate: bool, offsets: Tensor, row_counts: Sequence[int],
    residual: Tensor | None, gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, row_index: Tensor | None,
    activation: str, eps: float,
) -> None:  # fmt: skip
    """Raise unless all arguments fit together."""
    require_rows("z", z)
    check_routing(offsets, row_counts, z)
    groups, width, hidden = offsets.shape[0] - 1, z.shape[1], lists["w0"][0].shape[0] if lists["w0"] else 0
    require(hidden <= MAX_WIDTH, lambda: f"w0: got {hidden} hidden columns, takes at most {MAX_WIDTH}")
    shapes = {"w0": (hidden, width), "w1": (hidden, width), "w2": (width, hidden), "b2": (width,)}
    shapes |= {"norm_weight": (hidden,), "norm_bias": (hidden,)}
    for name, tensors in lists.items():
        may_be_empty = name in OPTIONAL or (name == "w1" and not has_gate)
        fits = len(tensors) == groups or (may_be_empty and not tensors)
        require(
            fits,
            lambda name=name, tensors=tensors: f"{name}: got {len(tensors)} tensors, takes one per modality, {groups}",
        )
        for m, tensor in enumerate(tensors):
            _check_parameter(f"{name}[{m}]", tensor, shapes[name], None if name.startswith("norm") else z.dtype)
            require_device(f"{name}[{m}]", tensor, z.device)
    given = [len(lists[name]) > 0 for name in ("norm_weight", "norm_bias")]
    require(given[0] == given[1], "norm_weight, norm_bias: got one of them, takes both or none")
    require(activation in ACTIVATIONS, lambda: f"activation: got {activation!r}, takes one of {', '.join(ACTIVATIONS)}")
    require(eps > 0, lambda: f"eps: got {eps}, takes a positive number")
    require(
        residual is not None or (gamma is None and drop_path is None and row_index is None),
        "residual: got none with gamma, drop_path or row_index, takes the tensor that the scaled result is added to",
    )
    require_vector("gamma", gamma, width, z.device)
    if residual is None:
        require(sample is None, "sample: got one without drop_path, takes both or none")
        return
    require(
        residual.is_floating_point() and residual.dim() == 2 and residual.shape[1] == width
        and (row_index is not None or residual.shape[0] == z.shape[0]),
        lambda: f"residual: got {describe(residual)}, takes floating point "
        + (str(list(z.shape)) if row_index is None else f"[rows, {width}]"),
    )  # fmt: skip
    require_device("residual", residual, z.device)
    check_drop_path(drop_path, sample, residual)
    require_row_index(row_index, z)
    if row_index is not None:
        require(
            row_index.shape[0] == z.shape[0],
            lambda: f"row_index: got {describe(row_index)}, takes one entry per row of z, {z.shape[0]}",
        )


def _check_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Norms may have any floating-point dtype (``dtype`` None), the others z's."""
    fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    wanted = "floating point" if dtype is None else f"{str(dtype).removeprefix('torch.')}, as z has,"
    require(
        fits and tensor.dim() == len(shape) and all(a == b for a, b in zip(tensor.shape, shape, strict=True)),
        lambda: f"{name}: got {describe(tensor)}, takes {wanted} {list(shape)}",
    )


def chosen_strategy(
    strategy: str | None, z: Tensor, hidden: int, groups: int, row_counts: Sequence[int]
) -> str:  # fmt: skip
    """The strategy that was asked for, if it can run; for None what was measured on this GPU and that can run.

    On a GPU without ``row_counts`` that is "grouped", the one that reads no offsets on the host.
    """
    has_kernels = z.is_cuda or kernels_forced() or (kernels.INTERPRETED and z.device.type == "cpu")
    if strategy is None:
        if not has_kernels or z.dtype == torch.float64:
            return "reference"
        reason = _untaken_by_tiles(z, hidden, groups)
        if z.is_cuda and not row_counts:
            return "grouped" if reason is None else _by_host(reason)
        measured = strategy_for("routed_ffn", z.device, z.shape[0], z.shape[1])
        return "per_modality" if measured == "grouped" and reason else measured
    require(
        strategy in STRATEGIES, lambda: f"strategy: got {strategy!r}, takes one of {', '.join(STRATEGIES)}, or None"
    )
    if strategy != "reference":
        fits = has_kernels or kernels_forced() is False
        require(
            fits,
            lambda: f"strategy: got {strategy!r} with z on {z.device}, takes 'reference' there; use None for both",
        )
    if strategy == "grouped":
        require((reason := _untaken_by_tiles(z, hidden, groups)) is None, lambda: reason)
    return strategy


def _by_host(reason: str) -> str:
    """ "per_modality", which reads offsets on the host; said once, and refused where a graph is captured."""
    if not torch.compiler.is_compiling():
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(f"row_counts: expected the plan's inside a graph capture, got none; {reason}")
        _warn_of_host_read(reason)
    return "per_modality"


@functools.cache
def _warn_of_host_read(reason: str) -> None:
    warnings.warn(
        f"row_counts: got none, so that every call waits to read the offsets on the host; {reason}", stacklevel=5
    )


def _untaken_by_tiles(z: Tensor, hidden: int, groups: int) -> str | None:
    """Why grouped products cannot take these tensors, in one line."""
    multiple = TILE_ALIGNMENT // z.element_size()
    for name, columns in (("z", z.shape[1]), ("w0", hidden)):
        if columns % multiple:
            return (
                f"{name}: got {columns} {'columns' if name == 'z' else 'hidden columns'}, takes a multiple of "
                f"{multiple} with strategy 'grouped' in {str(z.dtype).removeprefix('torch.')}; use 'per_modality'"
            )
    if z.is_cuda and (reason := _refused_by(z.device)) is not None:
        return f"z: {reason} with strategy 'grouped'; use 'per_modality'"
    half = z.dtype in (torch.float16, torch.bfloat16)
    if not half and not (z.dtype == torch.float32 and not z.is_cuda):
        return f"z: got {describe(z)}, takes float16 or bfloat16 with strategy 'grouped'; use 'per_modality'"
    if groups > MAX_MODALITIES:
        return f"offsets: got {groups} modalities, takes at most {MAX_MODALITIES} with strategy 'grouped'"
    return None


def _refused_by(device: torch.device) -> str | None:
    return refusal(architecture_and_multiprocessors(device)[0])


_refused_by._dynamo_marked_constant = True  # what a GPU is does not change: torch.compile need not trace the question
