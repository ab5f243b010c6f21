"""Brings a file's weights to a model's names and shapes, and puts them into it, one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onepeace_fast.config import ClassifyConfig, EncoderConfig
from onepeace_fast.models.classify import ClassifyHead
from onepeace_fast.models.fill import Shard, fill
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.parameter_names import without_wrappers
from onepeace_fast.models.upstream import equals, fitting, grid_bucket
from onepeace_fast.pretrained.resample import (
    grid_of_positions,
    grid_of_table,
    resample_positions,
    resample_table,
)
from onepeace_fast.pretrained.settings import DECODER, ENCODER, HEAD
from onepeace_fast.progress import progress

SHOWN = 5  # of each kind of misfit, in one line
_TABLE, _OLD_TABLE = "rel_pos_table_list.{}.weight", "rel_pos_table.weight"
_SAID_FROM = 1 << 30  # bytes; less is read before a bar has been looked at
# What some models have and others do not, beside the parts of modalities.
_PARTS = (DECODER, HEAD, "logit_scale")
_OF_MODALITY = ("{}_proj", "decoder_{}_embed", "{}_mask_token", "{}_mask_head")


class Undrawn(TorchFunctionMode):
    """Nothing is drawn from a normal distribution: on meta, torch imports its compiler, of 80 MB, for that."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def today(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under today's names: without wrappers, of the vision file under the whole model's, old tables renamed."""
    names = {name: without_wrappers(name).removeprefix("module.") for name in weights}
    if is_vision(names.values()):
        names = {name: _of_vision(plain) for name, plain in names.items()}
    names = {
        name: plain.removesuffix(_OLD_TABLE) + _TABLE.format(0) if plain.endswith(f"adapter.{_OLD_TABLE}") else plain
        for name, plain in names.items()
    }
    return {names[name]: value for name, value in weights.items()}


def is_vision(names: Any) -> bool:
    """Whether these are the names of upstream's vision file."""
    return any(name.startswith("encoder.layers.") for name in names)


def _of_vision(name: str) -> str:
    if name.startswith("encoder."):
        return f"{ENCODER}.fusion_model.{name.removeprefix('encoder.')}"
    return f"{ENCODER}.{name}" if name.startswith("image_adapter.") else name


def fit(
    weights: Mapping[str, Tensor], source: EncoderConfig, model: nn.Module, config: EncoderConfig, report: LoadReport
) -> dict[str, Tensor]:
    """The value of every parameter of a model, which may be on meta, from weights that fit ``source``.

    Raises:
        ValueError: what is missing, unknown or misshaped, some of each kind.
    """
    left_out = [name for name in weights if _is_left_out(name, model, source, config)]
    report.left_out += left_out
    values = {name: value for name, value in weights.items() if name not in set(left_out)}
    for wrapper in (ENCODER, DECODER):
        if (old := getattr(source, wrapper.partition("_")[0], None)) is None or old.image is None:
            continue
        new = getattr(config, wrapper.partition("_")[0], None)
        if new is not None and new.image is not None:
            _resample(values, f"{wrapper}.image_adapter", new.image, report)
    if config.encoder.bias_table_per_layer:
        _copy_tables(values, config, report)
    if isinstance(config, ClassifyConfig) and not any(name.startswith(f"{HEAD}.") for name in values):
        with torch.device("cpu"):
            head = ClassifyHead(config)
        fresh = {f"{HEAD}.{name}": value.detach() for name, value in head.named_parameters()}
        report.fresh += fresh
        values.update(fresh)
    return fitting(model, values, SHOWN)


def _is_left_out(name: str, model: nn.Module, source: EncoderConfig, config: EncoderConfig) -> bool:
    """Whether a weight is of a part that upstream's models have, and this one has not."""
    part = name.partition(".")[0]
    known = {*_PARTS, *(place.format(one) for place in _OF_MODALITY for one in source.encoder.modalities)}
    if part in known and not hasattr(model, part):
        return True
    gone = set(source.encoder.modalities) - set(config.encoder.modalities)
    words = name.split(".")
    return any(word.startswith(f"{one}_") for one in gone for word in words)


def _resample(values: dict[str, Tensor], adapter: str, image: Any, report: LoadReport) -> None:
    tables = [name for name in values if name.startswith(f"{adapter}.rel_pos_table_list.")]
    for name in tables:
        grid = grid_of_table(len(values[name]))
        if grid >= image.bias_grid:
            continue
        bucket = values.pop(f"{adapter}.rp_bucket", None)  # of the file's own size
        if bucket is not None and not equals(bucket, grid_bucket(grid)):
            raise ValueError(f"state_dict: expected {adapter}.rp_bucket of {grid} x {grid} patches, got another")
        values[name] = resample_table(values[name], image.bias_grid)
        report.resampled.append(f"{name} from {grid} x {grid} to {image.bias_grid} x {image.bias_grid} patches")
    name = f"{adapter}.pos_embed"
    if name in values and (grid := grid_of_positions(len(values[name]))) < image.position_grid:
        values.pop(f"{adapter}.position_idx", None)
        values[name] = resample_positions(values[name], image.position_grid)
        report.resampled.append(f"{name} from {grid} x {grid} to {image.position_grid} x {image.position_grid} patches")


def _copy_tables(values: dict[str, Tensor], config: EncoderConfig, report: LoadReport) -> None:
    for modality in config.encoder.modalities:
        name = f"{ENCODER}.{modality}_adapter.{_TABLE}"
        if name.format(0) in values and name.format(1) not in values:
            values.update({name.format(layer): values[name.format(0)] for layer in range(config.encoder.layers)})
            report.copied.append(name.format(0))


def put(
    model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device,
    shard: Shard | None, source: Path,
) -> None:  # fmt: skip
    """``fill`` a model, with a bar where the file is large."""
    if sum(value.nbytes for value in values.values()) < _SAID_FROM:
        fill(model, values, dtype, device, shard)
        return
    bar = progress(f"read {source.name}", "parameter", len(values))
    fill(model, values, dtype, device, shard, bar.update)
    bar.close()
