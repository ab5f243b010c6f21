"""Upstream's state dicts of UnIVAL: strict, with the buffers and the copies of the token table that they carry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onepeace_fast.models import upstream
from onepeace_fast.models.parameter_names import upstream_modules
from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.spectrogram import fourier, mel_filters
from onepeace_fast.models.upstream import equals, grid_bucket
from onepeace_fast.relative_position import MAX_POSITIONS, series_index

TABLE = "encoder.embed_tokens.weight"
TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
AUDIO = "encoder.embed_audios."
# What upstream's spectrogram is made of: parameters that do not train.
CONSTANTS = (
    f"{AUDIO}spectrogram_extractor.stft.conv_real.weight", f"{AUDIO}spectrogram_extractor.stft.conv_imag.weight",
    f"{AUDIO}logmel_extractor.melW",
)  # fmt: skip
ROUNDED = 1e-6  # of the largest value; upstream's are made in other steps, and rounded to float32
PAST_WINDOW, PAST_WINDOW_COUNT = 1024, 769  # upstream's ids behind the window of codes


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """See ``Unival.load_upstream_state_dict``."""
    parameters, counted = separated(model, state_dict)
    upstream.load(model, parameters)
    for name, own in statistics(model).items():
        own.copy_(counted[name])


def separated(model: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What may be parameters, and the running statistics; what follows from the configuration is checked, and left out.

    Raises:
        ValueError: statistics that are missing or misshaped, or other values than those that follow.
    """
    config: UnivalConfig = model.config  # type: ignore[assignment]
    own, expected_constants = statistics(model), constants(config)
    problems: list[str] = []
    parameters, counted = {}, {}
    for name, value in state_dict.items():
        if name in TIED:
            table = state_dict.get(TABLE)
            same = table is not None and value.shape == table.shape and torch.equal(value, table)
            problems += [] if same else [f"{name} differs from {TABLE}, which it is"]
        elif name in own:
            counted[name] = value
            if value.shape != own[name].shape:
                problems.append(f"{name} has the shape {list(value.shape)} instead of {list(own[name].shape)}")
        elif name in expected_constants:
            if not _rounds_to(value, expected_constants[name]):
                problems.append(f"{name} differs from the formula's, which upstream's spectrogram is made by")
        elif name.split(".")[-1] in ("version", "token_rp_bucket", "image_rp_bucket", "image_position_idx"):
            expected = buffer(config, name)
            if expected is None or not equals(value, expected):
                problems.append(f"{name} differs from the one that follows from the configuration")
        else:
            parameters[name] = value
    # Upstream's frozen BatchNorms count no batches.
    absent = [name for name in own if name not in counted]
    counted |= {name: torch.tensor(0, device="cpu") for name in absent if name.endswith(".num_batches_tracked")}
    if missing := [name for name in absent if name not in counted]:
        problems.append(f"running statistics are incomplete: missing {', '.join(missing)}")
    if problems:
        raise ValueError(f"state_dict: expected UnIVAL's own, got one whose {'; '.join(problems)}")
    return parameters, counted


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of all BatchNorms, under upstream's names."""
    return {
        f"{name}.{key}": value
        for name, module in upstream_modules(model).items() if isinstance(module, _BatchNorm)
        for key, value in module._buffers.items() if value is not None
    }  # fmt: skip


def constants(config: UnivalConfig) -> dict[str, Tensor]:
    """Upstream's constants of the spectrogram, float32; none where no network takes a waveform."""
    if not (config.networks and config.audio):
        return {}
    return {name: value.float() for name, value in zip(CONSTANTS, (*fourier(), mel_filters()), strict=True)}


def _rounds_to(value: Tensor, expected: Tensor) -> bool:
    same = value.shape == expected.shape
    return same and bool(((value.cpu().float() - expected).abs() <= ROUNDED * expected.abs().max()).all())


def buffer(config: UnivalConfig, name: str) -> Tensor | None:
    """A buffer of upstream's state dict, int64; None where there is none of this name."""
    side, window = config.image_bucket_size, config.code_window
    stack, _, kind = name.partition(".")
    if stack not in ("encoder", "decoder"):
        return None
    if kind == "version":
        return torch.tensor([3], device="cpu")
    if kind == "token_rp_bucket":
        place = torch.arange(MAX_POSITIONS, device="cpu")
        return series_index(config.token_bucket_size)[place[:, None] - place + MAX_POSITIONS - 1]
    if kind == "image_rp_bucket":
        return grid_bucket(side)
    if kind == "image_position_idx" and stack == "decoder":
        place = torch.arange(window, device="cpu")
        rows = (1 + place[:, None] * side + place).flatten()
        return torch.cat([rows.new_zeros(1), rows, rows.new_full((PAST_WINDOW_COUNT,), PAST_WINDOW)])
    return None


def state_dict(model: nn.Module, grads: bool) -> dict[str, Tensor | None]:
    """See ``Unival.to_upstream_state_dict``."""
    found = upstream.state_dict(model, grads)
    if not grads:
        found |= {name: value.detach() for name, value in statistics(model).items()}
        found |= constants(model.config)  # type: ignore[arg-type]
    return {**found, **{name: found[TABLE] for name in TIED}}
