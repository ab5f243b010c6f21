"""Demos with one seed or several: what is kept and printed of each, and what the command asks for."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("espeakng_loader")

from onepeace_fast.demo import seeds
from onepeace_fast.demo.paper_command import MICO, UNIVAL, PaperCommand


@dataclasses.dataclass
class Found:
    seed: int
    seconds: dict[str, float]
    share: float

    def figures(self):
        return {"right": self.share, "wrong": 1 - self.share}


RESULTS = [Found(seed, {"all": 1.5}, share) for seed, share in ((3, 0.25), (4, 1.0), (5, 0.5))]


def test_every_result_is_kept_whole_with_its_figures(tmp_path):
    kept = json.loads(seeds.keep_results(RESULTS, tmp_path).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["seeds.json"]
    assert [*kept] == ["machine", "threads", "runs"] and [*kept["machine"]] == ["CPU", "Python", "torch"]
    figures = {"right": 0.25, "wrong": 0.75}
    assert kept["runs"][0] == {"seed": 3, "seconds": {"all": 1.5}, "share": 0.25, "figures": figures}
    assert [run["seed"] for run in kept["runs"]] == [3, 4, 5]


def test_several_are_printed_by_median_and_range_and_one_by_itself(capsys):
    seeds.print_figures(RESULTS, "right digits")
    rows = [["right", "digits", "median", "lowest", "highest"], ["right", "50%", "25%", "100%"]]
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:3]] == rows
    seeds.print_figures(RESULTS[:1], "right digits")
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [["right", "25%"], ["wrong", "75%"]]


@pytest.mark.parametrize("command", [UNIVAL, MICO])
def test_the_command_runs_the_seeds_that_are_asked_for(command, tmp_path, monkeypatch):
    asked = []

    class Demo:
        run_one = run_seeds = lambda _, *arguments: asked.append(arguments)

    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for typed in ([], ["--seed", "7", "--seeds", "2"]):
        assert PaperCommand(command.name, Demo).run(parser.parse_args(typed)) == 0
    folder = Path(f"report-{command.name}")
    assert asked == [(0, folder), (range(7, 9), folder)] and folder.is_dir()
