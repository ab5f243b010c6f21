"""Two models on one batch: their times in turn, their memory, and how far outputs and gradients lie apart."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.compared_model import ComparedModel, unchanged
from onepeace_fast.differences import (
    UNNAMED,
    Difference,
    gradient_differences,
    largest,
    named_tensors,
    output_differences,
)
from onepeace_fast.memory import peak_bytes, saved_bytes
from onepeace_fast.tables import table
from onepeace_fast.timing import Timing, clock_for, interleaved, interval

FORWARD, BOTH = "forward", "forward and backward"
MOST_ROUNDS = 10_000
LEAST_ROUNDS = 6  # of fewer no interval of a median covers 95%


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; printed, it is tables.

    ``times`` are of both models by mode, "forward" and "forward and backward". ``memory`` is of both by measure, in
    bytes. ``outputs`` and ``gradients`` are differences by name; ``not_compared`` are gradients that one model alone
    has, or the other in another shape. A tensor that no module given holds, and no input is, is "unnamed" with a number
    and its shape.
    """

    names: tuple[str, str]
    device: torch.device
    threads: int
    times: dict[str, tuple[Timing, Timing]]
    memory: dict[str, tuple[int, int]]
    outputs: dict[str, Difference]
    gradients: dict[str, Difference]
    not_compared: tuple[str, ...]

    def ratio(self, mode: str = FORWARD, wall: bool = False) -> tuple[float, float, float]:
        """The second model's time over the first's: low end of the 95% interval, median, high end.

        The median is that of the rounds' ratios. The time is the process's own on a CPU, or with ``wall`` the wall
        clock's, and the device's on a GPU. Of fewer than 6 rounds the interval covers less than 95%.
        """
        a, b = (_taken(timing, wall) for timing in self.times[mode])
        return interval(b, a)

    def record(self) -> dict[str, Any]:
        """Everything as numbers and texts that JSON has."""
        found: dict[str, Any] = {"names": list(self.names), "device": str(self.device), "threads": self.threads}
        found["torch"] = torch.__version__
        for mode, timings in self.times.items():
            found[mode] = {name: timing.record() for name, timing in zip(self.names, timings, strict=True)}
            found[mode] |= {"ratio": list(self.ratio(mode)), "wall_ratio": list(self.ratio(mode, wall=True))}
            if self.device.type != "cpu":
                del found[mode]["wall_ratio"]
        found["memory_bytes"] = {what: dict(zip(self.names, pair, strict=True)) for what, pair in self.memory.items()}
        for what, differences in (("outputs", self.outputs), ("gradients", self.gradients)):
            found[what] = {name: one._asdict() for name, one in differences.items()}
        return found | {"not_compared": list(self.not_compared)}

    def add_to(self, benchmark: Any) -> None:
        """Put the record into that of pytest-benchmark, by its fixture.

        pytest-benchmark writes down what it has run itself, so let it run the comparison, once. Its own time is then
        that of the whole comparison:

            found = benchmark.pedantic(compare, (model_a, model_b, batch))
            found.add_to(benchmark)
        """
        benchmark.extra_info.update(self.record())

    def __str__(self) -> str:
        a, b = self.names
        rows: list[tuple[object, ...]] = [("", a, b, f"{b} / {a}", "95% interval")]
        for mode, timings in self.times.items():
            for what, wall in (("CPU ms", False), ("wall ms", True)) if timings[0].cpu else (("ms", True),):
                medians = [f"{1e3 * statistics.median(_taken(timing, wall)):.3f}" for timing in timings]
                low, middle, high = self.ratio(mode, wall)
                rows.append((f"{mode}, {what}", *medians, f"{middle:.3f}", f"{low:.3f}-{high:.3f}"))
        for what, (first, second) in self.memory.items():
            ratio = f"{second / first:.3f}" if first else "-"
            rows.append((f"{what}, MiB", f"{first / 2**20:.3f}", f"{second / 2**20:.3f}", ratio, ""))
        lines = [table(rows), "", table(self._difference_rows())]
        if BOTH in self.times:
            lines.append(f"gradients compared: {len(self.gradients)}{_listed(self.not_compared)}")
        if any(name.startswith(UNNAMED) for name in self.not_compared):
            lines.append(
                "unnamed: what a function closes over has no name to match; give modules, or methods of modules"
            )
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device.type == "cpu" else ""
        return "\n".join([*lines, f"medians of {len(self.times[FORWARD][0].seconds)} rounds on {self.device}{threads}"])

    def _difference_rows(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = [("largest difference", "absolute", "relative", "in")]
        for what, differences in (("outputs", self.outputs), ("gradients", self.gradients)):
            for name in dict.fromkeys(largest(differences, by) for by in ("absolute", "relative") if differences):
                one = differences[name]
                rows.append((what, f"{one.absolute:.1e}", f"{one.relative:.1e}", name))
        return rows


def _taken(timing: Timing, wall: bool) -> list[float]:
    return timing.seconds if wall or not timing.cpu else timing.cpu


def _listed(names: tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; not in both: {', '.join(names[:most])}{more}" if names else ""


def compare(
    model_a: Callable[..., Any],
    model_b: Callable[..., Any],
    batch: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    backward: bool = True,
    loss: Callable[[Any], Tensor] | None = None,
    rounds: int | None = None,
    seconds: float = 10.0,
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Time two models in turn on one batch, and measure their memory and how far they lie apart.

    A round runs ``model_a`` forward under ``no_grad`` and forward with backward, then ``model_b``. Two rounds warm up
    and do not count. On a CPU the process's own time is taken beside the wall clock, over all threads. On a GPU CUDA
    events take the device's time, without the gaps between launches.

    Memory is what autograd saves for the backward pass, parameters excluded, and on a GPU also the most that a pass
    allocates above what stood before.

    The runs whose outputs and gradients are compared begin from one random state of torch: equal models draw equal
    dropout, but the library's fused dropout draws other numbers than torch's. Afterwards the random state and the
    buffers of a module, or of a method's, are as before; a replaced buffer that no state dict has stays.

    Args:
        model_a: a module or another callable, which ``model_b`` is held against. Outputs are tensors, or mappings,
            tuples, lists and dataclasses of them, whose names are keys joined by dots.
        model_b: likewise.
        batch: one tensor, the positional arguments as a tuple, or the keyword arguments as a mapping. An input that
            requires a gradient gets one.
        backward: also forward with backward, and gradients. A tensor that both models hold is compared, under the
            first's name: parameters of modules, or of those whose methods are given, and what else both passes reach.
            Other parameters are compared where both have the name and the shape. No ``.grad`` changes.
        loss: a function from a model's output to a tensor of one entry, where the backward pass begins. Without it the
            loss is the sum of the outputs that need a gradient, each entry times a fixed random number.
        rounds: how many; without it as many as fit into ``seconds``, 6 at least.
        seconds: about how long the rounds take.
        names: what the models are called in the result.

    Raises:
        ValueError: arguments that do not fit, outputs of different structures or shapes, two of one name, a model that
            changes its inputs, or no output that needs a gradient.
        RuntimeError: a model that fails in a later round.
    """
    require(
        rounds is None or rounds > 0, lambda: f"rounds: expected 1 or more, got {rounds}; leave it out to use seconds"
    )
    require(len(set(names)) == len(names) == 2, lambda: f"names: expected two different ones, got {names}")
    args, kwargs = _arguments(batch)
    inputs = named_tensors(kwargs or args, strict=False)
    a, b = (
        ComparedModel(name, model, args, kwargs, inputs, loss)
        for name, model in zip(names, (model_a, model_b), strict=True)
    )
    _device(a.devices | b.devices)  # refused before anything runs
    with unchanged(a, b):
        outputs, gradients, not_compared = _differences(a, b, backward)
        device = _device(a.devices | b.devices)  # those of outputs are known now
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            memory = _memory(a, b, backward, device)
            times = _times(a, b, backward, device, rounds, seconds)
    return Comparison(names, device, torch.get_num_threads(), times, memory, outputs, gradients, not_compared)


def _arguments(batch: object) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, tuple | Tensor):
        return (batch,) if isinstance(batch, Tensor) else batch, {}
    raise ValueError(
        f"batch: expected a tensor, a tuple of arguments or a mapping of keyword arguments, got {describe(batch)}"
    )


def _differences(
    a: ComparedModel, b: ComparedModel, backward: bool
) -> tuple[dict[str, Difference], dict[str, Difference], tuple[str, ...]]:
    """Differences of outputs and of gradients, and which gradients are not in both; one graph lives at a time."""
    with unchanged(a, b):
        output, expected = a.first_run(backward)
        gradients = a.gradients(output) if backward else []
    output, found = b.first_run(backward)
    outputs = output_differences(expected, found, (a.name, b.name))
    others = b.gradients(output) if backward else []
    if alone := sorted(set(a.cotangents) ^ set(b.cotangents)):
        raise ValueError(
            f"{', '.join(alone)}: expected an output that needs a gradient in both models, got one that does in one; "
            "give a loss, or compare functions that leave it out"
        )
    return outputs, *gradient_differences(gradients, others, (a.name, b.name))


def _device(devices: set[torch.device]) -> torch.device:
    found = {device for device in devices if device.type != "cpu"}
    if len(found) > 1 or any(device.type != "cuda" for device in found):
        listed = ", ".join(sorted(map(str, found)))
        raise ValueError(f"expected models on a CPU or on one CUDA device, got {listed}; move both to one")
    return found.pop() if found else torch.device("cpu")


def _memory(a: ComparedModel, b: ComparedModel, backward: bool, device: torch.device) -> dict[str, tuple[int, int]]:
    """Bytes by measure, when both models have run."""
    found = {}
    if device.type == "cuda":
        for model in (a, b):
            model.forward()  # compiles what nothing has run yet
        found[f"peak, {FORWARD}"] = (peak_bytes(a.forward, device), peak_bytes(b.forward, device))
        if backward:
            found[f"peak, {BOTH}"] = (peak_bytes(a.both, device), peak_bytes(b.both, device))
    if backward:
        found["saved for backward"] = (saved_bytes(a.run, a.parameters), saved_bytes(b.run, b.parameters))
    return found


def _times(
    a: ComparedModel, b: ComparedModel, backward: bool, device: torch.device, rounds: int | None, seconds: float
) -> dict[str, tuple[Timing, Timing]]:
    """Both models' times by mode."""
    modes = (FORWARD, BOTH) if backward else (FORWARD,)
    calls = {(m.name, mode): m.forward if mode == FORWARD else m.both for m in (a, b) for mode in modes}
    for call in calls.values():
        call()  # what compiles does so before the seconds begin
    timings, errors = interleaved(
        calls, clock_for(device), rounds=rounds or MOST_ROUNDS, seconds_each=math.inf, least=LEAST_ROUNDS,
        seconds=math.inf if rounds else seconds,
    )  # fmt: skip
    for (name, mode), error in errors.items():
        raise RuntimeError(f"{name}, {mode}: {error}")
    if any(0 in timing.cpu for timing in timings.values()):
        for timing in timings.values():
            timing.cpu.clear()  # the clock of the process is too coarse here, as on Windows: no ratio
    return {mode: (timings[a.name, mode], timings[b.name, mode]) for mode in modes}
