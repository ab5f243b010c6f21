"""The replay of planted faults: its data fits the code, and only a compared value counts as a catch."""

import ast
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from tools.mutants import __main__ as command
from tools.mutants import fault as data
from tools.mutants import replay
from tools.mutants.source import is_python, named_parts, tokens

FAULTS = data.read_faults()
AREAS = {
    "kernels": ("kernels/", "onepeace_fast/hardware/", "onepeace_fast/backend.py"),  # and of the operations they are of
    "csrc": ("csrc/",),
    "ops": ("onepeace_fast/ops/",),
    "training": ("onepeace_fast/training/",),
    "data": ("onepeace_fast/data/",),
    "fusion": ("onepeace_fast/fusion/",),
    "pretrained": ("onepeace_fast/pretrained/",),
    "tools": ("tools/", "benchmarks/"),
    "models": ("onepeace_fast/",),  # what no area before it has
}


def planted(fault: data.Fault) -> str:
    """What the code of a file with the fault says, whatever it looks like."""
    text = fault.plant((data.ROOT / fault.file).read_text())
    return ast.dump(ast.parse(text)) if is_python(fault.file) else " ".join(t.text for t in tokens(text, fault.file))


def test_each_fault_can_be_planted_and_names_tests_that_exist():
    problems = [f"{fault.name}: {problem}" for fault in FAULTS if (problem := fault.problem()) is not None]
    assert len(FAULTS) >= 10 and not problems, "\n".join(problems)
    for fault in FAULTS:
        assert fault.tests
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (data.ROOT / file).read_text(), f"{fault.name}: {test}"


@pytest.mark.slow
def test_no_two_faults_share_a_name_or_plant_the_same_code_and_each_changes_the_code():
    names, codes = {}, {}
    for fault in FAULTS:
        assert names.setdefault(fault.name, fault) is fault, fault.name
        code = fault.file, planted(fault)
        assert codes.setdefault(code, fault.name) == fault.name, f"{fault.name} plants what {codes[code]} does"
        assert code[1] != planted(fault._replace(new=fault.old)), f"{fault.name} changes nothing"


def test_faults_stand_in_the_data_file_of_their_area():
    assert {path.stem for path in data.FAULTS.iterdir()} == set(AREAS)
    for area in AREAS:
        for fault in json.loads((data.FAULTS / f"{area}.json").read_text()):
            expected = next(other for other, places in AREAS.items() if fault["file"].startswith(places))
            assert area == expected or (expected, area) == ("ops", "kernels"), fault


def test_all_three_families_of_kernels_have_faults():
    assert {f"kernels/{name}.py" for name in ("layer_norm", "residual", "gated_sub_ln")} <= {f.file for f in FAULTS}


PYTHON = """
RATE = 0.5
class A:
    rate: float = 0.25  # half of it

    @property
    def b(self):
        return f(self.x, 1) + 1

    def c(self):
        def inner(x):
            return x + 1
        return inner(
            1,
        ) + 1
"""
CPP = """
namespace n {
constexpr int SIZE = 4;
#define TWICE(x) { x; x; }
template <int N = 2>
struct Box {
    int values[3] = {1, 2, 3};
    Box() : size(N) {}
    __device__ int first() const { if (size) { return values[0]; } return 0; }  // values[0]
};
template <> int size<2>() { return 2; }
__global__ void __launch_bounds__(SIZE) kernel(int* x) { x[0] = SIZE; }
}  // namespace n
"""


def test_functions_classes_and_constants_have_qualified_names():
    assert set(named_parts(PYTHON, "a.py")) == {"RATE", "A", "A.rate", "A.b", "A.c", "A.c.inner"}
    names = {"SIZE", "Box", "Box::values", "Box::Box", "Box::first", "size", "kernel"}
    parts = named_parts(CPP, "a.cuh")
    assert set(parts) == names
    assert CPP[slice(*parts["kernel"][0])].endswith("{ x[0] = SIZE; }")
    assert CPP[slice(*parts["Box::values"][0])].endswith("= {1, 2, 3};")


@pytest.mark.parametrize(
    "file, inside, old, occurrence, place",
    [
        ("a.py", "RATE", "0.5", None, "0.5\nclass"),
        ("a.py", "A.rate", "0.25", None, "0.25  # half"),
        ("a.py", "A.b", "f(self.x,\n  1,\n)+1", None, "f(self.x, 1) + 1"),
        ("a.py", "A.c", "inner(1)", None, "inner(\n            1,"),
        ("a.py", "A.c", "+ 1", 2, "+ 1\n"),
        ("a.cuh", "Box::first", "values[0]", None, "values[0]; } return"),
        ("a.cuh", "size", "2", 2, "2; }"),
    ],
)
def test_a_fragment_is_found_by_its_tokens_inside_a_function(file, inside, old, occurrence, place):
    text = PYTHON if file == "a.py" else CPP
    start, end = data.Fault("name", file, inside, old, "NEW", (), occurrence).find(text)
    assert text[start:].startswith(place)
    assert data.Fault("name", file, inside, old, "NEW", (), occurrence).plant(text) == text[:start] + "NEW" + text[end:]


@pytest.mark.parametrize(
    "file, inside, old, occurrence, problem",
    [
        ("a.py", "b", "1", None, "expected b of a.py, got A.b: say what it is called now"),
        ("a.py", "A.c", "+ 1", None, "expected '+ 1' once in A.c of a.py, got it 2 times"),
        ("a.py", "A.c", "2", None, "expected '2' once in A.c of a.py, got it 0 times"),
        ("a.py", "A.c", "+ 1", 3, "expected '+ 1' at least 3 times in A.c of a.py, got it 2 times"),
        ("a.py", "A.b", "", None, "expected '' once in A.b of a.py, got it 0 times"),
        ("b.py", "A.c", "1", None, "expected the file b.py, got none there"),
    ],
)
def test_what_cannot_be_planted_is_said_in_one_line(tmp_path, file, inside, old, occurrence, problem):
    (tmp_path / "a.py").write_text(PYTHON)
    assert data.Fault("name", file, inside, old, "", (), occurrence).problem(tmp_path) == problem


def test_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "ops.json").write_text('[{"name": "", "where": ""}]')
    with pytest.raises(ValueError, match=r"ops.json: expected the keys .*, got where"):
        data.read_faults(tmp_path)


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
    assert replay.judge(report(inside)).word == word


@pytest.mark.parametrize(
    "control, second, code", [("passed", "caught", 0), ("broken", "caught", 1), ("passed", "passed", 1)]
)
def test_a_survivor_or_a_failed_control_ends_with_code_1_and_one_summary_line(
    monkeypatch, capsys, control, second, code
):
    words = {FAULTS[0].name: "caught", FAULTS[1].name: second}
    monkeypatch.setattr(command, "control", lambda faults, cache: replay.Outcome(control))
    monkeypatch.setattr(command, "replay", lambda fault, cache: replay.Outcome(words[fault.name]))
    assert command.main(list(words)) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    caught, state = list(words.values()).count("caught"), "passed" if control == "passed" else "FAILED"
    assert lines[-1] == f"{caught} of 2 mutants caught; control {state}"


def test_a_name_that_is_none_is_refused(capsys):
    assert command.main(["no such fault"]) == 2
    assert "no such fault" in capsys.readouterr().out


@pytest.mark.slow
def test_every_test_that_a_fault_names_is_run_by_make_test_or_make_test_all():
    named = {test for fault in FAULTS for test in fault.tests}
    files = sorted({test.partition("::")[0] for test in named})
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "not sweep and not gpu"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=data.ROOT, text=True, capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    collected = set(process.stdout.splitlines())
    collected |= {test.partition("[")[0] for test in collected}
    assert not named - collected, process.stdout[-2000:]


@pytest.mark.sweep
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts its own interpreter")
def test_every_planted_fault_is_caught(capsys):
    assert command.main([]) == 0, capsys.readouterr().out
