"""Gives the parameters of a model on meta their memory and their values, one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from onepeace_fast.models.parameter_names import copy_into, upstream_names

Shard = Callable[[nn.Module], object]


def fill(
    model: nn.Module,
    values: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    shard: Shard | None = None,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Copy values by upstream's names into a model on meta, each in ``dtype`` and on ``device``, or in and on its own.

    ``shard`` is called with the model while it has no memory; of what it shards a process then holds its part alone.
    ``done`` is called after every parameter.
    """
    if device is None:
        device = next(iter(values.values())).device
    sharded = shard is not None
    names = {id(parameter): name for name, parameter in upstream_names(model).items()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            value = values[names[id(parameter)]]
            place = torch.device("meta") if sharded else device
            fresh = torch.empty(value.shape, dtype=dtype or value.dtype, device=place)
            if not sharded:
                fresh.copy_(value.detach())
                done()
            module._parameters[key] = nn.Parameter(fresh, parameter.requires_grad)
    if shard is None:
        model.to(device)  # the buffers, which were made on the CPU
        return
    shard(model)
    model.to_empty(device=device)
    for name, parameter in upstream_names(model).items():
        copy_into(parameter, values[name])
        done()
