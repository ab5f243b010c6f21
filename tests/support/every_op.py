"""Inputs of every op with every option, and both passes by the reference or the kernel, without autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.attention_structures import AttentionInputs, BiasVectors, KeySegments, Segments
from onepeace_fast.linear_residual_structures import LinearResidualInputs
from onepeace_fast.ops.gated_sub_ln import GATED_SUB_LN
from onepeace_fast.ops.layer_norm import LAYER_NORM
from onepeace_fast.ops.linear_residual import LINEAR_RESIDUAL
from onepeace_fast.ops.operation import Operation
from onepeace_fast.ops.projections import PROJECTIONS
from onepeace_fast.ops.relative_bias_attention import RELATIVE_BIAS_ATTENTION
from onepeace_fast.ops.residual import RESIDUAL
from onepeace_fast.ops.routed_ffn import ROUTED_FFN
from onepeace_fast.ops.routed_linear import ROUTED_LINEAR
from onepeace_fast.structures import (
    Dropout,
    DropPath,
    FeedForwardSettings,
    FeedForwardWeights,
    GatedSubLNInputs,
    LayerNormInputs,
    ProjectionsInputs,
    ResidualInputs,
    RoutedFFNInputs,
    RoutedLinearInputs,
    Routing,
)

WIDTH, HIDDEN = 16, 32
Make = Callable[..., Tensor]


def _leaf(make: Make, *shape: int) -> Tensor:
    return make(*shape).requires_grad_()


def rowwise_inputs(
    make: Make, rows: int, stream: int, routing: Routing, drop_path: DropPath, strategies: tuple[str, ...]
) -> list[tuple[Operation, Any]]:
    """Those of the ops over packed rows, of ``rows`` rows out of a stream; ``make(*shape)`` gives tensors."""
    modalities = routing.offsets.shape[0] - 1
    x, y, u, v = (_leaf(make, *shape) for shape in ((stream, WIDTH), (rows, WIDTH), (rows, HIDDEN), (rows, HIDDEN)))
    seed = torch.zeros((), dtype=torch.int64, device=x.device)
    gamma, weight, bias, head_scale = (_leaf(make, size) for size in (WIDTH, WIDTH, WIDTH, 2))
    shapes = ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))
    weights = FeedForwardWeights(*([_leaf(make, *shape) for _ in range(modalities)] for shape in shapes))
    norms = [[_leaf(make, WIDTH) for _ in range(modalities)] for _ in range(2)]
    branch = routing if routing.row_index is not None else Routing()
    found = [
        (LAYER_NORM, LayerNormInputs(x, *norms, head_scale, routing, 1e-5)),
        (RESIDUAL, ResidualInputs(x, y, gamma, drop_path, Dropout(0.1, seed), branch, weight, bias, 1e-5)),
        (GATED_SUB_LN, GatedSubLNInputs(u, v, weights.norm_weight, weights.norm_bias, routing, "gelu", 1e-5)),
    ]
    joined = LinearResidualInputs(
        x, u, weights.w2[0], weights.b2[0], gamma, drop_path, branch, weight, bias, 1e-5, keep_y=False
    )
    found.append((LINEAR_RESIDUAL, joined))
    found.append((ROUTED_LINEAR, RoutedLinearInputs(y, weights.w0, weights.norm_bias, routing)))
    found.append((PROJECTIONS, ProjectionsInputs(y, weights.w0, weights.norm_bias[1:], (*range(1, modalities),))))
    for strategy in strategies:
        settings = FeedForwardSettings("gelu", 1e-5, strategy, keep_products=True, keep_y=True)
        found.append((ROUTED_FFN, RoutedFFNInputs(y, weights, routing, x, gamma, drop_path, settings)))
    return found


def attention_inputs(
    make: Make, rows: int, segments: Segments, code_offsets: tuple[int, ...]
) -> tuple[Operation, AttentionInputs]:
    """Those of attention, of two heads."""
    vectors = [_leaf(make, 2, 2 * offset + 4) for offset in code_offsets]
    bias = BiasVectors(vectors, code_offsets)
    return RELATIVE_BIAS_ATTENTION, AttentionInputs(
        _leaf(make, rows, 3, 2, 4), None, None, None, segments, KeySegments(), bias, _leaf(make, 2), 0.5
    )  # fmt: skip


def run_both_passes(operation: Operation, given: Any, by: str) -> tuple[Any, Any]:
    """The outputs and all gradients by the "reference" or by the "kernel"."""
    with torch.no_grad():
        outputs, needs = getattr(operation, by)(given), operation.needs(given)
        saved = operation.saved(given, outputs, outputs[: operation.visible], needs)
        return outputs, getattr(operation.backward, by)(saved, needs)
