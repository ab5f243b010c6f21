"""Several linear layers of the same rows, such as those of queries, keys and values.

    y_i = x W_i^T + b_i

The results lie one after another in one tensor, so that an op may take them as one, and are products of the weights as
they are: joined weights would be copied in every call. It has no kernel of its own; the products are the vendor's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.ops.arguments import autocast_dtype
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.structures import (
    Needs,
    ProjectionsGradients,
    ProjectionsInputs,
    ProjectionsOutputs,
    ProjectionsSaved,
)


def projections_reference(given: ProjectionsInputs) -> ProjectionsOutputs:
    """A matrix product for each."""
    x, weight, bias, biased = given
    y = _fake(given).y
    biases = dict(zip(biased, bias, strict=True))
    for i, of_x in enumerate(y):
        if i in biases:
            torch.addmm(biases[i], x, weight[i].t(), out=of_x)
        else:
            torch.mm(x, weight[i].t(), out=of_x)
    return ProjectionsOutputs(y)


def projections_backward_reference(saved: ProjectionsSaved, needs: Needs) -> ProjectionsGradients:
    """dx = sum of dy_i W_i,  dW_i = dy_i^T x,  db_i = sum of dy_i over the rows."""
    dy, x, weight, biased = saved
    dx = None
    if needs.x:
        dx = dy[0] @ weight[0]
        for of_y, w in zip(dy[1:], weight[1:], strict=True):
            dx.addmm_(of_y, w)
    return ProjectionsGradients(
        dx,
        _weight_gradients(dy, x) if needs.weight else None,
        [dy[i].sum(0) if need else None for i, need in zip(biased, needs.bias, strict=True)],
    )


def _weight_gradients(dy: Tensor, x: Tensor) -> Tensor:
    """By one product where the layers' gradients lie side by side, as attention gives them."""
    layers, _, columns = dy.shape
    if dy.stride() == (columns, layers * columns, 1):
        return dy.transpose(0, 1).flatten(1).t() @ x
    found = x.new_empty(layers * columns, x.shape[1])
    for of_y, of_weight in zip(dy, found.split(columns), strict=True):
        torch.mm(of_y.t(), x, out=of_weight)
    return found


def _finish(backward: Callable[..., Any], saved: ProjectionsSaved, needs: Needs) -> Any:
    """The weights' gradients one by one: parts of one tensor, which an op may not return."""
    found = backward(saved, needs._replace(weight=any(needs.weight)))
    parts = [None] * len(needs.weight) if found.weight is None else found.weight.chunk(len(needs.weight))
    return found._replace(weight=[part if need else None for part, need in zip(parts, needs.weight, strict=True)])


def _fake(given: ProjectionsInputs) -> ProjectionsOutputs:
    x, weight = given.x, given.weight
    return ProjectionsOutputs(x.new_empty(len(weight), x.shape[0], weight[0].shape[0]))


def _fake_backward(saved: ProjectionsSaved, needs: Needs) -> ProjectionsGradients:
    x, (layers, _, columns) = saved.x, saved.grad_y.shape
    return ProjectionsGradients(
        x.new_empty(x.shape) if needs.x else None,
        x.new_empty(layers * columns, x.shape[1]) if needs.weight else None,
        [x.new_empty(columns) if need else None for need in needs.bias],
    )


PROJECTIONS = Operation(
    "projections",
    ProjectionsInputs,
    ProjectionsOutputs,
    reference=projections_reference,
    kernel=projections_reference,
    fake=_fake,
    gradient=Gradient(
        ProjectionsSaved, ProjectionsGradients, projections_backward_reference, projections_backward_reference,
        _fake_backward, finish=_finish,
    ),
    triton=False,
)  # fmt: skip


def projections(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None]) -> Tensor:
    """The linear layers of rows [rows, width]: weights [columns, width], biases [columns] or None.

    Returns:
        [layers, rows, columns], under autocast in its dtype.
    """
    biased = tuple(i for i, b in enumerate(bias) if b is not None)
    biases = [b for b in bias if b is not None]
    weights = [*weight]
    if (dtype := autocast_dtype(x)) is not None:
        x, weights, biases = x.to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    return PROJECTIONS(ProjectionsInputs(x, weights, biases, biased))[0]
