"""Upstream's state dicts: strict loading, with the buffers and old names that public checkpoints carry; files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onepeace_fast.checks import describe, require
from onepeace_fast.config import EncoderConfig, ModelConfig
from onepeace_fast.layers.adapters import Adapter, ImageAdapter, SeriesAdapter
from onepeace_fast.models.parameter_names import (
    copy_into,
    full,
    gathered,
    is_flattened,
    is_sharded,
    upstream_modules,
    upstream_names,
    without_wrappers,
)
from onepeace_fast.relative_position import (
    MAX_POSITIONS,
    dense_index,
    grid_code_offset,
    grid_codes,
    grid_table_rows,
    series_index,
    series_vector_index,
)

Config = TypeVar("Config", bound=ModelConfig)
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_OLD_TABLE, _NEW_TABLE = "rel_pos_table.weight", "rel_pos_table_list.0.weight"


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy every parameter; raises ``ValueError`` listing all that does not fit, weights untouched."""
    require(
        not any(parameter.is_meta for parameter in model.parameters()),
        "model: expected a model on a device, got parameters without memory; call to_empty(device=...) first",
    )
    with gathered(model):
        values = fitting(model, state_dict)
        for name, parameter in upstream_names(model).items():
            copy_into(parameter, values[name])


def fitting(model: nn.Module, state_dict: Mapping[str, Tensor], shown: int | None = None) -> dict[str, Tensor]:
    """A state dict's values under the model's names; raises ``ValueError`` listing all that does not fit.

    ``shown`` bounds how many of each kind are listed.
    """
    parameters = upstream_names(model)
    renamed = _renamed(parameters, state_dict)
    counts = Counter(renamed.values())
    twice = [name for name, new in renamed.items() if counts[new] > 1 and name != new]
    given = {renamed[name]: value for name, value in state_dict.items()}
    uncopyable = [f"{name} {describe(value)}" for name, value in given.items() if not _holds_data(value)]
    given = {name: value for name, value in given.items() if _holds_data(value)}
    buffers = {name: value for name, value in given.items() if name not in parameters and _is_buffer(name)}
    missing = sorted(set(parameters) - set(renamed.values()))
    unexpected = sorted(set(given) - set(parameters) - set(buffers))
    misshaped = [
        f"{name} {list(given[name].shape)} instead of {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in given and given[name].shape != parameter.shape
    ]
    misshaped += [
        f"{name} {str(given[name].dtype).removeprefix('torch.')} instead of floating point"
        for name in parameters
        if name in given and not given[name].is_floating_point()
    ]
    misshaped += [reason for name, value in buffers.items() if (reason := _check_buffer(model, name, value))]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "misshaped or different": misshaped,
        "no tensors with data": uncopyable,
        "also there under the new name": twice,
    }
    found = "; ".join(f"{kind}: {_listed(items, shown)}" for kind, items in problems.items() if items)
    if found:
        raise ValueError(f"state_dict: expected exactly this model's keys, got some that do not fit. {found}")
    return {name: given[name] for name in parameters}


def _listed(items: Sequence[str], shown: int | None) -> str:
    more = len(items) - (len(items) if shown is None else shown)
    return ", ".join(items) if more <= 0 else f"{', '.join(items[:shown])} and {more} more"


def _renamed(parameters: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """The name that each key of a state dict has in an unwrapped model of today."""
    # DistributedDataParallel calls what it wraps "module", which a user's own part may be called too.
    counts = Counter(map(_without_module, parameters))
    in_parallel = {plain: name for name in parameters if counts[plain := _without_module(name)] == 1}
    renamed = {}
    for key in state_dict:
        name = without_wrappers(key)
        whole = name.removeprefix("module.")
        name = whole if whole in parameters else name
        if name.endswith("." + _OLD_TABLE):
            name = name.removesuffix(_OLD_TABLE) + _NEW_TABLE
        if name not in parameters:
            plain = _without_module(name)
            name = in_parallel.get(plain, plain if _is_buffer(plain) else name)
        renamed[key] = name
    return renamed


def _without_module(name: str) -> str:
    return ".".join(word for word in name.split(".") if word != "module")


def state_dict(model: nn.Module, grads: bool) -> dict[str, Tensor | None]:
    """See ``OnePeacePretrain.to_upstream_state_dict``."""
    flattened = is_flattened(model)
    if grads and flattened:
        raise ValueError("grads: expected False, got True for a model in FSDP1: its gradients are flattened")
    with gathered(model):
        parameters = upstream_names(model)
        if flattened:  # outside they are in pieces again
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {name: p.grad if grads else p.detach() for name, p in parameters.items()}


def save(model: nn.Module, config: EncoderConfig, expected: nn.Module, directory: Path) -> None:
    """Write the weights and the configuration, each under another name first, then in its place in one step.

    ``expected`` is the model that ``load`` would build of this configuration. Of a sharded model every process must
    call it, and the first one writes.
    """
    values: dict[str, Any] = {**state_dict(model, grads=False)}
    _check_names(set(values), set(upstream_names(expected)))
    sharded = any(map(is_sharded, values.values())) or is_flattened(model)
    tensors = {name: full(value).contiguous() for name, value in values.items()}
    _check_ties(tensors)
    # A part of a larger tensor would be refused by its file.
    tensors = {n: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for n, x in tensors.items()}
    if sharded and dist.get_rank() > 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], None]] = {
        WEIGHTS_FILE: lambda path: save_file(tensors, path),
        CONFIG_FILE: config.save,
    }
    for name, write in writers.items():
        draft = directory / f"{name}.new"
        write(draft)
        os.replace(draft, directory / name)


def _check_names(found: set[str], expected: set[str]) -> None:
    """Raise where loading would not take these names, before anything is written."""
    problems = {"missing": sorted(expected - found), "unexpected": sorted(found - expected)}
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
    if told:
        raise ValueError(
            f"model: expected parameters of its configuration, got some that load() would refuse. {told}. A part was "
            "replaced, parametrized or tied: merge or remove that first, or keep torch.save(model.state_dict())"
        )


def _check_ties(tensors: Mapping[str, Tensor]) -> None:
    """Raise where values share memory, which a loaded model would not let them do."""
    places = sorted((value.untyped_storage().data_ptr(), value.data_ptr(), name) for name, value in tensors.items())
    for (storage, start, name), (other, following, second) in pairwise(places):
        require(
            storage != other or following >= start + tensors[name].nbytes or not tensors[name].nbytes,
            f"model: expected a tensor of its own for every parameter, got {name} and {second} tied; untie them "
            "first, or keep torch.save(model.state_dict())",
        )


def read_folder(directory: Path, kind: type[Config]) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and the weights that ``save`` wrote of a model of one kind."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"directory: expected a folder that save() wrote, got {directory} without {name}")
    return kind.load(directory / CONFIG_FILE), read_weights(directory)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The weights that ``save`` wrote, mapped into memory."""
    try:
        with torch.device("cpu"):
            return load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"directory: expected a folder that save() wrote, got {directory / WEIGHTS_FILE}, which cannot be read "
            f"({reason})"
        ) from error


def take_over(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let every parameter be its value on the CPU, in the value's dtype; those on meta get memory."""
    fresh = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
        for parameter in model.parameters()
        if parameter.is_meta
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = fresh.get(id(parameter), parameter)
    values = fitting(model, weights)
    for name, parameter in upstream_names(model).items():
        parameter.data = values[name].clone()  # what is read of a file may be its pages


def _holds_data(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta" and value.layout == torch.strided


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("rp_bucket", "position_idx", "version")


def _check_buffer(model: nn.Module, name: str, value: Tensor) -> str | None:
    """Why a buffer of a checkpoint contradicts this model, or None."""
    owner, _, kind = name.rpartition(".")
    module = upstream_modules(model).get(owner)
    if module is None:
        return f"{name} belongs to no part of this model"
    if kind == "version":
        return None if value.tolist() == [3.0] else f"{name} {value.tolist()} instead of [3.0]"
    if kind == "position_idx" and isinstance(module, ImageAdapter):
        expected = torch.arange(module.position_grid**2 + 1, device="cpu")
    elif kind == "rp_bucket" and isinstance(module, Adapter) and module.has_bias:
        expected = _bucket(module)
    else:
        return f"{name} belongs to no part of this model"
    same = equals(value, expected)
    return None if same else f"{name} differs from the one that follows from the configuration"


def equals(value: Tensor, expected: Tensor) -> bool:
    """Whether a buffer of a checkpoint holds these integers, in whatever dtype."""
    return value.shape == expected.shape and torch.equal(value.cpu().long(), expected)


def grid_bucket(grid: int) -> Tensor:
    """The buffer rp_bucket of upstream's image adapter: int64 [grid ** 2 + 1, grid ** 2 + 1] on the CPU."""
    code = grid_codes(grid, grid, "cpu")
    is_cls = torch.arange(len(code), device="cpu") == 0
    return dense_index(code, is_cls, grid_code_offset(grid), grid_table_rows(grid))


def _bucket(adapter: Adapter) -> Tensor:
    """The buffer rp_bucket of an adapter, which may be on meta where it is one of this library's."""
    if type(adapter) is ImageAdapter:
        return grid_bucket(adapter.bias_grid)
    if not isinstance(adapter, SeriesAdapter):
        return adapter.dense_table_index(cast(ImageAdapter, adapter).bias_grid ** 2 + 1).cpu()
    if not adapter.cls_embedding.is_meta:
        return adapter.dense_table_index(MAX_POSITIONS).cpu()
    position = torch.arange(MAX_POSITIONS, device="cpu")
    index = series_vector_index(series_index(adapter.bucket_size), adapter.bucket_size, MAX_POSITIONS)
    return index[dense_index(position, position == 0, MAX_POSITIONS - 1, len(index))]
