"""How `make gpu`'s stages share a deadline, on a clock that is made up."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field

import pytest

from onepeace_fast.kernels.measured import MeasuredGPU
from tools.gpu_run import __main__ as command
from tools.gpu_run import proposal, schedule
from tools.gpu_run.processes import CUT, FAILED, PASSED, UNAVAILABLE, Job, Outcome
from tools.gpu_run.records import Files, outcomes_of
from tools.gpu_run.schedule import LEFT_OUT, Result, Stage, State, run_stages


@dataclass
class MadeUp:
    """A clock and what jobs take on it; a job that would take longer than it may is cut short."""

    takes: dict[str, float] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    lost: str = ""  # a job
    time: float = 1000.0
    ran: list[tuple[str, float]] = field(default_factory=list)
    began: list[tuple[str, float]] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def execute(self, jobs, seconds, keep) -> list[Outcome]:
        outcomes, longest = [], 0.0
        for job in jobs:
            needs = self.takes.get(job.name, 1.0)
            longest = max(longest, min(needs, seconds))
            state = self.states.get(job.name, PASSED) if needs <= seconds else CUT
            lost = job.name == self.lost
            outcomes.append(Outcome(job.name, state, min(needs, seconds), needed=job.needed, ends_run=lost))
            self.ran.append((job.name, seconds))
        self.time += longest
        return outcomes

    def run(self, stages, seconds: float) -> State:
        began = lambda stage, share: self.began.append((stage.name, share))  # noqa: E731
        return run_stages(stages, seconds, self.execute, self.now, began, lambda stage, state: None, State())


def stage(name: str, weight: float = 1.0, *jobs: Job, **how) -> Stage:
    return Stage(name, weight, "", [lambda _: jobs or [job(name)]], **how)


def job(name: str, **how) -> Job:
    return Job(name, lambda seconds: ["none"], **how)


def states(state: State) -> dict[str, str]:
    return {result.name: result.state for result in state.results}


def test_each_stage_has_its_share_of_what_is_left_and_leaves_the_rest_to_later_ones():
    made_up = MadeUp({"a": 10.0, "b": 500.0})
    state = made_up.run([stage("a", 1), stage("b", 1), stage("c", 2)], 100.0)
    assert made_up.began == [("a", 25.0), ("b", 30.0), ("c", 60.0)]
    assert states(state) == {"a": PASSED, "b": CUT, "c": PASSED}
    assert [result.seconds for result in state.results] == [10.0, 30.0, 1.0]
    assert made_up.time == 1041.0 and "at the end of its share" in state.results[1].note


def test_no_stage_runs_past_the_deadline_and_those_it_leaves_out_say_so():
    made_up = MadeUp({name: 500.0 for name in "abc"})
    state = made_up.run([stage("a", 1), stage("b", 99), stage("c", 1)], 40.0)
    assert made_up.time <= 1040.0 and states(state) == {"a": CUT, "b": CUT, "c": LEFT_OUT}
    assert state.results[2].note == "the deadline left no time for it"
    assert [name for name, _ in made_up.began] == ["a", "b"]


def test_phases_of_a_stage_share_its_time():
    made_up = MadeUp({"first": 20.0})
    phases = [lambda _: [job("first"), job("beside")], lambda _: [job("second")]]
    made_up.run([Stage("a", 1, "", phases), stage("b", 1)], 100.0)
    assert made_up.ran == [("first", 50.0), ("beside", 50.0), ("second", 30.0), ("b", 79.0)]


def test_a_failure_keeps_nothing_from_running_but_a_lost_device():
    failing = {"a": FAILED, "smoke": FAILED}
    stages = [stage("a"), stage("b"), stage("smoke", 1, job("smoke"), job("other")), stage("c"), stage("d")]
    state = MadeUp(states=failing).run(stages, 100.0)
    assert states(state) == {"a": FAILED, "b": PASSED, "smoke": FAILED, "c": PASSED, "d": PASSED}
    assert state.results[2].note == "1 of 2 jobs"
    state = MadeUp(states=failing, lost="smoke").run(stages, 100.0)
    assert states(state) == {"a": FAILED, "b": PASSED, "smoke": FAILED, "c": LEFT_OUT, "d": LEFT_OUT}
    assert [result.note for result in state.results[3:]] == ["smoke lost the device"] * 2
    cut = MadeUp({"smoke": 500.0}).run(stages, 100.0)
    assert states(cut) == {"a": PASSED, "b": PASSED, "smoke": CUT, "c": PASSED, "d": PASSED}


def test_without_what_is_needed_nothing_follows():
    later = []
    phases = [lambda _: [job("install", needed=True)], lambda _: later.append(1) or []]
    state = MadeUp(states={"install": FAILED}).run([Stage("build", 1, "", phases), stage("a")], 100.0)
    assert states(state) == {"build": FAILED, "a": LEFT_OUT} and not later
    assert state.results[1].note == "install has not passed"


def test_what_this_machine_cannot_do_is_no_failure():
    made_up = MadeUp(states={"a": UNAVAILABLE, "x": UNAVAILABLE})
    state = made_up.run([stage("a"), stage("b", 1, job("x"), job("y"))], 100.0)
    assert states(state) == {"a": UNAVAILABLE, "b": PASSED}


def test_a_check_finds_what_no_exit_code_says():
    state = MadeUp().run([stage("a", check=lambda _: "nobody looked")], 100.0)
    assert (state.results[0].state, state.results[0].note) == (FAILED, "nobody looked")
    told = []
    MadeUp({"a": 500.0}).run([stage("a", check=told.append)], 100.0)
    MadeUp().run([stage("a", check=told.append)], 100.0)
    assert told == [True, False]


def lines(path, *records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_stage_s_tests_are_read_from_what_they_left_and_one_that_never_ended_was_cut_short(tmp_path):
    passed = {"test": "a.py::one", "outcome": "passed", "seconds": 0.1}
    failed = {"test": "a.py::two", "outcome": "failed", "seconds": 0.2, "message": "E", "text": "E <\x1b[1m>"}
    lines(tmp_path / "tests-a.jsonl", {"test": "a.py::one", "began": True}, passed, failed, {**failed, "outcome": "x"})
    lines(tmp_path / "tests-b.jsonl", {"test": "b.py::three", "began": True})
    with (tmp_path / "tests-b.jsonl").open("a") as file:
        file.write('{"test": "b.py::cut')
    lines(
        tmp_path / "parity-all.jsonl", {"test": "c.py::four", "outcome": "skipped", "seconds": 0, "message": "no GPU"}
    )
    found = {test["test"]: test["outcome"] for test in outcomes_of(tmp_path, "tests")}
    assert found == {"a.py::one": "passed", "a.py::two": "failed", "b.py::three": "cut short"}

    files = Files(tmp_path / "out", "now", tmp_path, ["parity", "tests"], {"date": "now"})
    results = [
        Result("parity", PASSED),
        Result("tests", FAILED, "1 of 1 jobs", 3.0, 9.0, [Outcome("all", FAILED, 3.0)]),
    ]
    files.write(State(results), 12.0)
    stages = {one["name"]: one for one in json.loads(files.json.read_text())["stages"]}
    assert stages["tests"]["tests"] == {
        "passed": 1, "failed": 1, "skipped": 0, "cut short": 1, "failures": ["a.py::two: E"],
    }  # fmt: skip
    assert stages["tests"]["jobs"] == [{"name": "all", "state": FAILED, "seconds": 3.0, "note": ""}]
    text = files.markdown.read_text()
    assert (
        "| tests | failed | 3 | 9 | 1 passed, 1 failed, 1 cut short | 1 of 1 jobs |" in text
        and "- `a.py::two`: E" in text
    )
    suites = ElementTree.parse(files.xml).getroot()
    assert [(suite.get("name"), suite.get("tests"), suite.get("failures")) for suite in suites] == [
        ("parity", "1", "0"), ("tests", "3", "1")
    ]  # fmt: skip
    (failure,) = suites.findall("testsuite/testcase[@name='two']/failure")
    assert failure.text == "E <?[1m>"
    assert len(list((tmp_path / "out").iterdir())) == 3


def sections(**times) -> dict:
    """Sections of routed FFNs: rows and each strategy's time, forward and backward."""
    return {
        name: {
            "kind": "ffn", "rows": rows,
            "variants": {f"strategy_{s}": {"forward_backward": {"median_ms": t}} for s, t in by_strategy.items()},
        }
        for name, (rows, by_strategy) in times.items()
    }  # fmt: skip


def test_the_faster_strategy_by_rows_is_proposed():
    measured = sections(
        d=(32768, {"grouped": 1.0, "other": 2.0}), a=(256, {"grouped": 3.0, "other": 1.0}),
        b=(1024, {"grouped": 2.0, "other": 1.0}), c=(4096, {"grouped": 1.0, "other": 1.1}),
        alone=(64, {"grouped": 1.0}),
    )  # fmt: skip
    measured["elsewhere"] = {**measured["a"], "kind": "layer", "rows": 1}
    times = proposal.times_by_rows(measured)
    assert list(times) == [256, 1024, 4096, 32768]
    expected = [{"rows": 2048, "strategy": "other"}, {"rows": None, "strategy": "grouped"}]
    assert proposal.strategy_classes(times) == expected
    assert proposal.strategy_classes({}) == []


def test_the_proposal_says_what_was_measured_where(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(proposal.cuda_extension, "unavailable_reason", lambda: None)
    results = tmp_path / "gpu.json"
    machine = {"gpu": "NVIDIA H200", "capability": "9.0", "versions": {"torch": "2.11"}}
    measured = sections(a=(256, {"grouped": 3.0, "per_modality": 1.0}))
    results.write_text(json.dumps({"date": "now", "machine": machine, "sections": measured}))
    assert proposal.main([str(results), str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    by_rows = {"routed_ffn": [{"rows": None, "strategy": "per_modality"}]}
    expected = MeasuredGPU("NVIDIA H200", "sm_90", {"torch": "2.11"}, "now", True, by_rows, {})
    assert MeasuredGPU.from_json(path.read_text()) == expected
    path.unlink()
    results.write_text(json.dumps({"date": "now", "machine": machine, "sections": {}}))
    assert proposal.main([str(results), str(tmp_path / "out")]) == proposal.NOTHING
    assert "no two strategies" in capsys.readouterr().out and not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(proposal.cuda_extension, "unavailable_reason", lambda: "it was not built")
    results.write_text(json.dumps({"date": "now", "machine": machine, "sections": measured}))
    assert proposal.main([str(results), str(tmp_path / "out")]) == proposal.NOTHING
    assert "it was not built" in capsys.readouterr().out and not list((tmp_path / "out").iterdir())


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        """Run the command with a plan of these stages; results into tmp_path / "out"."""
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        monkeypatch.setattr(schedule, "LEAST_SECONDS", 0.0)
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)

        def start(stages, *arguments) -> int:
            monkeypatch.setattr(command.plan, "stages", lambda machine: stages)
            return command.main(list(arguments))

        return start

    def stage(self, name: str, code: str = "print('fine')", **how) -> Stage:
        return stage(name, 1, Job(name, lambda _: [sys.executable, "-c", code]), **how)

    def test_the_exit_code_and_the_last_lines_say_what_failed_and_what_is_left(self, run, capsys, tmp_path):
        stages = [self.stage("a"), self.stage("b", "print('a reason'); raise SystemExit(7)"), self.stage("c")]
        assert run(stages) == 1
        assert len(list((tmp_path / "out").iterdir())) == 4  # with two of the benchmark and a proposal, at most 8
        said = capsys.readouterr().out
        assert "==> b failed after" in said and "        a reason" in said and "\nc " in said
        assert run([self.stage("a"), self.stage("c")]) == 0
        assert run([self.stage("a"), self.stage("slow", "import time; time.sleep(60)")], "--minutes", "0.01") == 0
        said = capsys.readouterr().out
        assert "Not everything has run: " in said and "--stages " in said
        files = {path.name.split("_")[0] for path in (tmp_path / "out").iterdir()}
        assert files == {"run", "tests", "log"}
        assert any("[b] a reason" in path.read_text() for path in (tmp_path / "out").glob("log_*"))

    @pytest.mark.parametrize("code, after", [(1, "passed"), (33, "left out")])
    def test_a_fault_in_smoke_prints_how_to_look_closer(self, run, capsys, code, after):
        check = Job("attention_72", lambda _: [sys.executable, "-c", f"exit({code})"], ends_run=lambda code: code == 33)
        assert run([stage("smoke", 1, check), self.stage("c")]) == 1
        said = capsys.readouterr().out
        assert "CUDA_LAUNCH_BLOCKING=1" in said and "compute-sanitizer" in said and "smoke attention_72" in said
        assert f"==> c {after}" in said and "\nFAILED: smoke\n" in said

    def test_stages_are_chosen_in_their_order_and_unknown_ones_are_refused(self, run, capsys):
        stages = [self.stage(name) for name in "abc"]
        assert run(stages, "--stages", "c,a") == 0
        said = capsys.readouterr().out
        assert said.index("==> a passed") < said.index("==> c passed") and "==> b" not in said
        with pytest.raises(SystemExit) as stopped:
            run(stages, "--stages", "a,d")
        assert stopped.value.code == 2 and "expected some of a,b,c, got d" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            run(stages, "--minutes", "0")
        assert "expected a positive number, got 0" in capsys.readouterr().err

    def test_the_list_runs_nothing(self, run, capsys, tmp_path):
        assert run([Stage("a", 1, "what it shows", [])], "--list") == 0
        assert capsys.readouterr().out == "a           what it shows\n" and not (tmp_path / "out").exists()
