"""What each of two processes does in ``test_processes.py``, in one launch of torchrun: starting them takes longest.

Into the folder that is given: gradients.pt, parallel.pt, models of sharded ones, then runs of bad.yaml, of
straight.yaml, and of stopped.yaml, interrupted after its third step and continued.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from models._small import BACKENDS, small_config, small_model
from torch.distributed.fsdp import FullyShardedDataParallel
from training._batches import STAGES, batch_number, masks_of, trainer

from onepeace_fast.training import command
from onepeace_fast.training.distributed import Processes, full
from onepeace_fast.training.optimizer import adamw
from onepeace_fast.training.pairs import INPUTS
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


def write_parallel_steps(folder: Path) -> None:
    """Two steps in DistributedDataParallel as it is by default, which fails where a parameter has no gradient.

    The fused model has parts that a stage does not read, the reference has none.
    """
    results = {}
    for stage in STAGES:
        for backend in BACKENDS:
            unread = {"vision_language": "audio", "audio_language": "image"}[stage]
            sections = {unread: None} if backend == "reference" else {}
            model = small_model(backend, small_config(decoder=sections, **sections), torch.float32)
            if stage == "audio_language":
                model.train_only("audio")
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = adamw(model, 0.01)
            for step in range(2):
                batch = batch_number(stage, 2 * step + dist.get_rank())
                inputs = {name: batch[name] for name in INPUTS if name in batch}
                optimizer.zero_grad()
                parallel(f"{stage}_loss", **inputs, masks=masks_of(stage, batch, step))["loss"].backward()
                optimizer.step()
            without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            results[f"{stage} {backend}"] = (without, model.to_upstream_state_dict())
    if dist.get_rank() == 0:
        torch.save(results, folder / "parallel.pt")


def write_sharded_models(folder: Path) -> None:
    """Models sharded over both processes, saved, and again after they took another one's values."""
    other = small_model("fused", dtype=torch.float32, seed=1)
    for name in ("FSDP1", "FSDP2"):
        model = small_model("fused", dtype=torch.float32)
        if name == "FSDP2":
            Processes(dist.get_rank(), 2, torch.device("cpu")).place(model)
        else:
            layers = model.encoder_wrapper.fusion_model.layers
            for place, layer in enumerate(layers):
                layers[place] = FullyShardedDataParallel(layer, device_id=torch.device("cpu"))
        model.save(folder / f"{name} first")
        model.load_upstream_state_dict(other.to_upstream_state_dict())
        model.save(folder / f"{name} second")


def run_command(path: str, stop: int, code: int) -> None:
    """The training command, with Ctrl-C after step ``stop`` (0: none); its exit code must be ``code``."""
    take = Trainer.step

    def interrupted(self, batches):
        if stop and self.step_number == stop:
            raise KeyboardInterrupt
        return take(self, batches)

    Trainer.step = interrupted
    try:
        assert command.pretrain(path) == code
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
    write_parallel_steps(folder)
    write_sharded_models(folder)
    run_command(str(folder / "bad.yaml"), 0, 2)
    run_command(str(folder / "straight.yaml"), 0, 0)
    run_command(str(folder / "stopped.yaml"), 3, 130)
    run_command(str(folder / "stopped.yaml"), 0, 0)
    end()
