"""What pytest-benchmark shows of times that were taken in turn, and how two backends' times are shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from onepeace_fast.timing import HostClock, Timing, interleaved


class Replay:
    """A timer for pytest-benchmark, which takes times itself: it gives back those that were taken in turn.

    While it has none it is the wall clock.
    """

    __name__ = "times taken in turn by onepeace_fast.timing"

    def __init__(self) -> None:
        self._left: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        """Give these durations, one between each two calls."""
        self._left = [moment for duration in seconds for moment in (0.0, duration)]

    def __call__(self) -> float:
        """The moment of the next call, in seconds."""
        return self._left.pop(0) if self._left else time.perf_counter()


REPLAY = Replay()


def show(benchmark: Any, seconds: Sequence[float]) -> None:
    """Put durations into pytest-benchmark's table and file; its timer is ``REPLAY``."""
    REPLAY.load(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)


def backends(reference: Timing, fused: Timing, threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Both backends' timings: what was measured, and the same by the headings of a table."""
    speed_up = reference.median / fused.median
    both = {"reference": reference, "fused": fused}
    shown = {f"{name} ms": timing.shown() for name, timing in both.items()}
    shown |= {"rounds": str(len(fused.seconds)), "speed-up": f"{speed_up:.2f}"}
    records = {name: timing.record() for name, timing in both.items()}
    return {"threads": threads, **records, "speed_up": round(speed_up, 4)}, shown


def paired(
    benchmark: Any,
    measured: Callable[[], object],
    *against: Callable[[], object],
    seconds: float,
    rounds: int,
    least: int = 3,
) -> tuple[Timing, ...]:
    """Time all calls in turn by both clocks of a CPU; pytest-benchmark shows the times of ``measured``.

    As many rounds as fit into about ``seconds``, ``least`` at least and ``rounds`` at most. Returns all timings.
    """
    calls = {i: lambda _, call=call: call() for i, call in enumerate((measured, *against))}
    timings, errors = interleaved(
        calls, HostClock(), rounds=rounds, warmups=1, seconds_each=math.inf, seconds=seconds, least=least
    )
    for i, error in errors.items():
        raise RuntimeError(f"variant {i}: {error}")
    show(benchmark, timings[0].seconds)
    return tuple(timings.values())
