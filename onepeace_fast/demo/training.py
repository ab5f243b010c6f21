"""The loop that trains the demos' models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onepeace_fast.progress import progress
from onepeace_fast.training.optimizer import adamw, learning_rate

PEAK = 2e-3  # of the learning rate


def fit(
    model: nn.Module, loss: Callable[[int], Tensor], steps: int, what: str, *, peak: float = PEAK,
    said: Callable[[Tensor], float] | None = None,
) -> None:  # fmt: skip
    """Train in place by the loss of each step; the bar shows what ``said`` makes of it."""
    optimizer = adamw(model, peak)
    bar = progress(what, "step", steps)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, warm_up=steps // 10, total=steps)
        found = loss(step)
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        if said is not None:
            bar.set_postfix(loss=f"{said(found):.3f}", refresh=False)
        bar.update()
    bar.close()
    model.eval()
