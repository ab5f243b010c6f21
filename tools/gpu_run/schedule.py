"""Stages: one after another, each with its share of what is left of the deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.gpu_run.processes import CUT, FAILED, PASSED, UNAVAILABLE, Job, Outcome

LEFT_OUT = "left out"
LEAST_SECONDS = 5.0  # less than this is no time for a stage
Keep = Callable[[Outcome], None]
Execute = Callable[[Sequence[Job], float, Keep], list[Outcome]]


@dataclass(frozen=True)
class Stage:
    """A stage: its jobs side by side, phase after phase; each phase is asked for its jobs when its time has come.

    ``weight`` over those of the stages still to come is its share. ``check`` says in one line what is wrong whatever
    the jobs say, or None; it is told whether one was cut short.
    """

    name: str
    weight: float
    shows: str
    phases: Sequence[Callable[[State], Sequence[Job]]]
    check: Callable[[bool], str | None] = lambda cut: None


@dataclass
class Result:
    """What became of a stage."""

    name: str
    state: str
    note: str = ""
    seconds: float = 0.0
    share_seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        jobs = [{"name": o.name, "state": o.state, "seconds": round(o.seconds, 1), "note": o.note}
                for o in self.outcomes]  # fmt: skip
        seconds = {"seconds": round(self.seconds, 1), "share_seconds": round(self.share_seconds, 1)}
        return {"name": self.name, "state": self.state, "note": self.note, **seconds, "jobs": jobs}


@dataclass
class State:
    """What later stages may ask about earlier ones."""

    results: list[Result] = field(default_factory=list)

    def passed(self, *names: str) -> bool:
        """Whether these stages all ran, and passed."""
        return set(names) <= {result.name for result in self.results if result.state == PASSED}


def run_stages(
    stages: Sequence[Stage], seconds: float, execute: Execute, now: Callable[[], float],
    began: Callable[[Stage, float], None], ended: Callable[[Stage, State], None], state: State,
) -> State:  # fmt: skip
    """Run stages within ``seconds`` in all; a stage that fails does not keep later ones from running; a job may.

    ``began`` is told a stage and its share in seconds, ``ended`` a stage and all results so far. ``state`` is what they
    and each job's outcome are added to as soon as they are known, and what is returned.
    """
    stop, obstacle = now() + seconds, ""
    for i, stage in enumerate(stages):
        start = now()
        left = stop - start
        share = left * stage.weight / sum(later.weight for later in stages[i:])
        if obstacle or left < LEAST_SECONDS:
            reason = obstacle or "the deadline left no time for it"
            state.results.append(Result(stage.name, LEFT_OUT, reason))
            ended(stage, state)
            continue
        began(stage, share)
        result = Result(stage.name, CUT, share_seconds=share)
        state.results.append(result)
        for phase in stage.phases:
            known, before = result.outcomes, len(result.outcomes)
            known[before:] = execute(phase(state), max(start + share - now(), 0.0), known.append)
            if needed := [outcome for outcome in result.outcomes if outcome.needed and outcome.state != PASSED]:
                obstacle = f"{needed[0].name} has not passed"
                break
        result.seconds = now() - start
        result.state, result.note = _verdict(stage, result.outcomes)
        if lost := [outcome.name for outcome in result.outcomes if outcome.ends_run]:
            obstacle = f"{lost[0]} lost the device"
        ended(stage, state)
    return state


def _verdict(stage: Stage, outcomes: Sequence[Outcome]) -> tuple[str, str]:
    states = [outcome.state for outcome in outcomes]
    if FAILED in states:
        return FAILED, f"{states.count(FAILED)} of {len(states)} jobs"
    if problem := stage.check(CUT in states):
        return FAILED, problem
    if CUT in states:
        return CUT, f"{states.count(CUT)} of {len(states)} jobs, at the end of its share"
    notes = "; ".join(dict.fromkeys(outcome.note for outcome in outcomes if outcome.state == UNAVAILABLE))
    return (PASSED if PASSED in states else UNAVAILABLE), notes
