"""Two processes over gloo read a file shard by shard: each holds its part, and together they compute the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models._encoder_only import retrieval
from models._small import image_batch
from pretrained._files import checkpoint_of, write

from onepeace_fast import from_pretrained

TESTS = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def test_each_process_holds_its_part_and_all_have_the_file_s_values(tmp_path):
    path = write(tmp_path / "a.pt", checkpoint_of(retrieval("text", "image")))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, str(TESTS / "pretrained" / "_sharded.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for dtype in (None, "bf16"):
        whole = from_pretrained(path, dtype=dtype, backend="fused")
        state, total = whole.to_upstream_state_dict(), sum(value.numel() for value in whole.parameters())
        with torch.no_grad():
            expected = whole.embed(image=image_batch(2, 3, dtype=whole.logit_scale.dtype))
        for rank in range(2):
            found = torch.load(tmp_path / f"{dtype}{rank}.pt", weights_only=True)
            assert found["state"].keys() == state.keys()
            for name, value in found["state"].items():
                assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
            assert found["own"] < 0.6 * total
            assert torch.equal(found["embedding"], expected)
