"""The replay of planted faults: its data fits the code, and only a compared value counts as a catch."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from tools import mutants

FAULTS = mutants.read_faults()


def test_each_fault_can_be_planted_and_names_tests_that_exist():
    assert len(FAULTS) >= 10 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert fault.problem() is None, f"{fault.name}: {fault.problem()}"
        assert fault.old != fault.new and fault.tests
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (mutants.ROOT / file).read_text(), test


def test_all_three_families_of_kernels_have_faults():
    assert {f"kernels/{name}.py" for name in ("layer_norm", "residual", "gated_sub_ln")} <= {f.file for f in FAULTS}


def test_a_text_that_is_not_there_exactly_once_cannot_be_planted(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\na = 1\nb = 2\n")
    problems = [
        mutants.Fault("name", file, old, "", ()).problem(tmp_path)
        for file, old in (("file.py", "b = 2"), ("file.py", "a = 1"), ("file.py", "c"), ("other.py", "b"))
    ]
    assert problems[0] is None
    assert "2 times" in problems[1] and "0 times" in problems[2] and "does not exist" in problems[3]


def report(inside: str) -> str:
    return f'<testsuites><testsuite><testcase name="test_it">{inside}</testcase></testsuite></testsuites>'


@pytest.mark.parametrize(
    "inside, word",
    [
        ("", "passed"),
        ('<failure message="AssertionError: x: maximum error 1">...</failure>', "caught"),
        ('<failure message="assert 1 == 2">...</failure>', "caught"),
        ('<failure message="triton.runtime.errors.InterpreterError: ...">...</failure>', "broken"),
        ('<error message="collection failure">...</error>', "broken"),
        ('<skipped message="no GPU"/>', "broken"),
    ],
)
def test_only_a_failed_assertion_catches_a_mutant(inside, word):
    assert mutants.judge(report(inside)).word == word


@pytest.mark.parametrize(
    "control, second, code", [("passed", "caught", 0), ("broken", "caught", 1), ("passed", "passed", 1)]
)
def test_a_survivor_or_a_failed_control_ends_with_code_1_and_one_summary_line(
    monkeypatch, capsys, control, second, code
):
    words = {FAULTS[0].name: "caught", FAULTS[1].name: second}
    monkeypatch.setattr(mutants, "control", lambda faults: mutants.Outcome(control))
    monkeypatch.setattr(mutants, "replay", lambda fault: mutants.Outcome(words[fault.name]))
    assert mutants.main(list(words)) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    caught, state = list(words.values()).count("caught"), "passed" if control == "passed" else "FAILED"
    assert lines[-1] == f"{caught} of 2 mutants caught; control {state}"


def test_a_name_that_is_none_is_refused(capsys):
    assert mutants.main(["no such fault"]) == 2
    assert "no such fault" in capsys.readouterr().out


def test_every_test_that_a_fault_names_is_run_by_make_test_or_make_test_all():
    named = {test for fault in FAULTS for test in fault.tests}
    files = sorted({test.partition("::")[0] for test in named})
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "not sweep and not gpu"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=mutants.ROOT, text=True, capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    collected = set(process.stdout.splitlines())
    collected |= {test.partition("[")[0] for test in collected}
    assert not named - collected, process.stdout[-2000:]


@pytest.mark.sweep
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts its own interpreter")
def test_every_planted_fault_is_caught(capsys):
    assert mutants.main([]) == 0, capsys.readouterr().out
