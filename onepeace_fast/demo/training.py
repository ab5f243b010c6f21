"""How the demos train: one loop, by one thread, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: such small matrices gain little from a second, and lose much if other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note how long a part takes."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start
