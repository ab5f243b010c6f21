"""A fused model in two processes over gloo, in DDP and in FSDP2, against one process with both batches, not fused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.fusion._one_peace import Wrapper
from tests.fusion._steps import STEPS, loss_of, optimizer_of, part

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "fusion" / "_processes.py"), str(folder)],
        capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "losses.pt")


def losses_of_one_process() -> list[float]:
    model = Wrapper(drop_path=0.0).train()
    optimizer = optimizer_of(model)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(loss_of(model, part(step, rank)) for rank in range(2)) / 2
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", ["parallel", "sharded"])
def test_two_processes_train_as_one_though_a_rank_lacks_a_modality(found, way):
    expected = losses_of_one_process()
    apart = max(abs(a - b) for a, b in zip(found[way], expected, strict=True))
    assert len(found[way]) == STEPS and apart < 1e-4 * max(expected), (found[way], expected)
    assert max(expected) - min(expected) > 100 * apart
