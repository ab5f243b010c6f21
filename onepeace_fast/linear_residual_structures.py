"""The structures of ``linear_residual``, as those in ``onepeace_fast.structures``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from onepeace_fast.structures import DropPath, Routing


class LinearResidualInputs(NamedTuple):
    """``linear_residual``."""

    x: Tensor  # [rows, width]
    z: Tensor  # [rows, columns], or [N, columns] with a row index
    weight: Tensor  # [width, columns]
    bias: Tensor | None  # [width]
    gamma: Tensor | None  # [width]
    drop_path: DropPath
    routing: Routing  # of z
    norm_weight: Tensor | None  # [width]
    norm_bias: Tensor | None  # [width]
    eps: float
    keep_y: bool


class LinearResidualOutputs(NamedTuple):
    """The stream, with a norm its norm and statistics, and the linear layer's result where it is kept."""

    out: Tensor  # [rows, width]
    normed: Tensor | None  # [rows, width]
    mean: Tensor | None  # [rows, 1]
    rstd: Tensor | None  # [rows, 1]
    y: Tensor | None  # [rows, width], or [N, width]


class LinearResidualSaved(NamedTuple):
    """What the backward pass is given; z only where the weight's gradient needs it, out only with a norm."""

    grad_out: Tensor | None
    grad_normed: Tensor | None
    z: Tensor | None
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    drop_path: DropPath
    routing: Routing
    out: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    y: Tensor | None


class LinearResidualGradients(NamedTuple):
    """Gradients of ``linear_residual``; that of x is None where it is ``grad_out`` itself."""

    x: Tensor | None
    z: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gamma: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
