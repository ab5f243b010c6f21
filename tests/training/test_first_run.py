"""The first run as typed: a data set that it draws, a loss that falls, and the next command, which works too."""

import json
import os
import re
import shlex

import pytest
from training import _runs  # skips where a package is missing

from onepeace_fast import cli, info
from onepeace_fast.data.manifest import read_manifest
from onepeace_fast.training import first_run
from onepeace_fast.training.config import TrainingConfig

assert _runs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pictures_with_captions_and_none_of_the_held_out_ones_in_training(folder):
    config = TrainingConfig.load(first_run.prepare())
    trained, held_out = (read_manifest(folder / "first_run" / name, "image") for name in ("train.tsv", "held_out.tsv"))
    assert config.batch_size < len(trained) == 208 and len(held_out) == 2 * 48
    assert not {entry.path for entry in trained} & {entry.path for entry in held_out}
    assert len({entry.caption for entry in trained + held_out}) == len(trained + held_out)
    first, second = held_out[:2]
    assert first.path == second.path and first.caption.split()[1] in second.caption.replace(",", "").split()
    assert not (folder / "first_run.draft").exists()


def test_what_is_there_already_is_used_and_another_folder_is_left_alone(folder, capsys):
    path = first_run.prepare()
    path.write_text("edited")
    assert first_run.prepare() == path and path.read_text() == "edited"
    path.unlink()
    assert cli.main(["train", "--first-run"]) == 2
    line = "first_run: expected no such folder, or one with first_run.yaml in it, got another; move it"
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


def shorten(text, steps):
    """The configuration with fewer steps."""
    return re.sub("steps: .*", f"steps: {steps}", re.sub("warm_up: .*", "warm_up: 1", text))


def test_it_says_where_the_checkpoint_is_and_what_to_type_next(folder, monkeypatch, capsys):
    text = shorten(first_run.CONFIGURATION_TEXT, 2).replace("batch_size: 32", "batch_size: 4")
    monkeypatch.setattr(first_run, "CONFIGURATION_TEXT", text)
    assert cli.main(["train", "--first-run"]) == 0
    *_, loss, done, following, own = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Loss: [\d.]+ \(mean of 2 steps\)", loss) and done == "Done: first_run/run/step-00000002"
    assert "first_run/first_run.yaml" in own
    command = following.partition(": ")[2]
    assert cli.main(shlex.split(command.partition("evaluate")[1] + command.partition("evaluate")[2])) == 0
    assert "image to text" in capsys.readouterr().out


def test_a_missing_package_is_named_and_nothing_is_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(info, "find_spec", lambda module: None if module == "PIL" else module)
    assert cli.main(["train", "--first-run"]) == 2
    assert capsys.readouterr().err.startswith("train needs pillow; type: ") and not list(folder.iterdir())


@pytest.mark.slow
def test_the_loss_falls_and_held_out_pictures_are_found_far_above_chance(folder, capsys):
    assert cli.main(["train", "--first-run"]) == 0
    first, last = re.findall(r"Loss: ([\d.]+) .* at first, ([\d.]+) .* at the end", capsys.readouterr().out)[0]
    assert float(last) < 0.85 * float(first)
    path = os.fspath(folder / "figures.json")
    arguments = ["evaluate", "first_run/run/step-00000200", "first_run/held_out.tsv", "--json", path]
    assert cli.main(arguments) == 0
    with open(path) as file:
        figures = json.load(file)["directions"]
    for found in figures.values():
        assert found["recall_at_5"] > 4 * found["chance"]["recall_at_5"]
