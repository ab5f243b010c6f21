"""What each of two processes does in ``test_processes.py``: twenty steps in DDP and in FSDP2, losses into a folder."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from onepeace_fast import fuse, use_backend
from tests.fusion._one_peace import Wrapper
from tests.fusion._steps import STEPS, loss_of, optimizer_of, part


def parallel(model: Wrapper) -> nn.Module:
    """What a user does with a model that lacks a modality in some batches."""
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model: Wrapper) -> nn.Module:
    for layer in model.fusion_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train(model: nn.Module) -> list[float]:
    optimizer = optimizer_of(model)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, part(step, dist.get_rank()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(mean(loss.detach()))
    return losses


def mean(loss: Tensor) -> float:
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    results = {}
    for name, wrap in (("parallel", parallel), ("sharded", sharded)):
        model = Wrapper(drop_path=0.0).train()
        handle = fuse(model)
        with use_backend("fused"):
            results[name] = train(wrap(model))
        (counted,) = handle.report().parts
        assert counted.fused_calls == STEPS and not counted.own_calls, str(handle.report())
    if dist.get_rank() == 0:
        torch.save(results, folder / "losses.pt")
    dist.destroy_process_group()
    atexit.register(gc.collect)  # as in training/distributed.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
