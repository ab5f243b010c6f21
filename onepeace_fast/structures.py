"""What belongs together travels together: inputs, outputs and gradients of the ops, as they and their kernels see them.

For each op stand here what it takes (``Inputs``), what it gives (``Outputs``), what its backward pass is given
(``Saved``: by the names of the inputs and outputs, and ``grad_`` of an output) and what that gives (``Gradients``, by
the names of the inputs). A list holds tensors, one per modality; a tuple holds numbers. Schemas, fakes and autograd are
made from these fields: see ``onepeace_fast.ops.operation``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Any]  # over structures
# In the shape of an op's gradients, True where one is needed.
Needs = Any


class Routing(NamedTuple):
    """Which rows an op computes and whose they are."""

    offsets: Tensor | None = None  # int32 [modalities + 1], the first row of each modality; None: no modalities
    row_counts: tuple[int, ...] = ()  # rows of each modality, where the host knows them
    row_index: Tensor | None = None  # int32 [N], the row of the stream that each row stands for; None: all in order


class DropPath(NamedTuple):
    """DropPath's factor of each sample, and whose each row is; both or none."""

    scale: Tensor | None = None  # float32 [samples], 0 or 1 / (1 - p)
    sample: Tensor | None = None  # int32 [rows of the stream]


class Dropout(NamedTuple):
    """Dropout's probability and the seed that its random numbers depend on."""

    probability: float = 0.0
    seed: Tensor | None = None  # int64 []


class LayerNormInputs(NamedTuple):
    """``layer_norm``."""

    x: Tensor  # [rows, width]
    weight: list[Tensor]  # [width], none, one for all rows or one per modality
    bias: list[Tensor]  # like weight
    head_scale: Tensor | None  # [heads]
    routing: Routing
    eps: float
    y_dtype: torch.dtype | None = None  # None: that of x


class LayerNormOutputs(NamedTuple):
    """The norm of N rows and their statistics, float32 for half precision."""

    y: Tensor  # [N, width]
    mean: Tensor  # [N, 1]
    rstd: Tensor  # [N, 1]


class LayerNormSaved(NamedTuple):
    """What the backward pass of ``layer_norm`` is given."""

    grad_y: Tensor  # [N, width]
    x: Tensor
    mean: Tensor
    rstd: Tensor
    weight: list[Tensor]
    bias: list[Tensor]
    head_scale: Tensor | None
    routing: Routing
    passed: Tensor | None = None  # [rows, width], a gradient of x from elsewhere, which that of the norm is added to


class LayerNormGradients(NamedTuple):
    """Gradients of ``layer_norm``."""

    x: Tensor
    weight: list[Tensor | None]
    bias: list[Tensor | None]
    head_scale: Tensor | None


class RMSNormInputs(NamedTuple):
    """``rms_norm``."""

    x: Tensor  # [rows, width]
    weight: list[Tensor]  # [width], none, one for all rows or one per modality
    routing: Routing
    eps: float


class RMSNormOutputs(NamedTuple):
    """The norm of N rows, and the reciprocal of each row's root mean square, float32 for half precision."""

    y: Tensor  # [N, width]
    rrms: Tensor  # [N, 1]


class RMSNormSaved(NamedTuple):
    """What the backward pass of ``rms_norm`` is given."""

    grad_y: Tensor  # [N, width]
    x: Tensor
    rrms: Tensor
    weight: list[Tensor]
    routing: Routing


class RMSNormGradients(NamedTuple):
    """Gradients of ``rms_norm``."""

    x: Tensor
    weight: list[Tensor | None]


class ResidualInputs(NamedTuple):
    """``residual``, or with ``norm_weight`` ``residual_layer_norm`` or ``residual_rms_norm``."""

    x: Tensor  # [rows, width]
    y: Tensor  # [rows, width], or [N, width] with a row index
    gamma: Tensor | None  # [width]
    drop_path: DropPath
    dropout: Dropout
    routing: Routing  # of y
    norm_weight: Tensor | None  # [width]
    norm_bias: Tensor | None  # [width]
    eps: float
    norm_is_rms: bool = False  # no LayerNorm but RMSNorm


class ResidualOutputs(NamedTuple):
    """The stream, and with a norm its norm and statistics; an RMSNorm has no mean, and rstd is 1 / RMS."""

    out: Tensor  # [rows, width]
    normed: Tensor | None  # [rows, width]
    mean: Tensor | None  # [rows, 1]
    rstd: Tensor | None  # [rows, 1]


class ResidualSaved(NamedTuple):
    """What the backward pass is given; y only where gamma needs it, out only with a norm, a mean not with RMSNorm."""

    grad_out: Tensor | None
    grad_normed: Tensor | None
    y: Tensor | None
    gamma: Tensor | None
    drop_path: DropPath
    dropout: Dropout
    routing: Routing
    out: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    y_dtype: torch.dtype


class ResidualGradients(NamedTuple):
    """Gradients of ``residual``; that of x is None where it is ``grad_out`` itself, that of y where none is needed."""

    x: Tensor | None
    y: Tensor | None
    gamma: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class GatedSubLNInputs(NamedTuple):
    """``gated_sub_ln``."""

    u: Tensor  # [rows, width]
    v: Tensor | None  # [rows, width]; None: no gate
    norm_weight: list[Tensor]  # [width] each, none or one per modality
    norm_bias: list[Tensor]  # like norm_weight
    routing: Routing
    activation: str
    eps: float


class GatedSubLNOutputs(NamedTuple):
    """The result, and with a norm the statistics of its rows."""

    n: Tensor  # [rows, width]
    mean: Tensor | None  # [rows, 1]
    rstd: Tensor | None  # [rows, 1]


class GatedSubLNSaved(NamedTuple):
    """What the backward pass of ``gated_sub_ln`` is given."""

    grad_n: Tensor
    u: Tensor
    v: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    norm_weight: list[Tensor]
    norm_bias: list[Tensor]
    routing: Routing
    activation: str


class GatedSubLNGradients(NamedTuple):
    """Gradients of ``gated_sub_ln``."""

    u: Tensor
    v: Tensor | None
    norm_weight: list[Tensor | None]
    norm_bias: list[Tensor | None]


class FeedForwardWeights(NamedTuple):
    """The parameters of all modalities' feed-forward networks, one of each per modality, or their gradients."""

    w0: list[Tensor]  # [hidden, width]
    w1: list[Tensor]  # [hidden, width]; empty: no gate
    norm_weight: list[Tensor]  # [hidden]; empty: no Sub-LayerNorm
    norm_bias: list[Tensor]  # [hidden]
    w2: list[Tensor]  # [width, hidden]
    b2: list[Tensor]  # [width]; empty: no bias


class FeedForwardSettings(NamedTuple):
    """How ``routed_ffn`` is computed, and what it keeps for the backward pass."""

    activation: str
    eps: float
    strategy: str
    keep_products: bool
    keep_y: bool


class RoutedFFNInputs(NamedTuple):
    """``routed_ffn``."""

    z: Tensor  # [rows, width]
    weights: FeedForwardWeights
    routing: Routing
    residual: Tensor | None  # [rows of the stream, width]
    gamma: Tensor | None  # [width]
    drop_path: DropPath
    settings: FeedForwardSettings


class RoutedFFNOutputs(NamedTuple):
    """The result, and what is kept for the backward pass."""

    out: Tensor  # the residual's shape, or [rows, width]
    u: Tensor | None  # z W0^T [rows, hidden]
    v: Tensor | None  # z W1^T [rows, hidden]
    y: Tensor | None  # before it is scaled [rows, width], where that is not out itself
    mean: Tensor | None  # of the hidden rows [rows, 1]
    rstd: Tensor | None  # [rows, 1]
    folded: Tensor | None  # W2 g and W2 b + b2 of each modality, float32 [2, modalities, width]


class RoutedFFNSaved(NamedTuple):
    """What the backward pass of ``routed_ffn`` is given."""

    grad_out: Tensor
    z: Tensor
    weights: FeedForwardWeights
    routing: Routing
    gamma: Tensor | None
    drop_path: DropPath
    u: Tensor | None
    v: Tensor | None
    y: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    folded: Tensor | None
    settings: FeedForwardSettings


class RoutedFFNGradients(NamedTuple):
    """Gradients of ``routed_ffn``; that of the residual is ``grad_out`` itself."""

    z: Tensor
    weights: FeedForwardWeights
    residual: Tensor | None
    gamma: Tensor | None


class RoutedLinearInputs(NamedTuple):
    """``routed_linear``."""

    x: Tensor  # [rows, width]
    weight: list[Tensor]  # [columns, width], one per modality
    bias: list[Tensor]  # [columns]; empty: no bias
    routing: Routing


class RoutedLinearOutputs(NamedTuple):
    """The result."""

    y: Tensor  # [rows, columns]


class RoutedLinearSaved(NamedTuple):
    """What the backward pass of ``routed_linear`` is given."""

    grad_y: Tensor
    x: Tensor
    weight: list[Tensor]
    routing: Routing


class RoutedLinearGradients(NamedTuple):
    """Gradients of ``routed_linear``."""

    x: Tensor | None
    weight: list[Tensor | None]
    bias: list[Tensor | None]


class ProjectionsInputs(NamedTuple):
    """``projections``."""

    x: Tensor  # [rows, width]
    weight: list[Tensor]  # [columns, width], one per layer
    bias: list[Tensor]  # [columns], of the layers that have one
    biased: tuple[int, ...]  # which these are


class ProjectionsOutputs(NamedTuple):
    """The results one after another."""

    y: Tensor  # [layers, rows, columns]


class ProjectionsSaved(NamedTuple):
    """What the backward pass of ``projections`` is given."""

    grad_y: Tensor
    x: Tensor
    weight: list[Tensor]
    biased: tuple[int, ...]


class ProjectionsGradients(NamedTuple):
    """Gradients of ``projections``; that of the weights is one tensor, [layers * columns, width]."""

    x: Tensor | None
    weight: Tensor | None
    bias: list[Tensor | None]
