"""The training command from files to checkpoints, and what it does when something goes wrong."""

import errno
import json
import math
import os
import resource
import shutil
import sys

import pytest
import torch
from training._runs import checkpoints, curves, same_training, small_fields, write_clips, write_config, write_images

from onepeace_fast import OnePeacePretrain, info
from onepeace_fast.installation import install_command
from onepeace_fast.training import checkpoint, command
from onepeace_fast.training.trainer import Trainer

FILES = ["SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json", "training.pt"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with images and clips; ``stage1``, a finished run of four steps."""
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder)
    write_clips(folder)
    assert command.pretrain(str(write_config(folder, "stage1"))) == 0
    return folder


@pytest.fixture
def name(request, corpus):
    """A run's name of its own in the corpus."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    yield name
    shutil.rmtree(corpus / name, ignore_errors=True)


def run(folder, name, **keys):
    return command.pretrain(str(write_config(folder, name, **keys)))


def interrupt_before(monkeypatch, step):
    """Ctrl-C in the step after ``step`` are done."""
    take = Trainer.step

    def interrupted(self, batches):
        if self.step_number == step:
            raise KeyboardInterrupt
        return take(self, batches)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_both_stages_from_files_to_a_model(corpus, name, capfd):
    first = corpus / "stage1"
    assert checkpoints(first) == ["step-00000002", "step-00000004"]
    for folder in (first / step for step in checkpoints(first)):
        assert sorted(path.name for path in folder.iterdir()) == FILES
    seen = curves(first)
    parts = {"itc_loss", "dcl_text_loss", "dcl_image_loss", "dcl_vl_text_loss", "dcl_vl_image_loss"}
    others = {"loss", "learning_rate", "gradient_norm", "logit_scale_exp", "samples_per_second"}
    assert parts | others <= set(seen)
    assert all(list(values) == [1, 2, 3, 4] for values in seen.values())
    assert list(seen["learning_rate"].values()) == pytest.approx([0, 0.005, 0.01, 0.005])
    total = sum(seen[part][4] * weight for part, weight in zip(sorted(parts), (1, 0.5, 0.5, 0.5, 1), strict=True))
    assert seen["loss"][4] == pytest.approx(total, rel=1e-5)

    keys = {"stage": "audio_language", "manifest": "clips.tsv", "model": None, "workers": 1}
    assert run(corpus, name, init="stage1/step-00000004", **keys) == 0
    out, err = capfd.readouterr()
    assert "Training audio_language on 10 pairs" in out
    assert out.endswith(f"Done: {corpus / name / 'step-00000004'}\n")
    assert "4 of 4 steps" in err and "loss=" in err
    assert {"atc_loss", "dcl_audio_loss", "dcl_al_text_loss", "dcl_al_audio_loss"} <= set(curves(corpus / name))
    before, after = (OnePeacePretrain.load(corpus / run / "step-00000004") for run in ("stage1", name))
    text = torch.tensor([[5, 6, 7, 2]])
    assert torch.equal(before.eval().embed(text=text), after.eval().embed(text=text))
    audio = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(before.embed(audio=audio), after.embed(audio=audio))


def test_stage_two_can_add_audio_to_a_model_without(corpus, name):
    fields = small_fields()
    without = json.loads(json.dumps(fields))
    without["encoder"]["audio"] = without["decoder"]["audio"] = None
    assert run(corpus, name, model=without) == 0
    keys = {"stage": "audio_language", "manifest": "clips.tsv", "init": f"{name}/step-00000004"}
    added = {part: {"audio": fields[part]["audio"]} for part in ("encoder", "decoder")}
    assert run(corpus, f"{name}2", **keys, model=added) == 0
    before, after = (OnePeacePretrain.load(corpus / run / "step-00000004") for run in (name, f"{name}2"))
    assert "audio" in after.config.encoder.modalities
    own, new = before.to_upstream_state_dict(), after.to_upstream_state_dict()
    image = [key for key in own if "image" in key]
    assert image and all(torch.equal(own[key], new[key]) for key in image)


@pytest.mark.slow
def test_training_matches_ten_images_with_their_captions(corpus, name):
    fields = small_fields()
    fields["encoder"] |= {"drop_path_rate": 0.0, "dropout": 0.0}
    keys = {"steps": 80, "batch_size": 10, "learning_rate": 0.003, "warm_up": 20, "log_every": 10}
    assert run(corpus, name, model=fields, checkpoint_every=80, **keys) == 0
    contrast = curves(corpus / name)["itc_loss"]
    assert contrast[10] > 0.7 * math.log(10)  # about a guess among ten
    assert contrast[80] < 0.2 * math.log(10)


@pytest.mark.parametrize(
    ("stage", "steps", "stop"),
    [pytest.param("vision_language", 20, 13, marks=pytest.mark.slow), ("audio_language", 6, 3)],
)
def test_a_run_stopped_in_the_middle_ends_in_the_same_bits(corpus, name, monkeypatch, capsys, stage, steps, stop):
    """Twenty steps in a row, and as many with a stop: the steps after the last checkpoint are taken again."""
    keys = {"stage": stage, "steps": steps, "checkpoint_every": stop - stop % 2, "accumulation": 2}
    keys |= {"precision": "bfloat16"} if stage == "audio_language" else {}
    keys |= {"manifest": "clips.tsv", "init": "stage1/step-00000004", "model": None} if "audio" in stage else {}
    straight, stopped = f"{name}_a", f"{name}_b"
    assert run(corpus, straight, **keys) == 0
    with monkeypatch.context() as patch:
        interrupt_before(patch, stop)
        assert run(corpus, stopped, **keys) == 130
    last = corpus / stopped / f"step-{keys['checkpoint_every']:08d}"
    message = capsys.readouterr().err
    assert f"Interrupted: the last checkpoint is {last}, and the same command continues from there\n" in message
    torch.manual_seed(99)
    torch.rand(5)
    assert run(corpus, stopped, **keys) == 0
    assert f"from {last.name} to step {steps}" in capsys.readouterr().out
    ends = [corpus / name / f"step-{steps:08d}" for name in (straight, stopped)]
    assert same_training(*ends)
    wanted, got = (curves(corpus / name) for name in (straight, stopped))
    assert wanted.pop("samples_per_second").keys() == got.pop("samples_per_second").keys()
    assert got == wanted
    assert len(wanted["loss"]) == steps


def test_other_seeds_and_other_checkpoints_do_differ(corpus, name):
    """So that the comparison above can fail."""
    assert run(corpus, name, seed=1) == 0
    first = corpus / "stage1"
    assert not same_training(first / "step-00000004", corpus / name / "step-00000004")
    assert not same_training(first / "step-00000004", first / "step-00000002")


def test_a_finished_run_is_left_alone(corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in (corpus / "stage1").rglob("*") if path.name != "lock"}
    assert run(corpus, "stage1") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert capsys.readouterr().out == f"Done: {corpus / 'stage1' / 'step-00000004'}\n"


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"learning_rate": 0.02}, "learning_rate: 0.01 there, 0.02 here"),
        ({"steps": 8}, "steps: 4 there, 8 here"),
        ({"batch_size": 2, "accumulation": 2}, "accumulation: 1 there, 2 here; batch_size: 4 there, 2 here"),
        ({"model": small_fields(layers=3)}, "model.encoder.layers: 2 there, 3 here"),
        ({"manifest": "fewer.tsv"}, "pairs: 10 there, 9 here"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_their_names(corpus, name, capsys, keys, part):
    lines = (corpus / "images.tsv").read_text().splitlines()
    (corpus / "fewer.tsv").write_text("\n".join(lines[:-1]) + "\n")
    shutil.copytree(corpus / "stage1", corpus / name)
    before = {path: path.read_bytes() for path in (corpus / name).rglob("*") if path.is_file()}
    assert run(corpus, name, **keys) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert part in err
    assert {path: path.read_bytes() for path in before} == before
    assert len(checkpoints(corpus / name)) == 2


def test_what_does_not_change_the_result_may_change(corpus, name):
    shutil.copytree(corpus / "stage1", corpus / name)
    (corpus / name / "step-00000004" / "training.pt").unlink()
    shutil.copy(corpus / "images.tsv", corpus / "renamed.tsv")
    keys = {"keep": 1, "log_every": 2, "checkpoint_every": 3, "workers": 2, "manifest": "renamed.tsv"}
    assert run(corpus, name, **keys) == 0
    assert checkpoints(corpus / name) == ["step-00000004", "step-00000004.damaged"]
    assert same_training(corpus / "stage1" / "step-00000004", corpus / name / "step-00000004")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(corpus, name, capsys):
    shutil.copytree(corpus / "stage1", corpus / name)
    path = corpus / name / "step-00000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert run(corpus, name) == 0
    note, summary, _loss, _done = capsys.readouterr().out.splitlines()
    assert note == (
        "step-00000004 is damaged (model.safetensors changed since it was written): it is now step-00000004.damaged, "
        "and step-00000002 is used instead"
    )
    assert "from step-00000002 to step 4" in summary
    assert same_training(corpus / "stage1" / "step-00000004", corpus / name / "step-00000004")


def fill_disk_at(monkeypatch, steps):
    """No space is left while the checkpoints of these steps are written."""
    save = checkpoint.save_state

    def full(state, path):
        if state["step"] in steps:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, path)

    monkeypatch.setattr(checkpoint, "save_state", full)


def test_a_full_disk_is_said_once_and_training_goes_on(corpus, name, monkeypatch, capsys):
    fill_disk_at(monkeypatch, {2})
    assert run(corpus, name) == 0
    line = "Step 2: checkpoint not written (No space left on device); training goes on and tries again at step 4\n"
    assert capsys.readouterr().out.count(line) == 1
    assert checkpoints(corpus / name) == ["step-00000004"]
    assert same_training(corpus / "stage1" / "step-00000004", corpus / name / "step-00000004")


def test_a_last_checkpoint_that_cannot_be_written_fails_the_command(corpus, name, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fill_disk_at(patch, {4})
        assert run(corpus, name) == 1
    err = capsys.readouterr().err
    last = corpus / name / "step-00000002"
    assert f"Step 4, the last: checkpoint not written (No space left on device); the last checkpoint is {last}," in err
    assert checkpoints(corpus / name) == [last.name]
    assert run(corpus, name) == 0
    assert same_training(corpus / "stage1" / "step-00000004", corpus / name / "step-00000004")


def test_curves_that_cannot_be_written_do_not_stop_training(corpus, name, monkeypatch, capsys):
    """Files cannot grow from the second step to the third."""
    take, before = Trainer.step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, batches):
        limit = 10 if self.step_number in (1, 2) else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return take(self, batches)

    monkeypatch.setattr(Trainer, "step", step)
    try:
        assert run(corpus, name, checkpoint_every=4) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    assert out.count("curves cannot be written: File too large; training goes on") == 1
    assert "Traceback" not in err
    assert list(curves(corpus / name)["loss"]) == [1, 4]


def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint(corpus, name, monkeypatch, capsys):
    take = Trainer.step

    def poisoned(self, batches):
        if self.step_number == 3:
            with torch.no_grad():
                self.model.logit_scale.fill_(float("nan"))
        return take(self, batches)

    monkeypatch.setattr(Trainer, "step", poisoned)
    assert run(corpus, name) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("Stopped: step 4 is not finite (loss nan, itc_loss nan")
    last = corpus / name / "step-00000002"
    assert line.endswith(f"; the last checkpoint is {last}, and the same command continues from there")
    assert checkpoints(corpus / name) == ["step-00000002"]


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("a kernel failed"), False),
    ],
)
def test_too_little_memory_is_one_line_and_other_failures_stay(corpus, name, monkeypatch, capsys, error, stops):
    def full(self, batches):
        raise error

    monkeypatch.setattr(Trainer, "step", full)
    code = None
    try:
        code = run(corpus, name)
    except RuntimeError as raised:
        assert raised is error and not stops
    assert (code == 1) == stops
    text = " ".join(str(error).split())
    line = f"Stopped: expected memory for the model and a batch, got too little ({text}); there is no checkpoint yet"
    assert (line in capsys.readouterr().err) == stops


def test_an_interruption_before_the_first_checkpoint_says_so(corpus, name, monkeypatch, capsys):
    interrupt_before(monkeypatch, 1)
    assert run(corpus, name) == 130
    line = "Interrupted: there is no checkpoint yet, so the same command starts from the beginning"
    assert capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"manifest": "none.tsv"}, "none.tsv: expected a manifest, TSV or Parquet, got no file there"),
        ({"batch_size": 11}, "batch_size: expected at most the 10 pairs of the dataset in all, got 11 on each"),
        ({"init": "nowhere"}, "init: expected the folder of a model, got {folder}/nowhere without config.json"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json: expected a tokenizer.json, got no file there"),
        ({"model": {"encoder": {"layer": 1}}}, "['layer']"),
        ({"model": small_fields() | {"vocab_size": 100}}, "vocab_size: expected at least 260, got 100"),
        ({"model": {"encoder": {"image": None}, "decoder": {"image": None}}}, "model: expected image in encoder"),
        ({"model": None, "init": "stage1/step-00000004", "tokenizer": "large.json"}, "vocab_size, 300, got 301 tokens"),
        ({"model": {"encoder": {"layers": 3}}, "init": "stage1/step-00000004"}, "init: state_dict: "),
        ({"output": "images.tsv"}, "output: expected a folder that can be written, got {folder}/images.tsv"),
        ({"device": "cuda"}, "device: expected a GPU"),
        ({"stage": "audio_language", "init": "stage1/step-00000004", "model": None}, "expected one column 'audio'"),
        ({"manifest": "broken.tsv"}, "got what does not decode as an image"),
        ({"manifest": "broken.tsv", "workers": 1}, "got what does not decode as an image"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_checkpoint(corpus, name, capfd, monkeypatch, keys, part):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    tokenizer = json.loads((corpus / "stage1" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 300
    (corpus / "large.json").write_text(json.dumps(tokenizer))
    (corpus / "broken.png").write_bytes(b"not an image")
    (corpus / "broken.tsv").write_text("image\tcaption\n" + "broken.png\ta thing that nobody sees\n" * 4)
    assert run(corpus, name, **keys) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "step/s" not in line]
    assert len(lines) == 1, lines
    assert part.format(folder=corpus) in lines[0]
    assert not checkpoints(corpus / name)


@pytest.mark.parametrize("lines", [None, ["gone.png\ta thing that nobody sees"]])
def test_a_run_refused_for_its_manifest_leaves_nothing_behind(tmp_path, lines):
    if lines is not None:
        (tmp_path / "images.tsv").write_text("\n".join(["image\tcaption", *lines]))
    path = write_config(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert command.pretrain(str(path)) == 2
    assert set(tmp_path.rglob("*")) == before


def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path, capsys):
    assert command.pretrain(str(tmp_path / "none.yaml")) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"


def test_a_system_without_posix_locks_is_refused_in_one_line(corpus, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails now
    assert run(corpus, name) == 2
    err = capsys.readouterr().err
    assert err.startswith("output: expected a system with POSIX locks, got ") and err.count("\n") == 1


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(info, "find_spec", lambda module: None if module in ("yaml", "tqdm") else module)
    assert command.pretrain("run.yaml") == 2
    assert capsys.readouterr().err == f"train needs pyyaml, tqdm; type: {install_command('train')}\n"
