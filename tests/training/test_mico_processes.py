"""MiCo over two processes, gloo on the CPU: what one process does with a batch as large as both of theirs."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from training._mico_runs import write_mico, write_samples
from training._runs import curves, same_training
from training.test_unival_processes import launch

from onepeace_fast.data.batches import BatchSampler
from onepeace_fast.training import command

pytestmark = pytest.mark.slow


def test_two_processes_train_as_one_and_resume(tmp_path, monkeypatch):
    """With two samples in a process the wrong partner of one is the other; one batch has no frames at all."""
    path = write_samples(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for place in next(iter(BatchSampler(8, 4, 0)))[:2]:  # all of the first process's, which so sees no frame
        rows[place[1]] = {"caption": rows[place[1]]["caption"], "subtitle": "it sounds on"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("onepeace_fast.models.mico.losses.draw_wrong", lambda *given: [1, 0, 3, 2])
    keys = {"backend": "fused", "checkpoint_every": 3}
    assert command.pretrain(str(write_mico(tmp_path, "one", **keys))) == 0
    path = write_mico(tmp_path, "two", batch_size=2, **keys)
    assert "2 x cpu, from the beginning to step 5" in launch(path)
    one, two = (curves(tmp_path / name) for name in ("one", "two"))
    for name in ("loss", "contrast", "matching", "caption"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    weights = [load_file(tmp_path / name / "step-00000005" / "model.safetensors") for name in ("one", "two")]
    # Adam's step is of one size however small the gradient, so where that is nothing but rounding, signs may differ.
    far = [name for name, value in weights[0].items() if (value - weights[1][name]).abs().mean() > 2e-3 * 0.01]
    assert far == []
    shutil.copytree(tmp_path / "two" / "step-00000005", tmp_path / "straight")
    shutil.rmtree(tmp_path / "two" / "step-00000005")
    assert "2 x cpu, from step-00000003 to step 5" in launch(path)
    assert same_training(tmp_path / "two" / "step-00000005", tmp_path / "straight")
