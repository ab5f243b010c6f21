"""What each of two processes does in ``test_processes.py``, in one launch of torchrun: starting them takes longest.

Into the folder that is given: gradients.pt, then runs of bad.yaml, of straight.yaml, and of stopped.yaml, interrupted
after its third step and continued.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from training._batches import STAGES, batch_number, trainer

from onepeace_fast.training import command
from onepeace_fast.training.distributed import Processes, full
from onepeace_fast.training.trainer import Trainer

PLAIN = {"drop_path_rate": 0.0, "dropout": 0.0}


def write_gradients(folder: Path) -> None:
    """The numbers and gradients of one batch per process, as ``Trainer.step`` sees them before its clip."""
    with Processes.start("cpu") as processes:
        results = {}
        for stage in STAGES:
            for precision in ("float32", "bfloat16"):
                # The clip is so large that it changes nothing, the rate so small that the weights stay.
                keys = {"precision": precision, "clip": 1e9, "learning_rate": 1e-30, "weight_decay": 0.0}
                model = PLAIN | {"checkpoint_activations": precision != "float32"}
                trained = trainer(stage, processes, model=model, **keys)
                trained.masks.manual_seed(processes.rank)
                numbers = trained.step(iter([batch_number(stage, processes.rank)]))
                gradients = {
                    name: full(p.grad).clone() for name, p in trained.model.named_parameters() if p.grad is not None
                }
                results[f"{stage} {precision}"] = (numbers, gradients)
        if processes.is_main:
            torch.save(results, folder / "gradients.pt")


def run_command(path: str, stop: int, code: int) -> None:
    """The training command, with Ctrl-C after step ``stop`` (0: none); its exit code must be ``code``."""
    take = Trainer.step

    def interrupted(self, batches):
        if stop and self.step_number == stop:
            raise KeyboardInterrupt
        return take(self, batches)

    Trainer.step = interrupted
    try:
        assert command.run(path) == code
    finally:
        Trainer.step = take


def join_once() -> Callable[[], None]:
    """Let all runs use the first one's process group, which cannot be made twice; returns what ends it."""
    start, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = lambda *arguments: dist.is_initialized() or start(*arguments)
    dist.destroy_process_group = lambda: None
    return end


if __name__ == "__main__":
    torch.set_num_threads(1)
    end = join_once()
    folder = Path(sys.argv[1])
    write_gradients(folder)
    run_command(str(folder / "bad.yaml"), 0, 2)
    run_command(str(folder / "straight.yaml"), 0, 0)
    run_command(str(folder / "stopped.yaml"), 3, 130)
    run_command(str(folder / "stopped.yaml"), 0, 0)
    end()
