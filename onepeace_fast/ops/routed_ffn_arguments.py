"""What ``routed_ffn`` takes, and which strategy computes it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast import kernels
from onepeace_fast.checks import describe, require, require_device, require_vector
from onepeace_fast.kernels.launch import architecture_and_multiprocessors
from onepeace_fast.kernels.launch_heuristic import WIDEST
from onepeace_fast.kernels.tile_table import MAX_MODALITIES, refusal
from onepeace_fast.ops.arguments import (
    MAX_WIDTH,
    check_routing,
    require_drop_path,
    require_one_per_modality,
    require_row_index,
    require_rows,
)
from onepeace_fast.ops.gated_sub_ln import require_norm_and_activation
from onepeace_fast.ops.kernel_choice import kernels_forced
from onepeace_fast.ops.strategies import STRATEGIES, strategy_for
from onepeace_fast.structures import RoutedFFNInputs

TILE_ALIGNMENT = 16  # bytes, of the distance of two rows in a tensor descriptor
OPTIONAL = ("b2", "norm_weight", "norm_bias")
IN_TILES = ("grouped", "hybrid")  # the strategies with products of our own


def check(given: RoutedFFNInputs, has_gate: bool) -> None:
    """Raise unless all arguments fit together."""
    z, weights, routing, residual, gamma, drop_path, settings = given
    require_rows("z", z)
    check_routing(routing, z)
    modalities, width, hidden = routing.offsets.shape[0] - 1, z.shape[1], weights.w0[0].shape[0] if weights.w0 else 0
    require(hidden <= MAX_WIDTH, lambda: f"w0: expected at most {MAX_WIDTH} hidden columns, got {hidden}")
    # the names of ``weights`` again: torch 2.8 cannot trace ``weights._fields``
    shapes: dict[str, tuple[int, ...]] = {"w0": (hidden, width), "w1": (hidden, width), "norm_weight": (hidden,)}
    shapes |= {"norm_bias": (hidden,), "w2": (width, hidden), "b2": (width,)}
    for (name, shape), tensors in zip(shapes.items(), weights, strict=True):
        require_one_per_modality(name, tensors, modalities, name in OPTIONAL or (name == "w1" and not has_gate))
        dtype = None if name.startswith("norm") else z.dtype  # norms may have any floating-point dtype
        for m, tensor in enumerate(tensors):
            fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
            if not (fits and tensor.shape == shape and tensor.device == z.device):
                require_device(f"{name}[{m}]", tensor, z.device)
                wanted = "floating point" if dtype is None else f"{str(dtype).removeprefix('torch.')}, as z has,"
                raise ValueError(f"{name}[{m}]: expected {wanted} {list(shape)}, got {describe(tensor)}")
    require_norm_and_activation(weights.norm_weight, weights.norm_bias, settings.activation, settings.eps)
    row_index = routing.row_index
    require(
        residual is not None or (gamma is None and drop_path.scale is None and row_index is None),
        "residual: expected a tensor that the result of gamma, drop_path or row_index is added to, got none",
    )
    require_vector("gamma", gamma, width, z.device)
    if residual is None:
        if drop_path.sample is not None:
            raise ValueError("sample: expected both or none of drop_path and sample, got one without drop_path")
        return
    require(
        residual.is_floating_point() and residual.dim() == 2 and residual.shape[1] == width
        and (row_index is not None or residual.shape[0] == z.shape[0]),
        lambda: f"residual: expected floating point "
        f"{list(z.shape) if row_index is None else f'[rows, {width}]'}, got {describe(residual)}",
    )  # fmt: skip
    require_device("residual", residual, z.device)
    require_drop_path(drop_path, residual)
    require_row_index(row_index, z)
    if row_index is not None and row_index.shape[0] != z.shape[0]:
        raise ValueError(f"row_index: expected one entry per row of z, {z.shape[0]}, got {describe(row_index)}")


def chosen_strategy(
    strategy: str | None, z: Tensor, hidden: int, modalities: int, row_counts: Sequence[int], unfolded: bool = False
) -> str:  # fmt: skip
    """The strategy that was asked for, if it can run; for None what was measured on this GPU and that can run.

    On a GPU without ``row_counts`` that is "grouped", the one that reads no offsets on the host. ``unfolded``: there is
    a Sub-LayerNorm, which "grouped" would apply by a kernel of its own.

    Raises:
        ValueError: another name, or a strategy that cannot run on z.
    """
    has_kernels = z.is_cuda or kernels_forced() or (kernels.INTERPRETED and z.device.type == "cpu")
    if strategy is None:
        if not has_kernels or z.dtype == torch.float64:
            return "reference"
        if z.is_cuda and not row_counts:
            reason = _untaken_by_tiles("grouped", z, hidden, modalities, unfolded)
            return "grouped" if reason is None else _by_host(reason)
        best = strategy_for("routed_ffn", z.device, z.shape[0], z.shape[1])
        return "per_modality" if _untaken_by_tiles(best, z, hidden, modalities, unfolded) else best
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, or None, got {strategy!r}")
    if strategy != "reference" and not has_kernels and kernels_forced() is not False:
        raise ValueError(f"strategy: expected 'reference' with z on {z.device}, got {strategy!r}; use None for both")
    if (reason := _untaken_by_tiles(strategy, z, hidden, modalities, unfolded)) is not None:
        raise ValueError(reason)
    return strategy


def _by_host(reason: str) -> str:
    """Warn once that "per_modality" reads offsets on the host, and refuse that where a graph is captured."""
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


def _untaken_by_tiles(strategy: str, z: Tensor, hidden: int, modalities: int, unfolded: bool) -> str | None:
    """Why a strategy's own products cannot take these tensors, in one line; None where they can or it has none."""
    if strategy not in IN_TILES:
        return None
    multiple, dtype = TILE_ALIGNMENT // z.element_size(), str(z.dtype).removeprefix("torch.")
    for name, columns in (("z", z.shape[1]), ("w0", hidden)):
        if columns % multiple:
            return (
                f"{name}: expected a multiple of {multiple} {'columns' if name == 'z' else 'hidden columns'} with "
                f"strategy '{strategy}' in {dtype}, got {columns}; use 'per_modality'"
            )
    if z.is_cuda and (reason := _refused_by(z.device)) is not None:
        return f"z: {reason} with strategy '{strategy}'; use 'per_modality'"
    half = z.dtype in (torch.float16, torch.bfloat16)
    if not half and not (z.dtype == torch.float32 and not z.is_cuda):
        return f"z: expected float16 or bfloat16 with strategy '{strategy}', got {dtype}; use 'per_modality'"
    if strategy == "grouped" and unfolded and hidden > (most := WIDEST["gated_sub_ln"]):
        return (
            f"w0: expected at most {most} hidden columns with strategy 'grouped' and a norm in float16, got {hidden}; "
            "use 'per_modality'"
        )
    if modalities > MAX_MODALITIES:
        return f"offsets: expected at most {MAX_MODALITIES} modalities with strategy '{strategy}', got {modalities}"
    return None


def _refused_by(device: torch.device) -> str | None:
    return refusal(architecture_and_multiprocessors(device)[0])


# What a GPU is does not change: torch.compile need not trace the question.
_refused_by._dynamo_marked_constant = True  # type: ignore[attr-defined]
