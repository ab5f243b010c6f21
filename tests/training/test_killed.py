"""A real process of the training command, with workers, interrupted and killed from outside."""

import os
import signal
import subprocess
import sys
import time

import pytest
from training._runs import checkpoints, same_training, write_config, write_images

from onepeace_fast.training import command

# Slow steps, so that a signal meets a run under way.
PROGRAM = """
import signal, sys, time, torch
from onepeace_fast.training import command
from onepeace_fast.training.trainer import Trainer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
torch.set_num_threads(1)
take = Trainer.step
def slowly(self, batches):
    time.sleep(0.2)
    return take(self, batches)
Trainer.step = slowly
sys.exit(command.pretrain(sys.argv[1]))
"""


def run_until(config, output, step, sign, everyone):
    """Run the command, signal it or its whole group once the checkpoint of ``step`` is there: code, output, errors."""
    out, err = (output.with_name(f"{name}.txt") for name in ("out", "err"))
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(config)], stdout=out_file, stderr=err_file, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while f"step-{step:08d}" not in checkpoints(output):
        assert process.poll() is None, err.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (os.killpg if everyone else os.kill)(process.pid, sign)
    return process.wait(timeout=60), out.read_text(), err.read_text()


@pytest.mark.slow
def test_a_run_that_was_interrupted_and_killed_ends_as_one_that_was_not(tmp_path, capsys):
    write_images(tmp_path)
    keys = {"steps": 24, "checkpoint_every": 4, "keep": 1, "workers": 2}
    stopped, straight = (write_config(tmp_path, name, **keys) for name in ("stopped", "straight"))
    code, _, err = run_until(stopped, tmp_path / "stopped", 4, signal.SIGINT, everyone=True)  # as a terminal does
    assert code == 130
    assert "Traceback" not in err
    last = checkpoints(tmp_path / "stopped")[-1]
    assert err.splitlines()[-1].startswith(f"Interrupted: the last checkpoint is {tmp_path / 'stopped' / last}, and")
    code, out, _ = run_until(stopped, tmp_path / "stopped", 16, signal.SIGKILL, everyone=False)
    assert code == -signal.SIGKILL
    assert f"from {last} to step 24" in out
    assert command.pretrain(str(stopped)) == 0  # at once, while the killed run's workers may still be there
    assert "from the beginning" not in capsys.readouterr().out
    assert command.pretrain(str(straight)) == 0
    ends = [tmp_path / name / "step-00000024" for name in ("straight", "stopped")]
    assert same_training(*ends)
    assert checkpoints(tmp_path / "stopped") == ["step-00000024"]
