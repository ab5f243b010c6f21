"""What pytest-benchmark times beside its peers, and how two backends' times are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onepeace_fast.timing import HostClock, Timing


def backends(reference: Timing, fused: Timing, threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Both backends' timings: what was measured, and the same by the headings of a table."""
    speed_up = reference.median / fused.median
    both = {"reference": reference, "fused": fused}
    shown = {f"{name} ms": timing.shown() for name, timing in both.items()}
    shown |= {"rounds": str(len(fused.seconds)), "speed-up": f"{speed_up:.2f}"}
    records = {name: timing.record() for name, timing in both.items()}
    return {"threads": threads, **records, "speed_up": round(speed_up, 4)}, shown


def timed(call: Callable[[], object], timing: Timing) -> None:
    """Time one call by both clocks of a CPU."""
    timing.add(HostClock().time(lambda _: call(), 0))


def paired(
    benchmark: Any,
    measured: Callable[[], object],
    *against: Callable[[], object],
    seconds: float,
    rounds: int,
    least: int = 3,
) -> tuple[Timing, ...]:
    """Time ``measured`` by pytest-benchmark, with a timed run of all ``against`` before each of its rounds.

    Their order turns in every round, since whoever follows another variant finds colder caches.
    As many rounds as fit into about ``seconds``, ``least`` at least and ``rounds`` at most. Returns all timings.
    """
    timings = tuple(Timing() for _ in (measured, *against))

    def others() -> None:
        turned = list(zip(against, timings[1:], strict=True))[:: -1 if len(timings[0].seconds) % 2 else 1]
        for call, timing in turned:
            timed(call, timing)

    warm = Timing()
    for call in (*against, measured):
        timed(call, warm)
    fitting = int(seconds / max(sum(warm.seconds), 1e-9))
    benchmark.pedantic(
        lambda: timed(measured, timings[0]),
        setup=others,
        rounds=max(least, min(rounds, fitting)),
        iterations=1,
    )
    return timings
