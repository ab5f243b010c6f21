"""The command where its streams are closed, broken or full, and where it is interrupted before it has begun."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onepeace_fast import cli, info
from onepeace_fast.demo import command as demo
from onepeace_fast.training import command as training

COMMAND = [sys.executable, "-m", "onepeace_fast.cli"]


def test_a_reader_that_goes_away_ends_it_quietly():
    process = subprocess.Popen([*COMMAND, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(120) == 141


def test_a_closed_standard_error_changes_neither_exit_code_nor_output(tmp_path):
    code = "import os, sys; os.close(2); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", code, *COMMAND, "train", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_full_disk_behind_the_standard_error_changes_no_exit_code(tmp_path):
    with open("/dev/full", "w") as full:
        assert subprocess.run([*COMMAND, "train", str(tmp_path / "absent.yaml")], stderr=full).returncode == 2


def test_a_full_disk_behind_the_standard_output_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "standard output: cannot be read or written: No space left on device\n"


def test_ctrl_c_while_it_runs_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "describe", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


@pytest.mark.parametrize(
    ("inherited", "rank", "expected"),
    [
        (signal.SIG_DFL, "0", (130, b"\nInterrupted.\n")),
        (signal.SIG_DFL, "1", (130, b"")),
        (signal.SIG_IGN, "0", (7, b"")),  # as a shell's background jobs and nohup's do
    ],
)
def test_ctrl_c_while_it_imports_is_one_line_also_where_the_import_catches_it_or_nothing_where_it_is_ignored(
    tmp_path, inherited, rank, expected
):
    slow = (
        "import os, sys\nprint('importing', flush=True)\ntry:\n    sys.stdin.read()\nexcept BaseException:\n    pass\n"
    )
    (tmp_path / "torch.py").write_text(slow + "os._exit(7)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*COMMAND, "info"],
        env=os.environ | {"PYTHONPATH": path, "RANK": rank},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, inherited),  # not as whoever runs the tests inherited it
    )
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == expected


HANDLER = """import signal, sys
sys.modules["torch"] = None  # so that the import is short
try:
    import onepeace_fast
except ImportError:
    pass
interrupt = sys.modules["onepeace_fast._interrupt"]
print(signal.getsignal(signal.SIGINT) is interrupt._stop)
"""


@pytest.mark.parametrize(
    ("words", "theirs"),
    [
        (["onepeace-fast", "info"], True),
        (["-u", "-X", "utf8", "onepeace-fast"], True),
        (["onepeace-fast.exe"], True),
        (["-c", HANDLER, "onepeace-fast"], False),
        (["-c", HANDLER, "-m", "onepeace_fast.cli"], False),
        (["own.py", "onepeace-fast"], False),
        (["own.py", "runs/onepeace-fast"], False),
        (["own.py", "-m", "onepeace_fast.cli"], False),
        (["-m", "own", "onepeace_fast.cli"], False),
        (["-m", "onepeace-fast"], False),
        (["runs/onepeace-fast"], False),
    ],
    ids=lambda words: " ".join(words).replace(HANDLER, "CODE") if isinstance(words, list) else None,
)
def test_importing_the_library_leaves_ctrl_c_as_it_is_in_all_programs_but_the_command(tmp_path, words, theirs):
    folder = tmp_path / "runs" / "onepeace-fast"  # a program, too, with a file of this name
    folder.mkdir(parents=True)
    for path in (
        tmp_path / "own.py",
        tmp_path / "onepeace-fast.py",
        tmp_path / "onepeace-fast.exe",
        tmp_path / "onepeace-fast",
        folder / "__main__.py",
    ):
        path.write_text(HANDLER)
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    # What runs in the background ignores it, and so would the program.
    obeyed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    done = subprocess.run([sys.executable, *words], preexec_fn=obeyed, **how)
    assert done.stdout == f"{theirs}\n"


@pytest.mark.parametrize("module", [training, demo])
def test_a_broken_pipe_is_not_taken_for_a_file_that_cannot_be_written(module, monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise BrokenPipeError

    if module is training:
        pytest.importorskip("yaml")
        monkeypatch.setattr("onepeace_fast.training.train.train", broken)
        (tmp_path / "run.yaml").write_text(
            "{stage: vision_language, manifest: m, output: o, batch_size: 1, steps: 1, learning_rate: 1}"
        )
        arguments = ["train", str(tmp_path / "run.yaml")]
    else:
        pytest.importorskip("sklearn")
        monkeypatch.setattr("onepeace_fast.demo.run.run", broken)
        arguments = ["demo", "--output", str(tmp_path / "report")]
    assert cli.main(arguments) == 141
    assert capsys.readouterr().err == ""


def test_the_demo_s_paths_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = []
    monkeypatch.setattr(demo, "run", lambda arguments: given.append((arguments.output, arguments.wav)) or 0)
    assert cli.main(["demo", "--output=~/report", "--wav=~/a.wav"]) == 0
    assert given == [(tmp_path / "report", str(tmp_path / "a.wav"))]


def test_a_character_that_cannot_be_printed_is_shown_by_its_number(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(info, "describe", lambda: "caf\xe9 \udcff")
        assert cli.main(["info"]) == 0
    assert Path(tmp_path / "out").read_text() == "caf\\xe9 \\udcff\n"
