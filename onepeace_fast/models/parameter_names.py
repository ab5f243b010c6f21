"""A model's parameters under upstream's names and whole, whatever wraps or shards its parts.

The attributes of `Stack`, `TransformerLayer` and the adapters are named as upstream names them, so a plain model's own
names are upstream's. torch.compile, checkpoint_wrapper, FSDP1 and DistributedDataParallel put a module around a module,
whose parameters then have a longer name; FSDP flattens or shards them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)  # whose own word, "module", may be a user's too


def upstream_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under the name that it has where nothing is wrapped."""
    return {_plain(model, name): parameter for name, parameter in model.named_parameters()}


def upstream_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module, the innermost of those in wrappers, under the name that it has where nothing is wrapped."""
    return {_plain(model, name): module for name, module in model.named_modules()}


def without_wrappers(name: str) -> str:
    """A name in a file of a wrapped model, as upstream has it; what "module" means there remains to be seen."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _plain(model: nn.Module, name: str) -> str:
    names: list[str] = []
    owner: nn.Module | None = model
    for word in name.split("."):
        if word not in _WRAPPERS and not (word == "module" and isinstance(owner, _PARALLEL)):
            names.append(word)
        owner = owner._modules.get(word) if owner is not None else None
    return ".".join(names)


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP1 holds parameters of the model, which have their shapes only inside ``gathered``."""
    return any("_fsdp_wrapped_module" in module._modules for module in model.modules())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP1's parameters are whole and have names, and what is written to them stays. Every process must enter.

    Nothing happens where FSDP1 is not used; FSDP2's parameters are DTensors, see ``full``.
    """
    found = [module for module in model.modules() if "_fsdp_wrapped_module" in module._modules]
    with ExitStack() as stack:
        if found:
            from torch.distributed.fsdp import FullyShardedDataParallel  # takes long to import

            inside = {id(module) for outer in found for module in outer.modules() if module is not outer}
            for module in found:
                if id(module) not in inside:
                    stack.enter_context(FullyShardedDataParallel.summon_full_params(module))
        yield


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a DTensor; their module takes seconds to import, and without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def full(value: Any) -> Tensor:
    """A tensor whole, on its device; every process must ask for it."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A copy of this process's part of a tensor that every process has whole, sharded as ``like`` is; scalars whole."""
    if not is_sharded(like) or not value.dim():
        return value.clone()
    return _distribute(value, like)


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole or sharded value into a whole or sharded parameter, converted to its dtype."""
    value = full(value)
    with torch.no_grad():
        parameter.copy_(_distribute(value, parameter) if is_sharded(parameter) else value)


def _distribute(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor  # there already, where ``like`` is sharded

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
