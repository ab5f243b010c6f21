"""Running variants of one piece of work against each other, so that a failing one stops no other."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.timing import DeviceLost, HostClock, Timing, interleaved, recovered

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
    They are compared with the variant named ``against``, by default with the base. A call does the work ``repeats``
    times, and a time is what one of them takes.
    """

    forward: Callable[[int], Any]
    forward_backward: Callable[[int], Any]
    rows: Callable[[Tensor], Tensor] | None = None
    gradient_rows: Callable[[Tensor], Tensor] | None = None
    gradients_compared: int = 1
    against: str = ""
    timed: bool = True
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

    def forward(index: int) -> Tensor:
        return function(*sets[index % len(sets)])

    def forward_backward(index: int) -> tuple[Tensor, ...]:
        arguments = sets[index % len(sets)]
        needed = [argument for argument in arguments if argument.requires_grad]
        return torch.autograd.grad(function(*arguments), [*needed, *parameters], gradients[index % len(sets)])

    return Variant(forward, forward_backward, **attributes)


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

    @property
    def seconds_left(self) -> float:
        """What is left for the whole run."""
        return self.stop - time.perf_counter()

    def timing_seconds(self) -> float:
        """How long this section may measure; asked after compiling, which no section's share contains."""
        return max(self.seconds_left, 0.0) / self.sections_left

    def refusal(self, name: str, is_compiled: bool) -> str | None:
        """Why a variant must be left out, or None; it is taken to compile as long as it did for the last shape."""
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
    """Measures variants: builds, warms and compiles each, compares their outputs, then times them in turn.

    ``faulted`` are variants that are not run and why: what an earlier process died of; ``starting`` is told the name
    of each before its first run, and an empty one before times are taken.
    """

    clock: HostClock
    budget: Budget
    rounds: int
    tolerance: float
    faulted: Mapping[str, str] = field(default_factory=dict)
    starting: Callable[[str], None] = lambda name: None

    def measure(self, factories: Mapping[str, Factory], base: str | None = None) -> dict[str, dict[str, Any]]:
        """The record of every variant: its times by mode, or an ``error``, or why it was ``skipped``.

        ``backward`` is, round by round, the time of both passes less that of the forward pass, over the same inputs: in
        training the caches hold what the forward pass left there. A median that is not positive is noise, left out.

        Raises ``DeviceLost``, with the variant's name, where only a new process can go on.

        A variant whose output or gradient of the tokens differs from that of ``base`` by more than the tolerance is an
        error, not a time.
        """
        records: dict[str, dict[str, Any]] = {name: {} for name in factories}
        variants: dict[str, Variant] = {}
        expected: dict[str, dict[str, Tensor]] = {}
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
                against = variant.against or base
                if name == against:
                    expected[name] = found
                else:
                    self._compare(found, expected.get(against, {}), record)
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
        calls = {
            (name, mode): getattr(variant, mode)
            for name, variant in variants.items()
            if variant.timed
            for mode in MODES
        }  # fmt: skip
        self.starting("")
        timings, errors = self._timed(calls)
        for (name, mode), timing in timings.items():
            timing.seconds = [seconds / variants[name].repeats for seconds in timing.seconds]
            records[name][mode] = timing.record()
        for name in variants:
            forward, both = (timings[name, mode].seconds if (name, mode) in timings else [] for mode in MODES)
            backward = Timing([after - before for before, after in zip(forward, both, strict=False)])
            if backward.seconds and (record := backward.record())["median_ms"] > 0:
                records[name]["backward"] = record
        for (name, mode), error in errors.items():
            records[name]["error"] = f"{mode}: {error}"
        return records

    def _timed(self, calls: Mapping[tuple[str, str], Callable[[int], Any]]) -> Any:
        """Times and errors by variant and mode; a fault of the device is the variant's."""
        try:
            return interleaved(calls, self.clock, rounds=self.rounds, seconds=self.budget.timing_seconds())
        except DeviceLost as lost:
            (name, mode), line = lost.args
            raise DeviceLost(name, f"{mode}: {line}") from lost

    def _first_run(self, name: str, variant: Variant, record: dict[str, Any]) -> dict[str, Tensor]:
        """Run both modes once, which compiles what must be compiled; returns what can be compared, in packed order."""
        start, found = time.perf_counter(), {}
        output = variant.forward(0)
        if variant.rows is not None:
            found["output"] = variant.rows(output).detach().float()
        del output
        gradients = variant.forward_backward(0)
        if variant.gradient_rows is not None:
            compared = gradients[: variant.gradients_compared]
            found["gradient"] = torch.cat([variant.gradient_rows(gradient) for gradient in compared]).float()
        del gradients
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if variant.compiled:
            record["compile_seconds"] = round(time.perf_counter() - start, 2)
            self.budget.compile_seconds[name] = record["compile_seconds"]
        return found

    def _compare(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        for what in (what for what in found if what in expected):
            difference = ((found[what] - expected[what]).norm() / expected[what].norm()).item()
            record[f"{what}_relative_difference"] = difference
            if not difference <= self.tolerance:
                raise AssertionError(
                    f"its {what} differs from the base's by {difference:.1e}, more than {self.tolerance}"
                )
