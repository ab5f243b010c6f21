"""Running variants of one piece of work against each other, so that a failing one stops no other."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.checked import Values, Wrong, check, exactly, values, wide_dtype
from benchmarks.support.memory import peak_of
from onepeace_fast.timing import DeviceLost, HostClock, Timing, interleaved, interval, recovered

OURS = "fused"  # what every section calls this library's way
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
MODES = ("forward", "forward_backward")
PASSES = ("forward", "backward", "forward_backward")  # backward is never timed alone, see Runner.measure
HOW_FUSED_RUNS = (
    "on a GPU Triton kernels between the vendor's products, attention's forward and backward pass by the CUDA extension"
    " where it is there and takes the tensors, else by PyTorch's attention and the reference; else eager"
)
FIRST_COMPILE_SECONDS = 20.0  # what a variant that was never compiled is taken to need


@dataclass
class Variant:
    """One way to do the work. Both calls take the number of a round, by which they choose among the input sets.

    ``rows`` brings the output of ``forward`` into packed order, to compare it with the other variants' outputs, and
    ``gradient_rows`` each of the first ``gradients_compared`` gradients of ``forward_backward``, those of the tokens.
    Behind the gradients of its ``inputs`` are those of parameters, which ``parameter_gradients`` brings into the base's
    order. All are held against the variant named ``against``, by default the base, and its ``exact`` output and
    gradients of set 0, and rows also by ``slices``. A call does the work ``repeats`` times, and a time is what one of
    them takes. ``sets`` is the number of input sets; without a ``forward_backward`` there is no backward pass.
    """

    forward: Callable[[int], Any]
    forward_backward: Callable[[int], Any] | None
    rows: Callable[[Tensor], Tensor] | None = None
    gradient_rows: Callable[[Tensor], Tensor] | None = None
    parameter_gradients: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None
    exact: Callable[[], tuple[Any, Sequence[Tensor]]] | None = None
    slices: Sequence[Any] = ()
    inputs: int = 0
    sets: int = 1
    gradients_compared: int = 1
    against: str = ""
    repeats: int = 1
    compiled: bool = False
    note: str = ""


Factory = Callable[[], Variant]


class LeftOut(Exception):
    """A factory's reason why its variant does not run on this machine."""


def trained(
    function: Callable[..., Tensor],
    sets: Sequence[tuple[Tensor, ...]],
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    **attributes: Any,
) -> Variant:
    """A variant of a differentiable function: ``sets`` are its arguments in turn, ``gradients`` those of its output.

    The forward pass alone is that of training: it keeps what the backward pass needs.
    """

    needed = [argument for argument in sets[0] if isinstance(argument, Tensor) and argument.requires_grad]
    attributes.setdefault("parameter_gradients", (lambda found: found) if parameters else None)
    attributes.setdefault("inputs", len(needed))

    def exact() -> tuple[Any, Sequence[Tensor]]:
        return exactly(function, sets[0], gradients[0], parameters, wide_dtype(needed[0].device))

    def forward(index: int) -> Tensor:
        return function(*sets[index % len(sets)])

    def forward_backward(index: int) -> tuple[Tensor, ...]:
        arguments = sets[index % len(sets)]
        needed = [argument for argument in arguments if argument.requires_grad]
        return torch.autograd.grad(function(*arguments), [*needed, *parameters], gradients[index % len(sets)])

    return Variant(forward, forward_backward, exact=exact, sets=len(sets), **attributes)


def compiled(variant: Factory) -> Factory:
    """Mark what a factory makes as compiled, so that its compilation is held against the time budget."""

    @functools.wraps(variant)
    def build() -> Variant:
        made = variant()
        made.compiled = True
        return made

    build.is_compiled = True
    return build


class Budget:
    """The time that a whole run may take, which its sections share out among themselves as they come."""

    def __init__(self, seconds: float, no_compile: str | None = None) -> None:
        self.stop = time.perf_counter() + seconds
        self.no_compile = no_compile
        self.compile_seconds: dict[str, float] = {}
        self.sections_left = 1  # the one that runs and those that follow
        self.seconds = seconds
        self.compiling_is_free = False  # where every section has a time of its own, after what it compiles

    @property
    def seconds_left(self) -> float:
        """What is left for the whole run."""
        return self.stop - time.perf_counter()

    def timing_seconds(self) -> float:
        """How long this section may measure; asked after compiling, which no section's share contains."""
        return self.seconds if self.compiling_is_free else max(self.seconds_left, 0.0) / self.sections_left

    def refusal(self, name: str, is_compiled: bool) -> str | None:
        """Why a variant must be left out, or None; it is taken to compile as long as it did for the last shape."""
        if self.compiling_is_free:
            return None
        if self.seconds_left < 0:
            return "left out: the time budget was used up"
        if is_compiled and self.no_compile:
            return self.no_compile
        expected = self.compile_seconds.get(name, FIRST_COMPILE_SECONDS)
        if is_compiled and expected > self.seconds_left:
            return f"left out: compiling may take {expected:.0f} s, more than is left of the time budget"
        return None


@dataclass
class Runner:
    """Measures variants: builds, warms and compiles each, checks what it computes, then times all in turn.

    ``faulted`` are variants that are not run and why: what an earlier process died of; ``starting`` is told the name
    of each before its first run, and an empty one before times are taken; ``watching`` what was timed so far, after
    each round. With ``memory`` the peak of each pass is taken too. ``timings`` are those of the last section.
    """

    clock: HostClock
    budget: Budget
    rounds: int
    faulted: Mapping[str, str] = field(default_factory=dict)
    starting: Callable[[str], None] = lambda name: None
    watching: Callable[[Mapping[tuple[str, str], Timing]], None] | None = None
    memory: bool = True
    timings: dict[tuple[str, str], Timing] = field(default_factory=dict)

    def measure(self, factories: Mapping[str, Factory], base: str | None = None) -> dict[str, dict[str, Any]]:
        """The record of every variant: its times by mode, or ``wrong`` or an ``error``, or why it was ``skipped``.

        ``backward`` is, round by round, the time of both passes less that of the forward pass, over the same inputs: in
        training the caches hold what the forward pass left there. A median that is not positive is noise, left out.

        A variant whose output or gradients break the tolerance rule, beside ``base`` and its exact values, is wrong and
        gets no time.

        Raises:
            DeviceLost: with the variant's name, where only a new process can go on.
        """
        records: dict[str, dict[str, Any]] = {name: {} for name in factories}
        variants: dict[str, Variant] = {}
        expected: dict[str, tuple[Values, Values, Sequence[Any]]] = {}
        for name in sorted(factories, key=lambda name: name != base):  # the base first, else in order
            record = records[name]
            if name in self.faulted:
                record["error"] = self.faulted[name]
                continue
            if reason := self.budget.refusal(name, getattr(factories[name], "is_compiled", False)):
                record["skipped"] = reason
                continue
            self.starting(name)
            try:
                variant = factories[name]()
                found = self._first_run(name, variant, record)
                against = variant.against or base or ""
                if name == against and variant.exact is not None:
                    expected[name] = found, values(variant, *variant.exact()), variant.slices
                if found and against in expected:
                    record["checked"] = check(found, *expected[against])
                if self.memory:
                    record["peak_bytes"] = {mode: peak_of(lambda call=call: call(0)) for mode, call in _calls(variant)}
            except Wrong as difference:
                record["wrong"] = str(difference)
                continue
            except ModuleNotFoundError as error:
                record["skipped"] = f"left out: {error.name} is not installed"
                continue
            except LeftOut as reason:
                record["skipped"] = f"left out: {reason}"
                continue
            except Exception as error:
                record["error"] = recovered(self.clock, name, error)
                continue
            if variant.note:
                record["note"] = variant.note
            variants[name] = variant
        calls = {(name, mode): call for name, variant in variants.items() for mode, call in _calls(variant)}
        self.starting("")
        timings, errors = self._timed(calls, variants)
        for (name, _), timing in timings.items():
            timing.seconds = [seconds / variants[name].repeats for seconds in timing.seconds]
            timing.cpu = [seconds / variants[name].repeats for seconds in timing.cpu]
        for name in variants:
            forward, both = (timings.get((name, mode), Timing()) for mode in MODES)
            timings[name, "backward"] = Timing(_less(both.seconds, forward.seconds), [], _less(both.cpu, forward.cpu))
        for (name, mode), timing in timings.items():
            if timing.seconds and (mode != "backward" or timing.median > 0):
                records[name][mode] = timing.record()
        for (name, mode), error in errors.items():
            records[name]["error"] = f"{mode}: {error}"
        _beside_ours(records, timings)
        self.timings = timings
        return records

    def _timed(self, calls: Mapping[tuple[str, str], Callable[[int], Any]], variants: Mapping[str, Variant]) -> Any:
        """Times and errors by variant and mode; a fault of the device is the variant's."""
        try:
            short = {key: self._shortened(key, call, variants[key[0]].sets) for key, call in calls.items()}
            return interleaved(
                short, self.clock, rounds=self.rounds, seconds=self.budget.timing_seconds(), after_round=self.watching
            )
        except DeviceLost as lost:
            (name, mode), line = lost.args
            raise DeviceLost(name, f"{mode}: {line}") from lost

    def _shortened(self, key: tuple[str, str], call: Callable[[int], Any], sets: int) -> Callable[[int], Any]:
        """The call as a graph where it is short; one that fails meanwhile does so again in turn, and is noted there."""
        try:
            return self.clock.shortened(call, sets)
        except Exception as error:
            recovered(self.clock, key, error)
            return call

    def _first_run(self, name: str, variant: Variant, record: dict[str, Any]) -> Values:
        """Run both modes once, which compiles what must be compiled; returns what can be compared, in packed order."""
        start = time.perf_counter()
        found = values(variant, variant.forward(0), ())
        if variant.forward_backward is not None:
            gradients = variant.forward_backward(0)
            found |= values(variant, None, gradients if isinstance(gradients, tuple) else ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if variant.compiled:
            record["compile_seconds"] = round(time.perf_counter() - start, 2)
            self.budget.compile_seconds[name] = record["compile_seconds"]
        return found


def _calls(variant: Variant) -> list[tuple[str, Callable[[int], Any]]]:
    """What a variant runs, by mode."""
    return [(mode, call) for mode in MODES if (call := getattr(variant, mode)) is not None]


def _less(both: Sequence[float], forward: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip(forward, both, strict=False)]


def _beside_ours(records: Mapping[str, dict[str, Any]], timings: Mapping[tuple[str, str], Timing]) -> None:
    """Add to every record its time over ours, round by round: the median inside its 95% interval."""
    for (name, mode), timing in timings.items():
        ours = timings.get((OURS, mode))
        if name == OURS or ours is None or mode not in records[name] or mode not in records[OURS]:
            continue
        a, b = (one.cpu or one.seconds for one in (timing, ours))
        rounds = [(one, other) for one, other in zip(a, b, strict=False) if other > 0]
        if rounds:
            records[name].setdefault("over_ours", {})[mode] = list(interval(*zip(*rounds, strict=True)))
