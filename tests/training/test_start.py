"""What a run starts with: every key of its configuration reaches the part that it is about."""

import logging

import numpy
import pytest
import torch
from data._refused import taken
from models._small import assert_same_bits
from training._runs import write_clips, write_config, write_images

from onepeace_fast.data.batches import BatchSampler, PairDataset, collate
from onepeace_fast.data.manifest import read_manifest
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.training import checkpoint, train
from onepeace_fast.training.config import TrainingConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.start import read_entries, start

ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    write_clips(tmp_path)
    image, noise = pytest.importorskip("PIL.Image"), numpy.random.default_rng(0)
    for path in tmp_path.glob("*.png"):  # so that one crop differs from another
        image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype="uint8")).save(path)
    (tmp_path / "run").mkdir()
    return tmp_path


def started(folder, processes=ONE, **keys):
    config = TrainingConfig.load(write_config(folder, **keys))
    return start(config, processes, read_entries(config, processes))


def test_the_seed_decides_the_weights_that_a_model_starts_with(folder):
    first, same, other = (started(folder, seed=seed).trainer.weights() for seed in (1, 1, 2))
    drawn = [name for name, value in first.items() if value.amin() < value.amax()]
    assert len(drawn) > 50
    assert all(torch.equal(first[name], same[name]) for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_the_initial_scale_is_that_of_linear_weights_alone(folder):
    before, after = (started(folder, initial_scale=scale).trainer.weights() for scale in (1.0, 3.0))
    scaled = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert all(torch.equal(after[name], 3 * before[name]) for name in scaled)
    assert "text_proj.weight" in scaled and len(scaled) > 20
    assert not any("embed_tokens" in name or name.endswith("bias") or "norm" in name for name in scaled)


@pytest.fixture
def alone(monkeypatch):
    """A process that is not the only one does not wait for the others."""
    monkeypatch.setattr(Processes, "place", lambda self, model: None)
    monkeypatch.setattr(Processes, "on_main", lambda self, function: function())


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_follow_the_seed_the_process_and_its_number(folder, alone, rank):
    run = started(folder, Processes(rank, 2, torch.device("cpu")), seed=5)
    tokenizer = Tokenizer.load(folder / "run" / "tokenizer.json")
    entries = read_manifest(folder / "images.tsv", "image")
    pairs = PairDataset(entries, tokenizer, "image", side=run.batches._dataset.side, seed=5)
    keys = iter(BatchSampler(10, 4, 5, rank, 2))
    for _ in range(3):  # an epoch has one batch of each process
        assert_same_bits(next(run.batches), collate([pairs[key] for key in next(keys)]))


def test_files_that_are_broken_or_missing_are_skipped_where_the_configuration_says_so(folder, caplog):
    (folder / "3.png").write_bytes(b"not an image")
    (folder / "4.png").unlink()
    with caplog.at_level(logging.WARNING), taken():
        run = started(folder, broken="skip", missing="skip", batch_size=9)
        assert len(next(run.batches)["text"]) == 9
    assert run.settings["pairs"] == 9
    assert sum("3.png" in line and "next pair" in line for line in caplog.messages) == 1
    assert sum("1 of 10 pairs" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_the_model_runs_by_the_configurations_backend(folder, backend):
    model = started(folder, backend=backend).trainer.model
    assert (model.encoder_wrapper.resolved_backend, model.decoder_wrapper.resolved_backend) == (backend, backend)


def test_settings_tell_other_contents_of_as_many_pairs_apart(folder):
    before = started(folder).settings
    tokenizer = (folder / "run" / "tokenizer.json").read_text()
    (folder / "own.json").write_text(tokenizer + "\n")
    keys = {"tokenizer": "own.json"}
    own = started(folder, **keys).settings
    manifest = folder / "images.tsv"
    manifest.write_text(manifest.read_text().replace("number 9", "number 8"))
    after = started(folder, **keys).settings
    changed = [[line.split(":")[0] for line in checkpoint.differences(*pair)] for pair in ((before, own), (own, after))]
    assert changed == [["contents of tokenizer"], ["contents of manifest"]]
    assert before["device"] == "cpu" and before["processes"] == 1


def test_the_speed_counts_every_batch_of_every_process(folder, alone, monkeypatch):
    class Begun(Exception):
        """Stops the run where its logs begin."""

    def begin(output, step, steps, every, pairs):
        raise Begun(step, steps, every, pairs)

    monkeypatch.setattr(train, "Logs", begin)
    config = TrainingConfig.load(write_config(folder, accumulation=3, log_every=5))
    with pytest.raises(Begun) as begun:
        train.train(config, Processes(0, 2, torch.device("cpu")))
    assert begun.value.args == (0, 4, 5, 4 * 3 * 2)


def test_convolutions_on_a_gpu_are_asked_for_the_same_bits_in_every_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    with Processes.start("cuda"):
        assert torch.backends.cudnn.deterministic
