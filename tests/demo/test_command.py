"""The command `onepeace-fast demo` at a reduced size: what it prints, what it leaves behind, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import re
import sys
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("soundfile")
pytest.importorskip("espeakng_loader")

from onepeace_fast import OnePeacePretrain, cli, info
from onepeace_fast.backend import use_backend
from onepeace_fast.demo import comparison, costs, data, embedding_map, experiment, familiarity, rank, run, speech


def reduce(patch, spoken, folder):
    pair_batches = comparison.pair_batches
    patch.setattr(speech, "load", lambda clips: spoken)
    patch.setattr(comparison, "pair_batches", lambda *arguments: pair_batches(*arguments, pairs=4))
    patch.setattr(costs, "COUNTED", 1)
    patch.setattr(costs, "ROUNDS", 1)
    patch.setattr(costs, "peak_bytes", lambda call, device: 1 << 20)
    patch.setattr(embedding_map, "SHOWN", 20)
    patch.setattr(embedding_map, "ITERATIONS", 250)
    patch.setattr(familiarity, "KNOWN", 10)
    patch.setattr(familiarity, "OF_EACH", 1)
    patch.setattr(run, "record_file", lambda: folder / "record" / "last-demo.txt")
    patch.setattr(rank, "record_file", lambda: folder / "record" / "last-demo.txt")


@pytest.fixture(autouse=True)
def reduced(monkeypatch, spoken, tmp_path):
    """Few sounds, little to measure, and the quicker backend; no environment variable chooses another."""
    reduce(monkeypatch, spoken, tmp_path)
    with use_backend("reference"):
        yield


class FirstRun(NamedTuple):
    """A short run: its folder, what it left there and what it printed."""

    folder: Path
    left: set[str]
    printed: str
    kept_threads: bool


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, spoken):
    """One run for all tests that look at what it did."""
    folder, threads, printed = (
        tmp_path_factory.mktemp("trained") / "new" / "folder",
        torch.get_num_threads(),
        io.StringIO(),
    )
    with pytest.MonkeyPatch.context() as patch, use_backend("reference"), contextlib.redirect_stdout(printed):
        reduce(patch, spoken, folder.parent.parent)
        assert demo("--output", folder, steps=5) == 0
    left = {path.name for path in folder.iterdir()}
    return FirstRun(folder, left, printed.getvalue(), torch.get_num_threads() == threads)


@pytest.fixture
def trained(first_run):
    """A folder that a short run has filled."""
    return first_run.folder


def demo(*arguments, steps=2):
    return cli.main(["demo", "--device", "cpu", "--steps", str(steps), *map(str, arguments)])


def recording(path, samples, rate=16_000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def test_demo_trains_both_stages_and_leaves_a_report_and_a_model(first_run):
    printed = first_run.printed
    assert "2 steps, images" in printed and "3 steps, sounds" in printed
    assert re.search(r"sound finds image +[\d.]+% +[\d.]+%\n", printed)
    assert "Both backends compute the same" in printed
    assert re.search(r"image-text: fused is .+; automatic is .+\n", printed)
    assert "automatic backend, one CPU thread" in printed
    assert max(map(len, printed.partition("What to try next")[0].splitlines())) <= 110
    assert first_run.left == {"index.html", "model"}
    assert first_run.kept_threads


def test_what_to_try_next_can_be_typed_as_it_stands(first_run, tmp_path, spoken):
    (line,) = (line for line in first_run.printed.splitlines() if "--wav" in line)
    arguments = re.search(r"onepeace-fast (demo .*?--wav) mine.wav", line)[1].split()
    assert cli.main([*arguments, str(recording(tmp_path / "mine.wav", spoken[1].sounds[0]))]) == 0


def test_a_visitors_voice_is_ranked_by_the_model_that_is_there(trained, tmp_path, capsys, spoken, monkeypatch):
    monkeypatch.setattr(experiment, "train_image_text", None)  # nothing trains again
    sound = spoken[1].sounds[3]
    path = recording(tmp_path / "mine.wav", sound)
    assert demo("--output", trained, "--wav", path) == 0
    printed = capsys.readouterr().out
    ranked = [int(digit) for digit in re.findall(r"^  (\d) \w+ +[+-]0\.\d{3}$", printed, re.MULTILINE)]
    assert sorted(ranked) == list(range(10))
    page = (trained / "mine-ranking.html").read_text(encoding="utf-8")
    model = OnePeacePretrain.load(trained / "model").eval()
    _, held_out = data.load()
    cosines = experiment.similarity(
        experiment.sound_embeddings(model, [sound]), experiment.image_embeddings(model, held_out.images)
    )[0]
    assert ranked[0] == held_out.labels[cosines.argmax()] and page.count("<li ") == 10
    assert (trained / "index.html").exists()


def test_a_long_recording_is_heard_at_its_loudest_second(trained, tmp_path, capsys, spoken):
    sound = spoken[1].sounds[3].astype(float)
    hum = 0.05 * np.abs(sound).max() * np.sin(np.arange(80_000) / 40)
    hum[50_000 : 50_000 + len(sound)] += sound
    path = recording(tmp_path / "long.wav", np.repeat(hum, 2), rate=32_000)
    assert demo("--output", trained, "--wav", path) == 0
    assert "its loudest second of 5.0" in capsys.readouterr().out


@pytest.mark.slow
def test_a_voice_before_the_first_run_has_the_demo_run_first(tmp_path, capsys, spoken):
    path = recording(tmp_path / "mine.wav", spoken[1].sounds[0])
    assert demo("--output", tmp_path / "report", "--wav", path) == 0
    printed = capsys.readouterr().out
    assert "There is no trained model" in printed and "Heard in" in printed
    assert (tmp_path / "report" / "index.html").exists()


def test_a_model_of_another_version_is_refused_in_one_line(trained, tmp_path, capsys, spoken, monkeypatch):
    configuration = experiment.configuration

    def wider(*arguments):
        config = configuration(*arguments)
        return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, ffn_embed_dim=512))

    monkeypatch.setattr(experiment, "configuration", wider)
    path = recording(tmp_path / "mine.wav", spoken[1].sounds[0])
    assert demo("--output", trained, "--wav", path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected a model of this version of the demo, got another" in error


@pytest.mark.parametrize("fault", ["missing", "text", "silent", "damaged model"])
def test_what_cannot_be_heard_is_refused_in_one_line(trained, tmp_path, capsys, fault, spoken):
    path, output = tmp_path / "mine.wav", trained
    if fault == "text":
        path.write_text("not a sound")
    elif fault == "silent":
        recording(path, np.zeros(16_000))
    elif fault == "damaged model":
        recording(path, spoken[1].sounds[0])
        output = tmp_path
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
    assert demo("--output", output, "--wav", path) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_a_voice_is_ranked_in_any_folder_by_the_model_of_the_last_run(trained, tmp_path, capsys, spoken, monkeypatch):
    monkeypatch.setattr(experiment, "train_image_text", None)  # nothing trains again
    monkeypatch.chdir(tmp_path)
    run.note_place(trained)
    assert demo("--wav", recording(tmp_path / "other.wav", spoken[1].sounds[0])) == 0
    assert f"nearest first: {trained / 'other-ranking.html'}" in capsys.readouterr().out
    assert 'href="index.html"' in (trained / "other-ranking.html").read_text(encoding="utf-8")
    assert not (tmp_path / "report").exists()


def test_every_place_that_was_looked_in_is_named(trained, tmp_path, monkeypatch):
    assert rank.find(tmp_path, anywhere=True) == (None, [tmp_path / "model"])
    run.note_place(tmp_path / "gone")
    assert rank.find(tmp_path, anywhere=True) == (None, [tmp_path / "model", tmp_path / "gone" / "model"])
    run.note_place(trained)
    assert rank.find(tmp_path, anywhere=True)[0] == trained and rank.find(tmp_path, anywhere=False)[0] is None
    assert rank.find(trained, anywhere=True)[0] == trained


def test_a_place_that_cannot_be_noted_costs_a_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "record_file", lambda: tmp_path / "file" / "last-demo.txt")
    run.note_place(tmp_path)
    assert capsys.readouterr().out.startswith("Where the model is cannot be noted for --wav in other folders: ")


@pytest.mark.parametrize("score, said", [(0.91, ""), (0.9, ""), (0.89, "(0.890, below 0.900)")])
def test_a_sound_below_the_threshold_is_said_to_be_unlike_any_digit(score, said):
    measured = familiarity.Familiarity(torch.zeros(1, 1), 0.9, 0.05, 0.996)
    found = rank.warning(measured, score)
    assert bool(found) == bool(said) and said in found
    assert not found or ("5% of the held-out digits" in found and "99.6% of noises" in found)


@pytest.mark.slow
def test_seeds_print_their_spread_and_keep_every_figure(tmp_path, capsys):
    assert demo("--output", tmp_path, "--seeds", 2, "--seed", 7) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[-7:-2]] == ["7", "8", "lowest", "median", "highest"]
    kept = json.loads((tmp_path / "seeds.json").read_text())
    assert [run["seed"] for run in kept["runs"]] == [7, 8] and kept["denoise"] is False
    assert {"CPU", "torch", "Steps"} <= set(kept["machine"])
    assert all(0 <= run[name] <= 1 for run in kept["runs"] for name in ("sound_to_image", "image_to_sound"))
    assert [path.name for path in tmp_path.iterdir()] == ["seeds.json"]  # the folder holds no model to be noted


@pytest.mark.parametrize("mode", [[], pytest.param(["--seeds", "1"], marks=pytest.mark.slow)], ids=["one", "seeds"])
def test_disagreeing_backends_end_with_code_1(tmp_path, capsys, monkeypatch, mode):
    compare = comparison.compare
    monkeypatch.setattr(comparison, "compare", lambda *arguments: compare(*arguments)._replace(agree=False))
    assert demo("--output", tmp_path, *mode) == 1
    assert ("THE BACKENDS DISAGREE" in capsys.readouterr().out) == (not mode)


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no CUDA device" in printed.err


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "build", None)
    (tmp_path / "file").touch()
    assert demo("--output", tmp_path / "file" / "report") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "file/report" in error


def test_a_missing_package_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert demo() == 2
    assert capsys.readouterr().err == f"demo needs jinja2; type: {info.DEMO_INSTALL}\n"


def test_an_interruption_leaves_no_stack_trace(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train_image_text", interrupted)
    assert demo("--output", tmp_path) == 130
    assert capsys.readouterr().err == "\nStopped.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "1"], ["--steps", "-3"], ["--seeds", "0"], ["--device", "abacus"], ["--seeds", "2", "--wav", "a.wav"]],
)
def test_arguments_that_do_not_fit_end_with_usage_and_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", *arguments])
    assert ended.value.code == 2 and "usage: onepeace-fast demo" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_demo_finds_what_was_never_paired(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    with use_backend("fused"):
        assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    forward, back = (
        float(re.search(rf"{name} +[\d.]+% +([\d.]+)%", printed)[1])
        for name in ("sound finds image", "image finds sound")
    )
    assert forward >= 90 and back >= 85
