"""The one place where time is taken: variants in turn, medians and intervals, and the two clocks.

``onepeace_fast.compare`` and the benchmarks of a checkout take their times here.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[int], object]
Name = TypeVar("Name", bound=Hashable)
LONGEST_LEAD = 0.03
LEAST_ROUNDS = 3
BETWEEN_SAMPLES = 0.5  # seconds between two looks at the clocks' rates, which take time themselves
SHORT = 1e-3  # seconds; gaps between the launches of a longer call are a small part of it


class Taken(NamedTuple):
    """What one call took, in seconds: the device, the host to start the work, and the process over all threads."""

    seconds: float
    host: float
    cpu: float | None = None


@dataclass
class Timing:
    """Times of one variant, in seconds; ``cpu`` is the process's own time over all threads where it was taken."""

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, taken: Taken) -> None:
        """Count one call."""
        self.seconds.append(taken.seconds)
        self.host.append(taken.host)
        if taken.cpu is not None:
            self.cpu.append(taken.cpu)

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.seconds)

    def shown(self) -> str:
        """Median and extremes for a table, in milliseconds."""
        return f"{self.median * 1e3:.0f} ({min(self.seconds) * 1e3:.0f}-{max(self.seconds) * 1e3:.0f})"

    def record(self) -> dict[str, Any]:
        """Median, quartiles, extremes and number of runs, in milliseconds."""
        record = {
            **_quartiles(self.seconds),
            "min_ms": round(1e3 * min(self.seconds), 4),
            "max_ms": round(1e3 * max(self.seconds), 4),
            "runs": len(self.seconds),
        }
        host = self.host if self.host != self.seconds else []  # on a CPU both are one
        if host:
            record["host_median_ms"] = round(1e3 * statistics.median(host), 4)
        return record | ({f"cpu_{name}": value for name, value in _quartiles(self.cpu).items()} if self.cpu else {})


def _quartiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds; of one time all are that."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    names = ("median_ms", "lower_quartile_ms", "upper_quartile_ms")
    return {name: round(1e3 * value, 4) for name, value in zip(names, (middle, low, high), strict=True)}


class DeviceLost(Exception):
    """The device answers nothing to this process any more, as after an illegal access: only a new process helps.

    Its arguments are what was called, and the first error in one line.
    """


class HostClock:
    """Wall clock and the process's own time, for a device whose work is done when the call returns.

    ``frequencies`` are the clock rates in MHz that ``sample`` found.
    """

    def __init__(self) -> None:
        self.frequencies: list[float] = []

    def sample(self) -> None:
        """Note how fast the processor's clock runs, where Linux says so; called between rounds."""
        information = Path("/proc/cpuinfo")
        if information.exists():
            found = re.findall(r"^cpu MHz\s*: ([0-9.]+)", information.read_text(encoding="utf-8"), re.MULTILINE)
            self.frequencies += [max(map(float, found))] if found else []

    def shortened(self, call: Call, inputs: int) -> Call:
        """The call without the gaps between its launches; on a CPU there are none."""
        return call

    def time(self, call: Call, index: int, lead: float = 0.0) -> Taken:
        """Run ``call(index)``; ``lead`` is what the host needed last time, in seconds."""
        cpu, start = time.process_time(), time.perf_counter()
        call(index)
        seconds, spent = time.perf_counter() - start, time.process_time() - cpu
        return Taken(seconds, seconds, spent)

    def recover(self) -> None:
        """Bring the device back to order after a call that failed, or raise ``DeviceLost``; here nothing is to do."""


class EventClock(HostClock):
    """Device time between two CUDA events.

    Before the first event the device sleeps for about as long as the host needs to start the call's kernels, so that
    they queue up and gaps between launches do not count, as in a captured graph. A call that waits for the device
    itself keeps its gaps: they are its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cycles_per_second = self._calibrate()

    def sample(self) -> None:
        """Note the rate of the multiprocessors' clock, where pynvml is installed: torch asks NVML by it."""
        try:
            self.frequencies.append(float(torch.cuda.clock_rate()))
        except Exception:  # also NVML's own, of machines that refuse to say
            return

    def shortened(self, call: Call, inputs: int) -> Call:
        """A short call as a captured graph for each of its ``inputs``, which a replay's index chooses as a call's does.

        A longer one is returned as it is, and so is one that cannot be captured since it waits for the device.
        """
        if self.time(call, 0, self.time(call, 0).host).seconds > SHORT or self.waits(call):
            return call
        try:
            graphs = [captured_graph(call, index) for index in range(inputs)]
        except RuntimeError:
            self.recover()
            return call
        return lambda index: graphs[index % len(graphs)].replay()

    @staticmethod
    def waits(call: Call) -> bool:
        """Whether a call waits for the device; asked first, since a capture that it ends leaves torch in disorder."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(0)
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return False

    @classmethod
    def _calibrate(cls) -> float:
        """Cycles in a second, of a device that has left its idle clocks: until two measurements agree."""
        rates = [cls._rate()]
        while len(rates) < 2 or (abs(rates[-1] / rates[-2] - 1) > 0.05 and len(rates) < 20):
            rates.append(cls._rate())
        return max(rates)

    @staticmethod
    def _rate(cycles: int = 20_000_000) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        torch.cuda._sleep(cycles)
        stop.record()
        torch.cuda.synchronize()
        return cycles / (start.elapsed_time(stop) / 1e3)

    def time(self, call: Call, index: int, lead: float = 0.0) -> Taken:
        """Run ``call(index)`` behind a sleep of the device that covers about ``lead`` seconds of the host."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.cycles_per_second * min(max(1.5 * lead, 2e-4), LONGEST_LEAD)))
        begin = time.perf_counter()
        start.record()
        result = call(index)
        stop.record()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        del result
        return Taken(start.elapsed_time(stop) / 1e3, host)

    def recover(self) -> None:
        """Free memory, in case the call ran out of it; a device with a fault cannot be recovered."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLost("", describe_error(error)) from error


def captured_graph(call: Call, index: int) -> torch.cuda.CUDAGraph:
    """What a call launches, as a graph; the call runs once before, on a stream of its own, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            call(index)
    except RuntimeError:
        torch.cuda.set_stream(before)  # which the end of a capture that failed does not do
        raise
    return graph


def clock_for(device: torch.device) -> HostClock:
    """The clock of a device."""
    return EventClock() if device.type == "cuda" else HostClock()


def describe_error(error: BaseException) -> str:
    """An exception as one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def recovered(clock: HostClock, called: Any, error: Exception) -> str:
    """The error of a call in one line, the device back to order; raises ``DeviceLost`` where it cannot be."""
    line = describe_error(error)
    try:
        clock.recover()
    except DeviceLost:
        raise DeviceLost(called, line) from error
    return line


def interleaved(
    calls: Mapping[Name, Call], clock: HostClock, *, rounds: int = 20, warmups: int = 2, seconds_each: float = 4.0,
    seconds: float = math.inf, least: int = LEAST_ROUNDS,
    after_round: Callable[[dict[Name, Timing]], None] | None = None,
) -> tuple[dict[Name, Timing], dict[Name, str]]:  # fmt: skip
    """Time every call in turn, round after round; ``call(round)`` picks its inputs by the round.

    Every other round goes backwards, since whoever follows another call finds its caches. A call that has taken
    ``seconds_each`` in all is left out of later rounds once it has run ``least`` times, and no round begins after
    ``seconds`` once ``least`` have run. One that raises is left out from then on, its times with it. ``after_round`` is
    told what was found so far.

    Returns the timings, and the errors of the calls that raised. Raises ``DeviceLost``.
    """
    timings = {name: Timing() for name in calls}
    errors: dict[Name, str] = {}
    leads = dict.fromkeys(calls, 0.0)
    stop, look = time.perf_counter() + seconds, -math.inf
    for turn in range(-warmups, rounds):
        if turn >= least and time.perf_counter() > stop:
            break
        if time.perf_counter() >= look:
            clock.sample()
            look = time.perf_counter() + BETWEEN_SAMPLES
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            call, timing = calls[name], timings[name]
            if name in errors or (len(timing.seconds) >= least and sum(timing.seconds) > seconds_each):
                continue
            try:
                taken = clock.time(call, turn + warmups, leads[name])
            except Exception as error:
                errors[name] = recovered(clock, name, error)
                continue
            leads[name] = taken.host
            if turn >= 0:
                timing.add(taken)
        if after_round is not None and any(timing.seconds for timing in timings.values()):
            after_round(timings)
    return {name: timing for name, timing in timings.items() if name not in errors}, errors


def interval(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median of the rounds' ratios between the ends of its 95% interval, by order statistics.

    Of fewer than 6 rounds the interval is from the least to the largest ratio, and covers less.
    """
    ratios = sorted(time / against for time, against in zip(times, reference, strict=True))
    count = len(ratios)
    reach = 0.98 * count**0.5  # 1.96 standard deviations of a binomial with p = 1/2
    low, high = max(round(count / 2 - reach) - 1, 0), min(round(count / 2 + reach), count - 1)
    return round(ratios[low], 4), round(statistics.median(ratios), 4), round(ratios[high], 4)
