"""UnIVAL over two processes, gloo on the CPU: what one process does with a batch as large as both of theirs."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training._runs import curves, same_training
from training._unival_runs import write_tasks, write_unival

from onepeace_fast.training import command

pytestmark = pytest.mark.slow


def launch(path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "onepeace_fast.cli"]
    done = subprocess.run(
        [sys.executable, *launcher, "train", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_as_one_and_resume_in_the_second_stage(tmp_path):
    write_tasks(tmp_path)
    keys = {"backend": "fused", "smoothing": 0.1, "encouraging": True, "checkpoint_every": 4}
    assert command.pretrain(str(write_unival(tmp_path, "one", **keys))) == 0
    path = write_unival(tmp_path, "two", batch_size=4, **keys)
    assert "2 x cpu, from the beginning to step 7" in launch(path)
    one, two = (curves(tmp_path / name) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    weights = [load_file(tmp_path / name / "step-00000007" / "model.safetensors") for name in ("one", "two")]
    # Adam's step is of one size however small the gradient, so where that is nothing but rounding, signs may differ.
    far = [name for name, value in weights[0].items() if (value - weights[1][name]).abs().mean() > 2e-3 * 0.01]
    assert far == []
    shutil.copytree(tmp_path / "two" / "step-00000007", tmp_path / "straight")
    shutil.rmtree(tmp_path / "two" / "step-00000007")
    assert "2 x cpu, from step-00000004 to step 7" in launch(path)
    assert same_training(tmp_path / "two" / "step-00000007", tmp_path / "straight")
    state = torch.load(tmp_path / "straight" / "training.pt", weights_only=True)
    assert "encoder.video_proj.weight" in state["optimizer"] and "encoder.audio_proj.weight" not in state["optimizer"]
