"""Two processes with a sharded model, over gloo on the CPU, against one process with both batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")

from models._small import BACKENDS, assert_close, small_model
from training._batches import STAGES, batch_number, masks_of, trainer
from training._runs import checkpoints, curves, same_training, write_config, write_images

from onepeace_fast import OnePeacePretrain
from onepeace_fast.models.losses import contrastive_loss
from onepeace_fast.training import command

TESTS = Path(__file__).resolve().parent.parent
PLAIN = {"drop_path_rate": 0.0, "dropout": 0.0}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which ``_processes.py`` ran under torchrun, and what it printed."""
    folder = tmp_path_factory.mktemp("processes")
    write_images(folder)
    keys = {"steps": 6, "checkpoint_every": 2, "workers": 1, "batch_size": 3}
    for name in ("straight", "stopped"):
        write_config(folder, name, **keys)
    write_config(folder, "bad", manifest="none.tsv")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(TESTS / "training" / "_processes.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


@pytest.fixture(scope="module")
def gathered(launched):
    return torch.load(launched[0] / "gradients.pt", weights_only=True)


def single_process(stage, precision):
    """Both batches in one process: contrast among all eight pairs, denoising inside each batch, the mean of both.

    The denoising terms are taken from each batch's own loss, the contrast from the embeddings of all.
    """
    model = trainer(stage, model=PLAIN, precision=precision).model
    other = "image" if stage == "vision_language" else "audio"
    contrast = "itc_loss" if other == "image" else "atc_loss"
    total, sums, embeddings = 0.0, {}, {"text": [], other: []}
    with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
        for rank in range(2):
            batch = batch_number(stage, rank)
            inputs = {name: batch[name] for name in ("text", "image", "audio", "audio_padding") if name in batch}
            parts = model(f"{stage}_loss", **inputs, masks=masks_of(stage, batch, rank))
            total = total + (parts["loss"] - parts[contrast]) / 2
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item() / 2
            with torch.set_grad_enabled(other == "image"):
                embeddings["text"].append(model.embed(text=batch["text"]))
            rest = {name: value for name, value in inputs.items() if name != "text"}
            embeddings[other].append(model.embed(**rest))
        joined = {name: torch.cat(values) for name, values in embeddings.items()}
        own, *correct = contrastive_loss(joined[other], joined["text"], model.logit_scale_exp())
    (total + own).backward()
    return {
        "loss": (total + own).item(),
        contrast: own.item(),
        "correct": sum(correct).item(),
        "denoising": {name: value for name, value in sums.items() if name.startswith("dcl_")},
    }, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_one_processs_loss_and_gradients(gathered, stage):
    numbers, gradients = gathered[f"{stage} float32"]
    wanted, wanted_gradients = single_process(stage, "float32")
    contrast = "itc_loss" if stage == "vision_language" else "atc_loss"
    assert numbers["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert numbers[contrast] == pytest.approx(wanted[contrast], rel=1e-5)
    assert {name: numbers[name] for name in wanted["denoising"]} == pytest.approx(wanted["denoising"], rel=1e-5)
    counts = [value for name, value in numbers.items() if name.endswith("_ncorrect")]
    assert 2 * sum(counts) == pytest.approx(wanted["correct"])
    assert "logit_scale" in gradients
    unread = gradients.keys() - wanted_gradients.keys()  # zeros, since processes train together
    assert unread and not any(gradients[name].any() for name in unread)
    assert_close({name: gradients[name] for name in gradients.keys() - unread}, wanted_gradients, 1e-4)
    norm = torch.stack([gradient.norm() for gradient in wanted_gradients.values()]).norm().item()
    assert numbers["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_and_checkpointed_activations_work_on_a_sharded_model(gathered, stage):
    numbers, gradients = gathered[f"{stage} bfloat16"]
    exact, exact_gradients = gathered[f"{stage} float32"]
    assert numbers["loss"] != exact["loss"]
    assert numbers["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in exact_gradients.items():
        if gradient.norm() > 0.01 * exact["gradient_norm"]:
            assert torch.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_distributed_data_parallel_finds_no_parameter_without_a_gradient(launched, stage, backend):
    without, values = torch.load(launched[0] / "parallel.pt", weights_only=True)[f"{stage} {backend}"]
    assert without == []
    assert all(value.isfinite().all() for value in values.values())


@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2"])
def test_a_model_sharded_over_two_processes_is_saved_whole_and_takes_another_one_s_values(launched, kind):
    for seed, name in enumerate(("first", "second")):
        saved = OnePeacePretrain.load(launched[0] / f"{kind} {name}").to_upstream_state_dict()
        expected = small_model("fused", dtype=torch.float32, seed=seed).to_upstream_state_dict()
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], value) for key, value in expected.items())


def test_two_processes_resume_in_the_same_bits_and_their_model_loads_in_one(launched):
    folder, done = launched
    assert done.stderr.count("Interrupted: the last checkpoint is") == 1
    assert done.stdout.count("2 x cpu, from the beginning to step 6") == 2
    assert done.stdout.count("2 x cpu, from step-00000002 to step 6") == 1
    straight, stopped = (folder / name for name in ("straight", "stopped"))
    assert same_training(straight / "step-00000006", stopped / "step-00000006")
    assert curves(stopped)["loss"] == curves(straight)["loss"]
    model = OnePeacePretrain.load(straight / "step-00000006")
    assert model.embed(image=torch.zeros(1, 3, 48, 48)).isfinite().all()
    state = torch.load(straight / "step-00000006" / "training.pt", weights_only=True)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: list(entry["exp_avg"].shape) for name, entry in state["optimizer"].items()}.items() <= shapes.items()
    first, second = state["generators"]
    assert not torch.equal(first["masks"], second["masks"])
    assert not torch.equal(first["cpu"], second["cpu"])


def test_a_checkpoint_of_two_processes_is_not_continued_by_one(launched, capsys):
    folder, _ = launched
    assert command.pretrain(str(folder / "stopped.yaml")) == 2
    assert "processes: 2 there, 1 here" in capsys.readouterr().err
    assert checkpoints(folder / "stopped") == ["step-00000004", "step-00000006"]


def test_bad_input_is_said_once(launched):
    _, done = launched
    assert done.stderr.count(", got no file there") == 1
    assert "Traceback" not in done.stderr
