"""Runs of UnIVAL: tasks in equal shares, a curriculum, its losses, and a restart in the middle of it."""

import copy
import json
import shutil

import numpy
import pytest
import torch
from data._refused import refused, taken
from models._small import assert_same_bits
from safetensors.torch import load_file, save_file
from training._runs import curves, same_training
from training._unival_runs import MODEL, SHAPES, STAGES, write_tasks, write_unival

from onepeace_fast.data.batches import BrokenFile
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.models.unival import Unival, UnivalConfig
from onepeace_fast.models.unival.state import TIED
from onepeace_fast.training import checkpoint, command
from onepeace_fast.training.config import TrainingConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.start import read_entries, read_run, start
from onepeace_fast.training.trainer import Trainer
from onepeace_fast.training.unival import Tasks
from onepeace_fast.training.unival_config import UnivalTrainingConfig

NOISY = MODEL | {"dropout": 0.2, "encoder_drop_path_rate": 0.2, "decoder_drop_path_rate": 0.2}
ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and "whole", a finished run of both stages."""
    folder = tmp_path_factory.mktemp("unival")
    write_tasks(folder)
    assert command.pretrain(str(write_unival(folder, "whole", model=NOISY, checkpoint_every=1, keep=9))) == 0
    return folder


def started(folder, name="fresh", processes=ONE, **keys):
    (folder / name).mkdir(exist_ok=True)
    config = read_run(write_unival(folder, name, **keys))
    return start(config, processes, read_entries(config, processes))


def refusal(folder, **keys):
    """The line by which the command refuses a configuration; nothing where it runs."""
    try:
        config = read_run(write_unival(folder, "refused", **keys))
        (folder / "refused").mkdir(exist_ok=True)
        start(config, ONE, read_entries(config, ONE))
    except ValueError as error:
        return str(error)
    return ""


STAGE = {"tasks": ["caption"], "steps": 3}


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"family": "beit"}, ["family: expected one of one_peace, unival, mico, got 'beit'"]),
        ({"stages": None}, ["expected stages, got no value"]),
        ({"stages": []}, ["stages: expected a list of stages", "got list []"]),
        ({"stages": [{"tasks": ["caption"]}]}, ["stages[0]: expected {tasks: [...], steps: N}, got dict"]),
        ({"stages": [STAGE, STAGE | {"steps": 0}]}, ["stages[1].steps: expected a positive integer, got int 0"]),
        ({"stages": [STAGE | {"tasks": ["captoin"]}]}, ["stages[0].tasks: expected some of caption, vqa", "captoin"]),
        ({"stages": [STAGE | {"tasks": ["vqa", "vqa"]}]}, ["stages[0].tasks: expected", "each once"]),
        ({"stages": [STAGE], "warm_up": 3}, ["warm_up: expected fewer than the steps of stages[0] (3), got 3"]),
        ({"batch_size": 6}, ["stages[0]: batch_size: expected a multiple of 4", "matching has as many", "got 6"]),
        ({"smoothing": 1.0}, ["smoothing: expected a number from 0 to below 1, got float 1.0"]),
        ({"encouraging": "yes"}, ["encouraging: expected true or false, got str 'yes'"]),
        ({"seed": 2**64}, ["seed: expected an integer from 0 to below 2**64, got int 18446744073709551616"]),
        ({"bins": 100}, ["vocab_size: expected at least 260, got 220", "of the model's 320 rows 100 are kept for loc"]),
        (
            {"bins": 60, "tokenizer": "whole/step-00000007/tokenizer.json"},
            [" tokens and 60 locations, got 320", "vocab_size: expected at least "],
        ),
        ({"bins": 1}, ["bins: expected an integer from 2 on, got int 1"]),
        ({"steps": 3}, ["expected some of", "got 'steps'"]),
        ({"model": MODEL | {"video": False}}, ["model: expected video for the tasks", "give video: true"]),
        ({"model": MODEL | {"layers": 2}}, ["model: config: expected some of", "unknown fields ['layers']"]),
        ({"manifest": "none.jsonl"}, ["none.jsonl: expected a manifest of JSON lines"]),
        ({"init": "whole/none"}, ["init: expected the folder of a model"]),
        ({"init": "whole/step-00000007", "model": None, "bins": 10}, ["bins: expected 11, with which", "got 10"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_in_one_line(folder, keys, parts):
    line = refusal(folder, **keys)
    assert [part for part in parts if part not in line] == [] and "\n" not in line, line


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("training.pt", "{path}: expected a whole checkpoint, got one that cannot be read"),
        ("model.safetensors", "init: {path}: cannot be read"),
        ("config.json", "init: {path}: expected a configuration that save() wrote, got no JSON"),
        ("tokenizer.json", "{path}: expected a tokenizer.json of tokenizers, got another file"),
    ],
)
def test_a_truncated_initial_model_is_refused_in_one_line(folder, name, says):
    place = folder / f"truncated {name}"
    shutil.copytree(folder / "whole" / "step-00000007", place)
    path = place / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = ""
    try:
        line = refusal(folder, init=place.name, model=None)
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
    assert line.startswith(says.format(path=path)) and "\n" not in line, line


def test_each_step_has_its_stage_and_place_and_the_end_is_the_last_ones(tmp_path):
    config = read_run(write_unival(tmp_path))
    places = [config.stage_of(step) for step in range(8)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert config.total == 7 and [config.schedule(step) for step in (2, 5)] == [(2, 3), (2, 4)]


def test_a_configuration_of_another_family_is_refused_by_its_family(folder):
    for kind, keys, line in (
        (TrainingConfig, {}, "family: expected one_peace, got 'unival'"),
        (UnivalTrainingConfig, {"family": None}, "family: expected unival, got None"),
    ):
        path = write_unival(folder, "other", **keys)
        refused(lambda: kind.load(path), path, line)  # noqa: B023


def test_an_unknown_task_stops_the_command_by_file_and_line(folder, capsys):
    path = folder / "typo.jsonl"
    path.write_text((folder / "tasks.jsonl").read_text() + json.dumps({"task": "captoin"}) + "\n")
    assert command.pretrain(str(write_unival(folder, "typo", manifest="typo.jsonl"))) == 2
    err = capsys.readouterr().err
    assert f"{path}, line 25: task: expected one of caption, vqa" in err and "did you mean caption?" in err
    assert err.count("\n") == 1 and not (folder / "typo").exists()


def test_two_stages_are_those_of_a_plain_loop(folder):
    """Each with an optimizer of its own over what its tasks read; all of it decays, the loss is as configured."""
    keys = {"smoothing": 0.2, "encouraging": True, "accumulation": 2, "clip": 0.5, "weight_decay": 0.3, "warm_up": 0}
    stages = [{"tasks": ["caption", "vqa"], "steps": 2}, {"tasks": ["caption", "video_caption"], "steps": 2}]
    run = started(folder, "loop", stages=stages, **keys)
    model, taken = copy.deepcopy(run.trainer.model), []

    def kept():
        for batch in run.batches:
            taken.append(batch)
            yield batch

    batches = kept()
    got = [run.trainer.step(batches) for _ in range(4)]

    given = {name: p.requires_grad_() for name, p in model.named_parameters()}
    unread = {
        "image_pos_ln", "embed_image_positions", "image_rel_pos_table_list", "code_layernorm_embedding",
    }  # of the decoder, which writes no codes  # fmt: skip
    for stage, absent in enumerate((("video", "audio"), ("audio",))):
        names = [f"encoder.{name}" for one in absent for name in (f"{one}_proj", f"embed_{one}_positions")]
        frozen = (*names, *(f"decoder.{name}" for name in unread))
        trained = [p for name, p in given.items() if not name.startswith(frozen)]
        optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), weight_decay=0.3, fused=True)
        for step, rate in enumerate((0.01, 0.005)):
            number, losses = 2 * stage + step, []
            model.zero_grad()
            for batch in taken[2 * number : 2 * number + 2]:
                inputs = {name: value for name, value in batch.items() if name != "tasks"}
                loss = model.loss(**inputs, smoothing=0.2, encouraging=True)
                (loss / 2).backward()
                losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            assert got[number]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
            assert got[number]["learning_rate"] == pytest.approx(rate)
    own = {name: parameter.detach() for name, parameter in given.items()}
    found = run.trainer.weights()
    assert [name for name in own if not torch.allclose(found[name], own[name], rtol=1e-4, atol=1e-6)] == []
    before = started(folder, "loop2", stages=stages, **keys).trainer.weights()
    assert torch.equal(found["encoder.audio_proj.weight"], before["encoder.audio_proj.weight"])
    assert not torch.equal(found["encoder.video_proj.weight"], before["encoder.video_proj.weight"])


def test_every_batch_of_a_run_holds_equally_many_of_its_stages_tasks(folder):
    batches = [sorted(batch["tasks"]) for batch in started(folder).batches]
    assert batches == [
        sorted(stage["tasks"] * (8 // len(stage["tasks"]))) for stage in STAGES for _ in range(stage["steps"])
    ]


def test_the_seed_decides_order_and_weights(folder):
    first, same, other = (started(folder, seed=seed) for seed in (1, 1, 2))
    sources = [[batch["source"] for batch in run.batches] for run in (first, same, other)]
    assert_same_bits(first.trainer.weights(), same.trainer.weights())
    assert all(map(torch.equal, sources[0], sources[1]))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(sources[0], sources[2], strict=True))
    weights = [run.trainer.weights()["encoder.image_proj.weight"] for run in (first, other)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_stopped_in_its_second_stage_ends_in_the_same_bits(folder, monkeypatch, stop):
    """At its very beginning, and in its middle; steps behind the last checkpoint are taken again."""
    name, take = f"stopped{stop}", Trainer.step

    def interrupted(self, batches):
        if self.step_number == stop:
            raise KeyboardInterrupt
        return take(self, batches)

    path = str(write_unival(folder, name, model=NOISY, checkpoint_every=3 if stop == 3 else 4))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert command.pretrain(path) == 130
    assert command.pretrain(path) == 0
    assert same_training(folder / name / "step-00000007", folder / "whole" / "step-00000007")
    assert curves(folder / name)["loss"] == curves(folder / "whole")["loss"]


def test_a_checkpoint_says_what_was_trained_by_then_and_loads_as_a_model(folder):
    trained = [checkpoint.load_state(folder / "whole" / f"step-{step:08d}")["trained"] for step in (3, 4)]
    assert trained == [["text", "image"], ["text", "image", "video"]]
    place = folder / "whole" / "step-00000007"
    model, again = Unival.load(place), Unival.load(str(place), "reference")
    assert model.config.feature_channels == MODEL["feature_channels"] and again.backend == "reference"
    assert_same_bits(model.to_upstream_state_dict(), again.to_upstream_state_dict())
    written = load_file(place / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in model.named_parameters())


def test_audio_is_fine_tuned_from_a_checkpoint(folder, capsys):
    keys = {"init": "whole/step-00000007", "stages": [{"tasks": ["audio_caption"], "steps": 2}], "model": None}
    assert command.pretrain(str(write_unival(folder, "audio", **keys))) == 0
    assert "Training audio_caption (3) in 1 stage" in capsys.readouterr().out
    before, after = (folder / run for run in ("whole/step-00000007", "audio/step-00000002"))
    assert (before / "tokenizer.json").read_bytes() == (after / "tokenizer.json").read_bytes()
    own, new = (load_file(path / "model.safetensors") for path in (before, after))
    changed = {name for name, value in own.items() if not torch.equal(value, new[name])}
    assert {"encoder.audio_proj.weight", "encoder.embed_tokens.weight"} <= changed
    assert not {name for name in changed if "image_proj" in name or "embed_image" in name or "video_" in name}
    assert checkpoint.load_state(after)["trained"] == ["text", "image", "video", "audio"]


@pytest.mark.parametrize("name", ["audio", "video"])
def test_a_modality_is_added_with_its_network(folder, name):
    """Network and statistics are fresh, all else is the initial model's."""
    blocks = {"image_blocks": [1, 1, 1, 1], "video_blocks": [1, 1, 1, 1]}
    sizes = MODEL | blocks | {"networks": True, "feature_channels": 512, "video": False, "audio": False}
    config, place = UnivalConfig.from_dict(sizes), folder / f"without {name}"
    place.mkdir()
    config.save(place / "config.json")
    shutil.copy(folder / "whole" / "step-00000007" / "tokenizer.json", place)
    state = Unival(config, "reference").to_upstream_state_dict()
    weights = {key: value for key, value in state.items() if key not in TIED}
    save_file(weights, place / "model.safetensors")
    with taken():
        stages = [{"tasks": [f"{name}_caption"], "steps": 2}]
        found = started(folder, f"with {name}", init=place.name, model={name: True}, stages=stages).trainer.weights()
    assert_same_bits({key: found[key] for key in weights}, weights)
    added = {key for key in found if key not in weights}
    assert {f"encoder.{name}_proj.weight", f"encoder.embed_{name}_positions.weight"} <= added
    assert all(found[key].eq(0).all() for key in added if key.endswith("running_mean"))
    assert any(key.endswith("running_mean") for key in added)


def test_broken_maps_are_named_or_skipped(folder):
    lines = (folder / "tasks.jsonl").read_text().splitlines()
    (folder / "bad.npy").write_text("no map")
    row = json.loads(lines[0]) | {"image": "bad.npy"}
    (folder / "broken.jsonl").write_text("\n".join([json.dumps(row), *lines]) + "\n")
    keys = {"manifest": "broken.jsonl", "stages": [{"tasks": ["caption"], "steps": 2}]}
    with pytest.raises(BrokenFile) as caught:
        list(started(folder, "bad1", **keys).batches)
    assert f"{folder / 'bad.npy'}: expected an array" in str(caught.value)
    assert len(list(started(folder, "bad2", broken="skip", **keys).batches)) == 2


@pytest.mark.parametrize(("file", "size"), [("image", (6, 1, 5)), ("video", (6, 2, 5, 1)), ("audio", (6, 17, 1))])
def test_a_map_larger_than_the_positions_is_named_or_skipped(folder, file, size):
    task = {"image": "caption"}.get(file, f"{file}_caption")
    numpy.save(folder / "large.npy", numpy.zeros(size, "float32"))
    rows = [{"task": task, file: name, "caption": "a wall"} for name in ("large.npy", f"{file}0.npy")]
    (folder / "large.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"manifest": "large.jsonl", "stages": [{"tasks": [task], "steps": 1}], "batch_size": 4, "warm_up": 0}
    line = ""
    try:
        list(started(folder, f"large {file}", **keys).batches)
    except BrokenFile as error:
        line = str(error)
    expected = f"{folder / 'large.npy'}: {file}: expected a map of at most 4 x 4 positions, got one that takes 5 x "
    assert line.startswith(expected.replace("5 x ", "1 x 5") if file == "image" else expected)
    (batch,) = started(folder, f"large {file} skipped", broken="skip", **keys).batches
    assert batch[file].shape[2:] == SHAPES[file][1:]


def test_a_processs_loss_counts_by_its_tokens(folder):
    """The mean over processes is that of all their tokens."""

    class Two(Processes):
        def average(self, value):
            return (value + 37.0) / 2  # the other has 37 tokens

    run = started(folder, "share")
    batch = next(run.batches)
    inputs = {name: value for name, value in batch.items() if name != "tasks"}
    own, tokens = run.trainer.model.loss(**inputs).item(), (batch["target"] != 1).sum().item()
    assert tokens != 37
    run.trainer.processes = Two(0, 1, torch.device("cpu"))
    loss = run.trainer.losses(batch)["loss"].item()
    assert loss == pytest.approx(own * tokens / ((tokens + 37) / 2), rel=1e-5)


def test_accumulated_batches_go_on_where_a_checkpoint_stopped(folder):
    config = read_run(write_unival(folder, "accumulated", accumulation=2))
    tasks, place = Tasks(config, read_entries(config, ONE)), folder / "whole" / "step-00000007"
    model, tokenizer = UnivalConfig.load(place / "config.json"), Tokenizer.load(place / "tokenizer.json")
    whole, later = (list(tasks.reading(model, tokenizer, ONE, step)[1]) for step in (0, 2))
    assert len(whole) == 14 and later == whole[4:]


def test_networks_train_on_images_and_their_statistics_are_in_checkpoints(tmp_path, monkeypatch):
    from PIL import Image

    rows = []
    for place, word in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), word).save(tmp_path / f"{place}.png")
        rows.append({"task": "caption", "image": f"{place}.png", "caption": f"a {word} wall"})
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = MODEL | {"networks": True, "feature_channels": 512, "image_blocks": [1, 1, 1, 1], "video": False}
    keys = {"model": model | {"audio": False}, "stages": [{"tasks": ["caption"], "steps": 2}], "batch_size": 3}
    path = str(write_unival(tmp_path, checkpoint_every=1, image_size=32, **keys))
    assert command.pretrain(path) == 0
    folders = [tmp_path / "run" / f"step-{step:08d}" for step in (1, 2)]
    first, last = (load_file(folder / "model.safetensors") for folder in folders)
    names = {"encoder.embed_images.conv1.weight", "encoder.embed_images.bn1.running_mean"}
    assert names <= first.keys() & last.keys()
    assert [name for name in names if torch.equal(first[name], last[name])] == []
    folders[1].rename(tmp_path / "straight")
    assert command.pretrain(path) == 0
    assert same_training(folders[1], tmp_path / "straight")
