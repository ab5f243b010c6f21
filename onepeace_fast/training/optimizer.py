"""What ONE-PEACE is pretrained with: AdamW, the parameters that its weight decay spares, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from onepeace_fast.checks import describe, require

SPARED = ("cls_embedding", "pos_embed", "embed_positions.weight")


def is_spared(name: str, parameter: Tensor) -> bool:
    """Whether ONE-PEACE's weight decay spares a parameter."""
    return parameter.dim() < 2 or any(f".{name}".endswith(f".{ending}") for ending in SPARED)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.05, spared: Callable[[str, Tensor], bool] = is_spared
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups for ``torch.optim.AdamW``, decayed first, then spared.

    By default spared are parameters with fewer than two dimensions, which are norms, biases, LayerScale (gamma_1,
    gamma_2), head scale (c_attn) and logit_scale; and CLS embeddings and learned positions (``SPARED``), of the
    decoder's audio too. All else decays: matrices, convolutions (audio's position convolutions too), token embeddings,
    bias tables, mask tokens, and of audio mask_embedding and cls_pos_embed.

    Upstream's public code does the same except for two names: a missing comma in its list makes the decoder's image
    positions and text CLS decay. Here they are spared like the encoder's, as that list means.

    Raises:
        ValueError: a negative or infinite ``weight_decay``, or a model without trainable parameters.
    """
    _require_number("weight_decay", weight_decay, weight_decay >= 0, "0 or more")
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if spared(name, parameter) else decayed).append(parameter)
    require(bool(decayed or others), "model: expected a parameter with requires_grad, got none")
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def adamw(
    model: nn.Module, peak: float, weight_decay: float = 0.05, *, betas: tuple[float, float] = (0.9, 0.98),
    spared: Callable[[str, Tensor], bool] = is_spared,
) -> torch.optim.AdamW:  # fmt: skip
    """AdamW over ``parameter_groups(model, weight_decay, spared)``; betas and eps 1e-8 are as upstream pretrains.

    It uses torch's fused kernel, which does not mix sharded and whole tensors: each kind has its own groups.
    ``peak`` is its learning rate until the caller sets each group's "lr" from ``learning_rate``. Clip gradients before
    a step with ``torch.nn.utils.clip_grad_norm_`` (upstream: 3.0).
    """
    groups = []
    for group in parameter_groups(model, weight_decay, spared):
        for sharded in (True, False):
            chosen = [parameter for parameter in group["params"] if isinstance(parameter, DTensor) is sharded]
            groups += [{**group, "params": chosen}] if chosen else []
    return torch.optim.AdamW(groups, lr=peak, betas=betas, eps=1e-8, fused=True)


def learning_rate(step: int, *, peak: float, warm_up: int, total: int, minimum: float = 0.0) -> float:
    """Learning rate of update ``step``, counted from 0: linear from ``minimum`` to ``peak``, then half a cosine back.

    It depends on its arguments alone, so a resumed run goes on as it would have. Upstream also starts at ``minimum``.
    It pretrains with minimum 1e-6 and peak 5e-4 (vision-language, 3,000 of 200,000 updates to warm up) or 2e-4
    (audio-language, a tenth to warm up).

    Args:
        step: updates done so far; from ``total`` on the rate stays at ``minimum``.
        peak: reached at step ``warm_up``.
        warm_up: updates before the peak, 0 to start at it.
        total: updates of the run, more than ``warm_up``.
        minimum: rate at step 0 of a warm-up and at step ``total``.

    Raises:
        ValueError: an argument that does not fit.
    """
    for name, value in (("step", step), ("warm_up", warm_up)):
        require(type(value) is int and value >= 0, f"{name}: expected an integer, 0 or more, got {describe(value)}")
    if type(total) is not int or total <= warm_up:
        raise ValueError(f"total: expected an integer above warm_up, {warm_up}, got {describe(total)}")
    _require_number("peak", peak, peak > 0, "more than 0")
    _require_number("minimum", minimum, 0 <= minimum <= peak, f"0 to the peak, {peak}")
    if step < warm_up:
        share = step / warm_up
    else:
        share = 0.5 + 0.5 * math.cos(math.pi * min((step - warm_up) / (total - warm_up), 1.0))
    return minimum + (peak - minimum) * share


def _require_number(name: str, value: float, fits: bool, expected: str) -> None:
    require(math.isfinite(value) and fits, f"{name}: expected a number, {expected}, got {value!r}")
