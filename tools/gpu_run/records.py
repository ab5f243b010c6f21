"""What a run leaves behind: its stages and tests as JSON, Markdown and JUnit XML, each whole at any moment."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.report import markdown, write_json, write_text
from tools.gpu_run.plugin import read_records
from tools.gpu_run.processes import CUT, FAILED
from tools.gpu_run.schedule import Result, State

CUT_OFF = {"outcome": "cut short", "seconds": 0.0, "message": "the time was over", "text": ""}
MOST_FAILURES = 2000  # of those that are told with their text


def outcomes_of(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The tests of a stage with their outcomes, each once; one that began and has none was cut short."""
    tests: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{stage}*.jsonl")):
        for record in read_records(path):
            name = record["test"]
            if "outcome" not in record:
                tests.setdefault(name, {"test": name})
            elif tests.get(name, {}).get("outcome") != "failed":  # a failure stays one, whatever its teardown says
                tests[name] = record
    return [{**CUT_OFF, **test} for test in tests.values()]


class Files:
    """The run's own files in the folder of results; each is replaced in one step."""

    def __init__(self, out: Path, date: str, tests: Path, stages: Sequence[str], described: dict[str, Any]) -> None:
        self.json, self.markdown, self.xml = (
            out / f"{name}_{date}.{kind}" for name, kind in (("run", "json"), ("run", "md"), ("tests", "xml"))
        )
        self.tests, self.stages, self.described = tests, stages, described

    def write(self, state: State, seconds: float) -> None:
        """Write them anew."""
        found = {name: outcomes_of(self.tests, name) for name in self.stages}
        write_json(self.json, self._content(state, found, seconds))
        write_text(self.markdown, self._document(state, found))
        write_text(self.xml, junit({name: tests for name, tests in found.items() if tests}))

    def _content(self, state: State, found: dict[str, Any], seconds: float) -> dict[str, Any]:
        stages = []
        for result in state.results:
            stages.append(result.record())
            if tests := found[result.name]:
                failures = [f"{test['test']}: {test['message']}" for test in tests if test["outcome"] == "failed"]
                stages[-1]["tests"] = {**counted(tests), "failures": failures}
        return {**self.described, "seconds": round(seconds, 1), "stages": stages}

    def _document(self, state: State, found: dict[str, Any]) -> str:
        lines = ["# " + ", ".join(f"{name} {value}" for name, value in self.described.items()), ""]
        lines.append(markdown([STAGE_HEADS, *(stage_row(one, found[one.name]) for one in state.results)]))
        for result in state.results:
            failures = [f"- `{test['test']}`: {test['message']}" for test in found[result.name]
                        if test["outcome"] == "failed"]  # fmt: skip
            failures += [f"- {one.name}: {one.note}" for one in result.outcomes if one.state in (FAILED, CUT)]
            lines += ["", f"## {result.name}", "", *failures] if failures else []
        return "\n".join(lines) + "\n"


STAGE_HEADS = ("stage", "state", "seconds", "of at most", "tests", "note")


def stage_row(result: Result, tests: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A stage as a row of a table."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in counted(tests).items() if count) or "-"
    seconds = (f"{result.seconds:.0f}", f"{result.share_seconds:.0f}") if result.outcomes else ("-", "-")
    return result.name, result.state, *seconds, counts, result.note


def counted(tests: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    counts = Counter(test["outcome"] for test in tests)
    return {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped", "cut short")}


def junit(found: dict[str, list[dict[str, Any]]]) -> str:
    """A JUnit report with a suite for each stage."""
    root, told = ElementTree.Element("testsuites"), 0
    for stage, tests in found.items():
        counts = counted(tests)
        suite = ElementTree.SubElement(
            root, "testsuite", name=stage, tests=str(len(tests)), failures=str(counts["failed"]),
            skipped=str(counts["skipped"] + counts["cut short"]),
        )  # fmt: skip
        for test in tests:
            file, _, name = test["test"].partition("::")
            case = ElementTree.SubElement(
                suite, "testcase", classname=file, name=name or file, time=f"{test['seconds']:.3f}"
            )
            if test["outcome"] == "failed":
                told += 1
                failure = ElementTree.SubElement(case, "failure", message=_printable(test["message"]))
                failure.text = _printable(test["text"]) if told <= MOST_FAILURES else ""
            elif test["outcome"] != "passed":
                ElementTree.SubElement(case, "skipped", message=_printable(test["message"]))
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """A text without what XML cannot hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
