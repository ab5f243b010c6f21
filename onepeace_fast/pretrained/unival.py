"""UnIVAL from upstream's checkpoints: settings and weights of a file that fairseq wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.models.fill import Shard
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.parameter_names import upstream_modules
from onepeace_fast.models.unival import Unival, UnivalConfig, state
from onepeace_fast.models.unival.config import KNOWN_ARGUMENTS
from onepeace_fast.models.upstream import fitting, read_folder
from onepeace_fast.pretrained.weights import SHOWN, Undrawn, put

KIND = "unival"
# Arguments of fairseq's trainer and of upstream's tasks stand beside the model's, which begin or end so.
_OF_MODEL = ("encoder_", "decoder_", "resnet_", "attn_", "scale_", "layernorm_", "adapter", "freeze_")
_OF_PART = ("_embedding", "_dropout", "_bucket_size", "_encoder_name")
_HEADS = "classification_heads."  # which upstream leaves out too


def is_unival(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of UnIVAL's encoder and decoder."""
    return state.TABLE in weights and any(name.startswith("decoder.layers.") for name in weights)


def load_unival(
    path: Path, settings: Any, weights: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device,
    backend: str | None, shard: Shard | None, report: LoadReport,
) -> Unival:  # fmt: skip
    """A model of a file's settings and weights; all of it is checked before a parameter is made."""
    section = settings.get("model", settings) if isinstance(settings, Mapping) else None
    if not isinstance(section, Mapping) or "encoder_embed_dim" not in section:
        raise ValueError("cfg: expected upstream's arguments with encoder_embed_dim, under cfg.model or args, got none")
    report.unknown += [f"model.{name}" for name in sorted(section) if _is_unknown(name, section[name])]
    table, projection = (_matrix(weights, name) for name in (state.TABLE, "encoder.image_proj.weight"))
    has_networks = any(name.startswith("encoder.embed_images.") for name in weights)
    config = UnivalConfig.from_upstream(section, len(table), projection.shape[1], has_networks)
    return _built(path, config, weights, dtype, device, backend, shard, report)


def load_unival_folder(
    path: Path, dtype: torch.dtype | None, device: torch.device, backend: str | None, shard: Shard | None,
    report: LoadReport,
) -> Unival:  # fmt: skip
    """A model of a folder that a training wrote, or a merge of such."""
    config, weights = read_folder(path, UnivalConfig)
    return _built(path, config, weights, dtype, device, backend, shard, report)


def _built(
    path: Path, config: UnivalConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device,
    backend: str | None, shard: Shard | None, report: LoadReport,
) -> Unival:  # fmt: skip
    with torch.device("meta"), Undrawn():
        model = Unival(config, backend)
    report.model = type(model).__name__
    report.left_out += [name for name in weights if name.startswith(_HEADS)]
    parameters, counted = state.separated(
        model, {name: value for name, value in weights.items() if not name.startswith(_HEADS)}
    )  # fmt: skip
    values = fitting(model, parameters, SHOWN)
    set_statistics(model, counted, dtype, device)
    put(model, values, dtype, device, shard, path)
    if shard is not None:  # which gave buffers new memory
        set_statistics(model, counted, dtype, device)
    return model


def _matrix(weights: Mapping[str, Tensor], name: str) -> Tensor:
    found = weights.get(name)
    if found is None or found.dim() != 2:
        raise ValueError(f"{name}: expected a matrix, got {'none' if found is None else list(found.shape)}")
    return found


def set_statistics(
    model: nn.Module, counted: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device
) -> None:  # fmt: skip
    """Give BatchNorms their running statistics, in a parameter's dtype."""
    modules = upstream_modules(model)
    for name, value in counted.items():
        owner, _, key = name.rpartition(".")
        wanted = dtype if value.is_floating_point() else None
        modules[owner]._buffers[key] = value.detach().to(device, wanted or value.dtype, copy=True)


def _is_unknown(name: str, value: Any) -> bool:
    if name.startswith("freeze_"):
        return bool(value)  # it would train less than is trained
    of_model = name.startswith(_OF_MODEL) or name.endswith(_OF_PART)
    return of_model and name not in KNOWN_ARGUMENTS
