"""How times are taken: calls in turn, warm-ups that do not count, medians with their intervals, and both clocks."""

import types

import pytest
import torch
from support.clocks import MadeUpClock

from onepeace_fast import timing
from onepeace_fast.timing import DeviceLost, EventClock, HostClock, Timing, interleaved, interval


def test_variants_run_in_turn():
    called = []
    calls = {name: lambda index, name=name: called.append((name, index)) for name in "abc"}
    timings, errors = interleaved(calls, HostClock(), rounds=4, warmups=2)
    assert called == [(name, index) for index in range(6) for name in ("cba" if index % 2 else "abc")]
    assert not errors and [len(timing.seconds) for timing in timings.values()] == [4, 4, 4]


def test_a_failing_variant_stops_no_other():
    def breaks(index):
        if index == 3:
            raise ValueError("out\nof   order")
        return 0.1

    clock = MadeUpClock()
    timings, errors = interleaved({"breaks": breaks, "works": lambda _: 0.2}, clock, rounds=4)
    assert errors == {"breaks": "ValueError: out of order"}
    assert list(timings) == ["works"] and timings["works"].seconds == [0.2] * 4
    assert clock.recovered == 1


def test_a_slow_variant_runs_three_times_at_least():
    calls = {"slow": lambda _: 9.0, "quick": lambda _: 0.1}
    timings, _ = interleaved(calls, MadeUpClock(), rounds=20, seconds_each=4.0)
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"slow": 3, "quick": 20}


def test_no_round_begins_after_the_time_once_three_have_run():
    timings, _ = interleaved({"a": lambda _: None}, HostClock(), rounds=20, seconds=0.0)
    assert len(timings["a"].seconds) == 3


def test_a_clock_that_cannot_bring_the_device_back_says_so(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    clock = object.__new__(EventClock)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        clock.recover()


def test_warm_ups_are_not_counted():
    times = (100.0, 50.0, 3.0, 1.0, 2.0)
    timings, _ = interleaved({"a": times.__getitem__}, MadeUpClock(), rounds=3, warmups=2)
    record = timings["a"].record()
    assert (record["median_ms"], record["min_ms"], record["max_ms"], record["runs"]) == (2e3, 1e3, 3e3, 3)


def test_the_host_s_clock_takes_wall_clock_and_the_process_s_own_time_and_the_record_has_both(monkeypatch):
    wall, own = iter([10.0, 10.5]), iter([3.0, 3.25])
    fake = types.SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(own))
    monkeypatch.setattr(timing, "time", fake)
    found = Timing()
    found.add(HostClock().time(lambda _: None, 0))
    assert (found.seconds, found.cpu) == ([0.5], [0.25])
    assert found.record() == {
        "median_ms": 500, "lower_quartile_ms": 500, "upper_quartile_ms": 500, "min_ms": 500, "max_ms": 500, "runs": 1,
        "cpu_median_ms": 250, "cpu_lower_quartile_ms": 250, "cpu_upper_quartile_ms": 250,
    }  # fmt: skip


def test_quartiles_enclose_half_of_the_times():
    record = Timing([0.005, 0.001, 0.004, 0.002, 0.003]).record()
    assert [record[name] for name in ("lower_quartile_ms", "median_ms", "upper_quartile_ms")] == [2.0, 3.0, 4.0]


def test_whoever_watches_is_told_of_every_round_that_counts():
    seen = []
    interleaved(
        {"a": lambda _: 0.1}, MadeUpClock(), rounds=3, after_round=lambda found: seen.append(len(found["a"].seconds))
    )
    assert seen == [1, 2, 3]


class GraphClock(EventClock):
    """A device that takes what it is told, and knows no graphs where ``refuses``."""

    def __init__(self, seconds):
        self.seconds, self.recovered = seconds, 0

    def time(self, call, index, lead=0.0):
        call(index)
        return timing.Taken(self.seconds, 0.0)

    def waits(self, call):
        return False

    def recover(self):
        self.recovered += 1


def test_a_short_call_is_replayed_from_a_graph_of_each_of_its_inputs(monkeypatch):
    replayed = []

    def captured(call, index):
        return types.SimpleNamespace(replay=lambda: replayed.append(index))

    monkeypatch.setattr(timing, "captured_graph", captured)
    called = []
    short = GraphClock(timing.SHORT / 2).shortened(called.append, 3)
    called.clear()
    for index in range(4):
        short(index)
    assert replayed == [0, 1, 2, 0] and called == []
    assert GraphClock(timing.SHORT * 2).shortened(called.append, 3) == called.append


def test_a_call_that_cannot_be_captured_is_timed_as_it_is(monkeypatch):
    def refuses(call, index):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "captured_graph", refuses)
    clock, call = GraphClock(timing.SHORT / 2), [].append
    assert clock.shortened(call, 2) == call and clock.recovered == 1


def test_a_call_that_waits_for_the_device_is_not_captured(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits(index):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    clock = GraphClock(timing.SHORT / 2)
    monkeypatch.setattr(clock, "waits", timing.EventClock.waits)
    monkeypatch.setattr(timing, "captured_graph", None)  # not called
    assert clock.shortened(waits, 2) is waits and modes == [0, "error", 0]
    assert not timing.EventClock.waits([].append) and modes[-1] == 0


def test_events_enclose_the_call_alone_once_the_device_has_left_its_idle_clocks(monkeypatch):
    log, times = [], iter([60.0, 30.0, 10.2, 10.0, 20.0, 99.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            return next(times)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    clock = EventClock()
    assert clock.cycles_per_second == 20_000_000 / 0.01
    log.clear()
    seconds, host, cpu = clock.time(lambda index: log.append(f"call {index}"), 7, lead=0.01)
    cycles = 30_000_000  # 1.5 x 10 ms at the 2e9 cycles a second that were calibrated
    assert log == ["synchronize", cycles, "record", "call 7", "record", "synchronize"]
    assert seconds == 0.02 and 0 < host < 1 and cpu is None and next(times) == 99.0


def test_the_interval_of_a_median_is_that_of_order_statistics():
    times = [float(i) for i in range(1, 31)]
    assert interval(times, [1.0] * 30) == (10.0, 15.5, 21.0)  # the 10th and the 21st of 30: 95.7%
    assert interval([2.0], [1.0]) == (2.0, 2.0, 2.0)
