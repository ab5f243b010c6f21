"""What each of two processes does in ``test_sharded.py``: load its part of a model, write what all compute."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models._small import image_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from onepeace_fast import from_pretrained
from onepeace_fast.models.parameter_names import full


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def shard(model):
        assert all(parameter.is_meta for parameter in model.parameters())
        for layer in model.encoder.fusion_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})

    for dtype in (None, "bf16"):
        model = from_pretrained(folder / "a.pt", dtype=dtype, backend="fused", shard=shard)
        parameters = dict(model.named_parameters())
        own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters.values())
        state = {name: full(value).detach().clone() for name, value in model.to_upstream_state_dict().items()}
        image = image_batch(2, 3, dtype=next(iter(state.values())).dtype)
        with torch.no_grad():
            embedding = model("embed", image=image)
        torch.save({"state": state, "own": own, "embedding": embedding}, folder / f"{dtype}{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    atexit.register(gc.collect)  # as in training/distributed.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
