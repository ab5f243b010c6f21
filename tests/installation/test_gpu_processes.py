"""How `make gpu` runs jobs: side by side, ended as whole groups, their lines kept; and its pytest plugin."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from installation._machine import SCRIPT

from benchmarks.support.watchdog import LIMIT
from tools.gpu_run import processes
from tools.gpu_run.plugin import DEVICE_LOST, LOST, UNFINISHED, read_records
from tools.gpu_run.processes import CUT, FAILED, PASSED, Job, Log, run_jobs

ROOT = SCRIPT.parent


def job(name: str, code: str, **how) -> Job:
    return Job(name, lambda seconds: [sys.executable, "-c", code], **how)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log.txt")


def test_jobs_run_side_by_side_and_their_lines_are_logged(tmp_path, log, capsys):
    meet = (
        "import os, sys, time\nopen({mine!r}, 'w')\nwhile not os.path.exists({other!r}): time.sleep(0.01)\nprint('met')"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [
        job("a", meet.format(mine=a, other=b), shown=True),
        job("b", meet.format(mine=b, other=a)),
        job("c", "import sys; sys.stderr.write('no end of line'); sys.exit(5)"),
    ]
    outcomes = run_jobs(jobs, 60.0, 2, log)
    assert [(one.name, one.state) for one in outcomes] == [("a", PASSED), ("b", PASSED), ("c", FAILED)]
    assert outcomes[2].note == "exit code 5: no end of line"
    kept = (tmp_path / "log.txt").read_text().splitlines()
    assert {"[a] met", "[b] met", "[c] no end of line"} == set(kept)
    assert capsys.readouterr().out == "met\n"


def test_the_whole_group_of_a_job_ends_with_its_time_and_what_it_wrote_stays(tmp_path, log, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.3)
    stubborn = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, signal.SIG_IGN); "
        "print(1, flush=True); time.sleep(60)'])\nprint(child.pid, flush=True)\ntime.sleep(60)"
    )
    start = time.monotonic()
    (outcome, never) = run_jobs([job("stubborn", stubborn), job("never", "print(2)")], 1.5, 1, log)
    assert time.monotonic() - start < 20
    assert outcome.state == CUT and "at the end of its time" in outcome.note
    child = int(next(line for line in outcome.lines if line != "1"))
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child) and f"[stubborn] {child}" in (tmp_path / "log.txt").read_text()
    assert (never.state, never.note) == (CUT, "not started: no time was left")


def test_a_job_is_told_its_time_and_starts_again_where_it_can_go_on(tmp_path, log):
    told, codes = [], iter([3, -signal.SIGKILL, 0])

    def command(seconds):
        told.append(seconds)
        code = next(codes)
        return [sys.executable, "-c", f"import os; os.kill(os.getpid(), 9) if {code} < 0 else exit({code})"]

    (outcome,) = run_jobs([Job("a", command, again=lambda code: code == 3 or code < 0)], 60.0, 1, log)
    assert outcome.state == PASSED and len(told) == 3 and 60 >= told[0] > told[1] > told[2]
    (outcome,) = run_jobs([job("b", "exit(3)", again=lambda code: code == 3)], 60.0, 1, log)
    assert outcome.state == FAILED and outcome.note.startswith("exit code 3")


HANGS = """
import collections, itertools, signal, sys, time
from benchmarks.support.watchdog import Watchdog

watchdog, left = Watchdog(), lambda: signal.getitimer(signal.ITIMER_REAL)[0]
compiled = watchdog._compiled
if "triton" in sys.modules:
    from triton import knobs
    compiled = knobs.compilation.listener
compiled()
print("before", left())
for again in (watchdog.restart, watchdog.restart, compiled):
    again()
    print("restarted", left() > 0.6)
    time.sleep(0.15)
watchdog.stop()
print("stopped", left())
watchdog.restart()
def hang(): collections.deque(itertools.repeat(0), maxlen=0)  # and no handler of Python's runs meanwhile
hang()
"""


def test_a_job_in_which_nothing_answers_is_a_failure_that_says_where_it_was(log):
    asked = HANGS.partition("compiled =")[0] + "import os\ndef wait(): os.kill(os.getpid(), signal.SIGTERM)\nwait()"
    jobs = [
        job("a", HANGS, most_seconds=0.7),
        job("b", asked, most_seconds=60.0),
        job("c", "import time; time.sleep(1)"),
    ]
    hung, ended, beside = run_jobs(jobs, 60.0, 3, log)
    assert (hung.state, hung.note) == (FAILED, "no answer within 0.7 s: a kernel may hang")
    assert hung.lines[:5] == ["before 0.0", *["restarted True"] * 3, "stopped 0.0"]
    assert any(line.endswith(" in hang") for line in hung.lines) and hung.seconds < 30
    assert beside.state == PASSED
    assert ended.note.startswith("exit code -15") and any(line.endswith(" in wait") for line in ended.lines)


def test_a_job_that_cannot_be_ended_keeps_nothing_waiting(log, monkeypatch):
    started = []
    monkeypatch.setattr(processes, "GRACE", 0.1)
    monkeypatch.setattr(processes, "LAST", 0.1)
    monkeypatch.setattr(processes._Running, "signal", lambda self, number: started.append(self.process))
    try:
        (outcome,) = run_jobs([job("a", "import time; time.sleep(60)")], 0.3, 1, log)
        assert (outcome.state, outcome.note) == (FAILED, "it was killed and has not ended: the device may hang")
    finally:
        started[0].kill()
        started[0].wait()


def test_a_job_ends_the_run_by_its_exit_code_and_not_by_the_end_of_its_time(log):
    how = {"ends_run": lambda code: code in (33, -9, -15)}
    codes = {"a": "exit(33)", "b": "exit(1)", "c": "import os; os.kill(os.getpid(), 9)", "d": "exit(0)"}
    outcomes = run_jobs([job(name, code, **how) for name, code in codes.items()], 60.0, 4, log)
    assert [one.ends_run for one in outcomes] == [True, False, True, False]
    (cut,) = run_jobs([job("e", "import time; time.sleep(60)", **how)], 0.1, 1, log)
    assert cut.state == CUT and not cut.ends_run


def test_an_interruption_leaves_no_job_behind(tmp_path, log):
    pids = tmp_path / "pid"

    def tick():
        if pids.exists() and pids.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write = f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        run_jobs([job("a", write)], 60.0, 1, log, tick)
    assert not is_alive(int(pids.read_text()))


def test_a_log_that_is_full_says_so_and_grows_no_more(tmp_path, log, monkeypatch):
    monkeypatch.setattr(processes, "MOST_LOGGED", 100)
    for _ in range(50):
        log.line("a", "x" * 30)
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < 300 and text.endswith("The log is full: lines after this one are not kept.\n")


KILLED = """
import sys
from tools.gpu_run import __main__ as command, plan, schedule
from tools.gpu_run.processes import Job
from tools.gpu_run.schedule import Stage

def job(name, code):
    return Job(name, lambda seconds: [sys.executable, "-c", code], shown=True)

def stage(name, code, *others):
    return Stage(name, 1, "", [lambda _: [*others, job(name, code)]])

command.MOST_AT_ONCE = 1
waits = "import os, time; print('on', flush=True); print(os.getpid(), flush=True); time.sleep(20)"
second = stage("second", waits, job("before", "print('known')"))
plan.stages = lambda machine: [stage("first", "print('done')"), second]
command.main([])
"""


def test_what_was_found_survives_a_kill_of_the_run_itself(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path)}
    streams = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, env=environment, **streams) as process:
        while process.stdout.readline().strip() != "on":
            pass
        process.kill()
        process.stdout.close()
    (record,), (document,) = tmp_path.glob("run_*.json"), tmp_path.glob("run_*.md")
    assert [(one["name"], one["state"]) for one in json.loads(record.read_text())["stages"]] == [("first", PASSED)]
    assert "| first | passed |" in document.read_text()
    assert "[first] done\n[before] known\n[second] on\n" in next(tmp_path.glob("log_*")).read_text()
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_its_jobs_and_writes_what_was_found(tmp_path, number):
    environment = {**os.environ, "OUT": str(tmp_path)}
    streams = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, env=environment, **streams) as process:
        while process.stdout.readline().strip() != "on":
            pass
        job = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert not is_alive(job)
    (record,) = tmp_path.glob("run_*.json")
    stages = json.loads(record.read_text())["stages"]
    assert [(one["name"], one["state"]) for one in stages] == [("first", PASSED), ("second", CUT)]
    assert [(one["name"], one["state"]) for one in stages[1]["jobs"]] == [("before", PASSED)]


TESTS = """
import sys, types
import pytest

def lose():
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_before(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_loses_the_device():
    lose()
    raise RuntimeError("the kernel's own error")
def test_after(): pass
"""


@pytest.fixture
def tested(tmp_path):
    """Run pytest with the plugin over a file of its own; returns outcomes by name, and the exit code."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")

    def run(
        *options: str, tests: str = TESTS, earlier: str = "", shard: str = "1/1", again: bool = False, most: str = ""
    ):
        record = tmp_path / "tests.jsonl"
        if not again:
            (tmp_path / "test_a.py").write_text(tests)
            record.unlink(missing_ok=True)
        given = {"GPU_RUN_TESTS": str(record), "GPU_RUN_TESTED": earlier, "GPU_RUN_SHARD": shard, LIMIT: most}
        environment = {**os.environ, **given, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.gpu_run.plugin", *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        (tmp_path / "stderr").write_text(done.stderr)
        found = {one["test"].split("::")[1]: one for one in read_records(record) if "outcome" in one}
        return found, done.returncode

    return run


def test_outcomes_are_written_as_they_come_and_a_lost_device_ends_the_process(tested, tmp_path):
    found, code = tested("test_a.py")
    assert code == DEVICE_LOST
    assert {name: one["outcome"] for name, one in found.items()} == {
        "test_before": "passed", "test_wrong": "failed", "test_skipped": "skipped", "test_loses_the_device": "failed",
    }  # fmt: skip
    assert found["test_loses_the_device"]["message"] == "RuntimeError: the kernel's own error"
    assert "1 == 2" in found["test_wrong"]["text"] and found["test_skipped"]["message"] == "Skipped: not here"
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text((tmp_path / "tests.jsonl").read_text())
    found, code = tested("test_a.py", earlier=str(earlier))
    assert (list(found), code) == (["test_after"], 0)


def test_a_process_that_takes_the_place_of_one_that_died_goes_on_behind_the_test_that_ended_it(tested):
    tested("test_a.py")
    found, code = tested("test_a.py", again=True)
    assert code == 0 and found["test_loses_the_device"]["outcome"] == "failed"
    assert found["test_after"]["outcome"] == "passed" and len(found) == 5
    found, code = tested("test_a.py", "-k", "crash", tests="import os\ndef test_crash(): os.kill(os.getpid(), 9)\n")
    assert (found, code) == ({}, -9)
    found, code = tested("test_a.py", again=True)
    assert found["test_crash"]["outcome"] == "failed" and found["test_crash"]["message"] == UNFINISHED and code == 5


HUNG = """
import collections, itertools, sys, types

def hang(): collections.deque(itertools.repeat(0), maxlen=0)
def test_before(): pass
def test_hangs(): hang()
def test_leaves_a_kernel_that_hangs():
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=bool, synchronize=hang))
    sys.modules["torch"].cuda.is_initialized = lambda: True
def test_after(): pass
"""


def test_a_test_in_which_nothing_answers_ends_its_process_and_is_named_by_the_next(tested, tmp_path):
    found, code = tested("test_a.py", tests=HUNG, most="1")
    assert code == -signal.SIGALRM and list(found) == ["test_before"]
    assert " in test_hangs\n" in (tmp_path / "stderr").read_text()
    found, code = tested("test_a.py", again=True, most="1")
    assert code == -signal.SIGALRM and list(found) == ["test_before", "test_hangs"]
    assert " in device_lost\n" in (tmp_path / "stderr").read_text()
    found, code = tested("test_a.py", again=True, most="1")
    assert code == 0 and {name: one["outcome"] for name, one in found.items()} == {
        "test_before": "passed", "test_hangs": "failed", "test_leaves_a_kernel_that_hangs": "failed",
        "test_after": "passed",
    }  # fmt: skip
    assert found["test_hangs"]["message"] == UNFINISHED


def test_a_test_that_passes_and_leaves_a_lost_device_has_failed(tested):
    found, code = tested("test_a.py", "-k", "loses", tests=TESTS.replace("raise RuntimeError(\"the kernel's", 'str("'))
    assert code == DEVICE_LOST
    ends = {name: (one["outcome"], one["message"]) for name, one in found.items()}
    assert ends == {"test_loses_the_device": ("failed", LOST)}


SHUFFLED = """
import os, random, pytest

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items): random.Random(os.environ["GPU_RUN_SHARD"]).shuffle(items)
"""


def test_the_parts_of_a_file_make_the_whole_in_any_order(tested, tmp_path):
    tests = "".join(f"def test_{i}(): pass\n" for i in range(7))
    (tmp_path / "conftest.py").write_text(SHUFFLED)
    parts = [list(tested("test_a.py", tests=tests, shard=f"{i}/3")[0]) for i in (1, 2, 3)]
    expected = [["test_0", "test_3", "test_6"], ["test_1", "test_4"], ["test_2", "test_5"]]
    assert [sorted(part) for part in parts] == expected != parts
