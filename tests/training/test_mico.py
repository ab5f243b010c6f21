"""Runs of MiCo: samples of any modalities, its three losses, and a restart."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from models._small import assert_same_bits
from safetensors.torch import load_file
from training._mico_runs import MODEL, VOCABULARY, write_mico, write_samples
from training._runs import curves, same_training

from onepeace_fast.data.batches import BrokenFile
from onepeace_fast.models.mico import Masked, Mico
from onepeace_fast.training import checkpoint, command
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.mico import MixedSamples
from onepeace_fast.training.start import read_entries, read_run, start
from onepeace_fast.training.trainer import Trainer

NOISY = MODEL | {"vision": MODEL["vision"] | {"drop_path_rate": 0.3}}
ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and "whole", a finished run."""
    folder = tmp_path_factory.mktemp("mico")
    write_samples(folder)
    assert command.pretrain(str(write_mico(folder, "whole", model=NOISY, checkpoint_every=1, keep=9))) == 0
    return folder


def started(folder, name="fresh", processes=ONE, **keys):
    (folder / name).mkdir(exist_ok=True)
    config = read_run(write_mico(folder, name, **keys))
    return start(config, processes, read_entries(config, processes))


def refusal(folder, **keys):
    """The line by which the command refuses a configuration; nothing where it runs."""
    try:
        config = read_run(write_mico(folder, "refused", **keys))
        (folder / "refused").mkdir(exist_ok=True)
        start(config, ONE, read_entries(config, ONE))
    except ValueError as error:
        return str(error)
    return ""


def text(**changed):
    return {"model": MODEL | {"text": MODEL["text"] | changed}}


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"tokenizer": None}, "tokenizer: expected BERT's tokenizer.json, or init with one, got none"),
        ({"tokenizer": "samples.jsonl"}, "expected a tokenizer.json of tokenizers, got another file"),
        ({"batch_size": 1}, "batch_size: expected at least 2, since a caption is matched with another's sample, got 1"),
        ({"batch_size": 9}, "batch_size: expected at most the 8 pairs of the dataset"),
        ({"warm_up": 5}, "warm_up: expected fewer than steps (5), got 5"),
        ({"stage": "vision_language"}, "got 'stage'"),
        ({"manifest": "none.jsonl"}, "none.jsonl: expected a manifest of JSON lines, got no file there"),
        ({"model": MODEL | {"frames": {"vision": 3}}}, "samples.jsonl, line 1: expected some of caption, subtitle, "
                                                       "image, video, vision, got 'depth'"),
        ({"model": MODEL | {"frames": ["vision"]}}, "model: frames: expected modalities with their numbers of frames"),
        ({"model": MODEL | {"vision": None}}, "model: vision: expected the encoder's sizes, got None"),
        ({"model": MODEL | {"caption_weight": "x"}}, "model: caption_weight: expected a weight of at least 0, got 'x'"),
        ({"model": MODEL | {"contrast_weight": 0, "matching_weight": 0, "caption_weight": 0}},
         "model: contrast_weight, matching_weight, caption_weight: expected one above 0, got none"),
        (text(mask_id=103), "model: text.mask_id: expected a token below vocab_size, 16, got 103"),
        (text(mask_id=1), "model: expected text.mask_id 4, the tokenizer's [MASK], got 1"),
        (text(first_word=3), "model: expected text.first_word of at least 5, behind the tokenizer's special tokens"),
        (text(vocab_size=12), "tokenizer: expected at most the model's text.vocab_size, 12, got 16 tokens"),
        (text(max_positions=2), "model: expected text.max_positions of at least 3, [CLS], a token and [SEP], got 2"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused_in_one_line(folder, keys, part):
    line = refusal(folder, **keys)
    assert part in line and "\n" not in line, line


def test_the_mask_and_the_first_word_are_the_tokenizer_s_unless_a_configuration_says_others(folder):
    own = {name: value for name, value in MODEL["text"].items() if name not in ("mask_id", "first_word")}
    sizes = []
    for name, given in (("own_words", {}), ("later_words", {"first_word": 7})):
        model = started(folder, name, model=MODEL | {"text": own | given}).trainer.model
        sizes.append((model.config.text.vocab_size, model.config.text.mask_id, model.config.text.first_word))
    assert sizes == [(16, 4, 5), (16, 4, 7)]


def test_a_sample_without_any_modality_stops_the_command_by_file_and_line(folder, capsys):
    path = folder / "bare.jsonl"
    path.write_text((folder / "samples.jsonl").read_text() + json.dumps({"caption": "a wall"}) + "\n")
    assert command.pretrain(str(write_mico(folder, "bare", manifest="bare.jsonl"))) == 2
    err = capsys.readouterr().err
    assert f"{path}, line 9: expected at least one of subtitle, image" in err
    assert err.count("\n") == 1 and not (folder / "bare").exists()


def test_steps_are_those_of_a_plain_loop(folder):
    """The three losses with their weights, over batches whose masks come with them; wrong pairs by the generator."""
    weights = {"contrast_weight": 0.5, "matching_weight": 2.0, "caption_weight": 0.25}
    run = started(folder, "loop", model=MODEL | weights, warm_up=0, weight_decay=0.3, accumulation=2, clip=0.5)
    model, taken = copy.deepcopy(run.trainer.model), []
    generator = torch.Generator()
    generator.set_state(run.trainer.masks.get_state())

    def kept():
        for batch in run.batches:
            taken.append(batch)
            yield batch

    got = run.trainer.step(kept())
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in model.named_parameters() if p.requires_grad and is_matrix(name, p) is one],
               "weight_decay": 0.3 * one} for one in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), fused=True)
    sums = dict.fromkeys(("loss", "contrast", "matching", "caption"), 0.0)
    for batch in taken:
        inputs = {name: value for name, value in batch.items() if name not in ("hidden", "masked")}
        masked = Masked(batch["masked"], batch["hidden"])
        parts = model.losses(**inputs, masked=masked, generator=generator)
        loss = sum(weights[f"{name}_weight"] * parts[name].item() for name in ("contrast", "matching", "caption"))
        assert parts["loss"].item() == pytest.approx(loss, rel=1e-5)
        (parts["loss"] / 2).backward()
        sums = {name: value + parts[name].item() / 2 for name, value in sums.items()}
    assert {name: got[name] for name in sums} == pytest.approx(sums, rel=1e-5)
    torch.nn.utils.clip_grad_norm_(trained, 0.5)
    optimizer.step()
    found = run.trainer.weights()
    far = [n for n, p in model.named_parameters() if not torch.allclose(found[n], p, rtol=1e-4, atol=1e-5)]
    assert far == []


def is_matrix(name, parameter):
    return parameter.dim() > 1 and not name.endswith("pos_embed")


def test_what_no_sample_reads_keeps_its_weights(folder):
    """Decay included: the audio, and the heads of what is never together."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[6]) * 2))
    run = started(folder, "unread", manifest="images.jsonl", weight_decay=1.0, warm_up=0)
    before = copy.deepcopy(run.trainer.weights())
    run.trainer.step(run.batches)
    after = run.trainer.weights()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {"hidden_trans_audio_multimodal.0.weight", "audio_frame_embedding", "contra_head_vas.weight",
            "contra_head_normal.linear.weight", "vision_encoder.visual.head.weight"} <= same  # fmt: skip
    assert not {"hidden_trans_depth_multimodal.0.weight", "contra_head_id.weight", "itm_head.linear1.weight"} & same
    assert run.trained(1) == ["text", "vision", "depth"]


def test_the_seed_decides_order_masks_and_weights(folder):
    first, same, other = (started(folder, seed=seed) for seed in (1, 1, 2))
    masked = [next(run.batches)["masked"] for run in (first, same, other)]
    assert torch.equal(masked[0], masked[1])
    assert masked[0].shape != masked[2].shape or not torch.equal(masked[0], masked[2])
    assert_same_bits(first.trainer.weights(), same.trainer.weights())
    assert not torch.equal(*(run.trainer.weights()["itm_head.linear1.weight"] for run in (first, other)))


def test_a_stopped_run_ends_in_the_same_bits(folder, monkeypatch):
    """Steps behind the last checkpoint are taken again; DropPath and wrong pairs are drawn as they would have been."""
    take = Trainer.step

    def interrupted(self, batches):
        if self.step_number == 3:
            raise KeyboardInterrupt
        return take(self, batches)

    path = str(write_mico(folder, "stopped", model=NOISY))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert command.pretrain(path) == 130
    assert command.pretrain(path) == 0
    assert same_training(folder / "stopped" / "step-00000005", folder / "whole" / "step-00000005")
    assert curves(folder / "stopped")["matching"] == curves(folder / "whole")["matching"]


def test_a_checkpoint_loads_as_a_model_with_the_tokenizer_s_words(folder):
    place = folder / "whole" / "step-00000005"
    model, again = Mico.load(place), Mico.load(str(place), "reference")
    assert model.config.text.vocab_size == len(VOCABULARY) and {*model.config.frames} == {*MODEL["frames"]}
    assert again.backend == "reference"
    written = load_file(place / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in model.named_parameters())
    assert checkpoint.load_state(place)["trained"] == ["text", "vision", "audio", "depth", "normal", "subtitle"]
    assert (place / "tokenizer.json").read_bytes() == (folder / "bert.json").read_bytes()


def test_a_checkpoint_takes_up_a_modality(folder):
    frames = MODEL["frames"] | {"thermal": 2}
    row = {"caption": "a red wall", "thermal": "red0.png"}
    (folder / "thermal.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"caption": "blue"}) + "\n")
    keys = {"init": "whole/step-00000005", "tokenizer": None, "manifest": "thermal.jsonl", "batch_size": 2}
    run = started(folder, "thermal", model={"frames": frames}, **keys)
    weights, own = load_file(folder / "whole" / "step-00000005" / "model.safetensors"), run.trainer.weights()
    assert_same_bits({name: own[name] for name in weights}, weights)
    added = {name for name in own if name not in weights}
    assert {"thermal_type_embeddings", "contra_head_thermal.linear.weight"} <= added
    run.trainer.step(run.batches)
    assert run.trained(1) == ["text", "vision", "audio", "depth", "normal", "thermal", "subtitle"]


def test_heads_of_what_a_new_modality_is_joined_with_start_fresh(folder):
    config = Mico.load(folder / "whole" / "step-00000005").config
    old, model = (
        Mico(dataclasses.replace(config, frames=frames)) for frames in ({"vision": 3}, {"vision": 3, "audio": 2})
    )
    weights = old.to_upstream_state_dict()
    fresh = MixedSamples(None, None).fresh(model, weights)
    assert {*fresh} == {name for name, _ in model.named_parameters()} - {*weights}
    assert {"contra_head_va.weight", "contra_head_vas.bias", "audio_frame_embedding"} <= {*fresh}


def test_a_run_goes_on_without_the_model_that_it_began_with(folder):
    shutil.copytree(folder / "whole" / "step-00000005", folder / "initial")
    keys = {"init": "initial", "tokenizer": None, "model": None, "steps": 2, "checkpoint_every": 1}
    path = str(write_mico(folder, "onward", **keys))
    assert command.pretrain(path) == 0
    shutil.rmtree(folder / "initial")
    last = folder / "onward" / "step-00000002"
    last.rename(folder / "before")
    assert command.pretrain(path) == 0
    assert same_training(last, folder / "before")


@pytest.mark.slow
def test_a_small_model_learns_which_caption_belongs_to_what(folder):
    learned = MODEL | {"vision": MODEL["vision"] | {"width": 32}, "text": MODEL["text"] | {"width": 24, "ffn_dim": 48}}
    run = started(folder, "learned", model=learned, batch_size=8, steps=150, warm_up=10, learning_rate=5e-3)
    numbers = [run.trainer.step(run.batches) for _ in range(150)]
    first, last = (
        {name: sum(one[name] for one in part) / 10 for name in ("contrast", "matching", "caption")}
        for part in (numbers[:10], numbers[-10:])
    )
    assert last["contrast"] < 0.7 * first["contrast"]
    assert last["matching"] < 0.5 * first["matching"] and last["caption"] < 0.5 * first["caption"]


def test_broken_files_are_named_or_skipped(folder):
    (folder / "bad.png").write_text("no image")
    lines = (folder / "samples.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | {"image": "bad.png"}
    (folder / "broken.jsonl").write_text("\n".join([json.dumps(row), *lines[1:4]]) + "\n")
    with pytest.raises(BrokenFile) as caught:
        next(started(folder, "bad1", manifest="broken.jsonl").batches)
    assert f"{folder / 'broken.jsonl'}, line 1: image: {folder / 'bad.png'}: expected" in str(caught.value)
    assert len(next(started(folder, "bad2", manifest="broken.jsonl", broken="skip").batches)["text"]) == 4


def test_accumulated_batches_go_on_where_a_checkpoint_stopped(folder):
    run = started(folder, "accumulated", accumulation=2)
    family = MixedSamples(run.trainer.config, read_entries(run.trainer.config, ONE))
    tokenizer = family.tokenizer_class.load(folder / "bert.json")
    whole, later = (iter(family.reading(run.trainer.model.config, tokenizer, ONE, step)[1]) for step in (0, 2))
    assert [next(whole) for _ in range(6)][4:] == [next(later) for _ in range(2)]
