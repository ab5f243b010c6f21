"""Progress where nobody watches: a line now and then, no bar; and a bar on a terminal."""

import io

import pytest

from onepeace_fast import progress as module
from onepeace_fast.progress import Lines, progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_comes_every_30_seconds_and_one_at_the_end(capsys, clock):
    shown = progress("Training", "step", total=100)
    for step in range(100):
        clock[0] += 1
        shown.set_postfix(loss=f"{step}", refresh=False)
        shown.update()
    shown.close()
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err
    assert said.err.splitlines() == [
        "Training: 30 of 100 steps in 30 s, about 70 s left, loss=29",
        "Training: 60 of 100 steps in 60 s, about 40 s left, loss=59",
        "Training: 90 of 100 steps in 90 s, about 10 s left, loss=89",
        "Training: 100 of 100 steps in 100 s, loss=99",
    ]


def test_the_end_is_said_once_and_nothing_of_what_never_began(capsys, clock):
    shown = progress("Training", "step", total=2, initial=1)
    shown.close()
    assert capsys.readouterr().err == ""
    clock[0] += 31
    shown.update()
    shown.close()
    assert capsys.readouterr().err == "Training: 2 of 2 steps in 31 s\n"


def test_what_was_done_before_does_not_count_as_speed(capsys, clock):
    shown = progress("Training", "step", total=110, initial=100)
    clock[0] += 40
    shown.update(5)
    assert "105 of 110 steps in 40 s, about 40 s left" in capsys.readouterr().err


def test_an_unknown_total_is_left_out_and_a_line_of_its_own_goes_to_the_output(capsys, clock):
    shown = progress("selftest", "comparison")
    shown.write("a line")
    clock[0] += 31
    shown.update(3)
    assert capsys.readouterr() == ("a line\n", "selftest: 3 comparisons in 31 s\n")


def test_a_full_disk_behind_the_standard_error_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.sys, "stderr", Full())
    shown = progress("Training", "step", total=1)
    shown.update()
    shown.close()


def test_a_terminal_gets_a_bar_where_tqdm_is_installed(monkeypatch):
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    shown = progress("Training", "step", total=4)
    shown.update()
    shown.close()
    assert "Training" in terminal.getvalue() and "\r" in terminal.getvalue()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert isinstance(progress("Training", "step", total=4), Lines)
