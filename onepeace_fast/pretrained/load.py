"""Models from public checkpoints, from folders of this library and from the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from onepeace_fast import hub
from onepeace_fast.checks import require
from onepeace_fast.config import ClassifyConfig, read_config
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.models import OnePeaceEncoder, upstream
from onepeace_fast.models.fill import Shard
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.mico import Mico, MicoConfig
from onepeace_fast.pretrained import mico, pickles
from onepeace_fast.pretrained.settings import ENCODER, MODELS, Found, from_settings, from_vision, kind_of, target
from onepeace_fast.pretrained.weights import Undrawn, fit, is_vision, put, today

_log = logging.getLogger(__name__)
MICO = "mico"
_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float64": torch.float64,
}  # fmt: skip


@overload
def from_pretrained(path_or_hub_id: str | Path, *, model_type: Literal["mico"], **arguments: Any) -> Mico: ...
@overload
def from_pretrained(
    path_or_hub_id: str | Path, *, model_type: str | None = None, **arguments: Any
) -> OnePeaceEncoder: ...
def from_pretrained(  # type: ignore[misc]  # the overloads leave the arguments open
    path_or_hub_id: str | Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    ema: bool = False,
    image_size: int | None = None,
    head: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    shard: Shard | None = None,
    revision: str | None = None,
    config: MicoConfig | None = None,
) -> OnePeaceEncoder | Mico:
    """Build a model from a file, in evaluation mode; what was not simply copied is in its ``load_report``, logged once.

    The file is mapped into memory, and every parameter goes straight into its dtype and onto its device. All of it is
    checked before.

    Args:
        path_or_hub_id: upstream's ``.pt`` or vision ``.pkl``, a folder that ``save`` wrote or that holds one of these
            files, or the name of a repository of the Hugging Face Hub, "owner/name".
        model_type: "pretrain", "retrieval", "classify" or "encoder", also as upstream has it ("one_peace_retrieval");
            None: what the file holds. Parts that the model does not have are left out. "mico": upstream's checkpoint
            of MiCo, without CLIP's text encoder; it takes dtype, device, backend, image_size, revision and config.
        dtype: of all parameters, "bf16" and "fp16" too; None: each as in the file.
        device: None is the CPU.
        backend: as the model's.
        ema: take the moving average of the weights, which upstream's trainer keeps where it is told to.
        image_size: a side in pixels that the model is to take; tables of relative positions are resampled where the
            file's are for smaller images, as upstream does. Positions are resampled in every pass.
        head: fields of ``ClassifyConfig``, for a new head where the file has none.
        adapters: those of added modalities, by name; a folder alone can need them.
        shard: called with the model before it has memory, to give its parts to FSDP2's fully_shard; every process then
            reads its own part of each parameter.
        revision: a branch, tag or commit of a Hub repository.
        config: of MiCo, where its encoder is none that is public; None: by the weights.

    Raises:
        ValueError: what is not there, broken, of another model or holds code; one line that names the file. Settings
            that this library does not implement.
        ImportError: SciPy or huggingface_hub is needed and missing; one line that says how to install it.
    """
    kind = None if model_type in (None, MICO) else kind_of(str(model_type))
    if model_type == MICO:
        others = {"ema": ema, "head": head, "adapters": adapters, "shard": shard}
        given = [name for name, value in others.items() if value]
        require(not given, lambda: f"{given[0]}: expected none for MiCo, got one")
    else:
        require(config is None, "config: expected one for model_type='mico' alone, got one for ONE-PEACE")
    dtype = _dtype(dtype)
    path = _find(path_or_hub_id, revision)
    try:
        place = torch.device(device or "cpu")
        if model_type == MICO:
            require(path.is_file(), "expected upstream's checkpoint of MiCo, got a folder that save() wrote")
            loaded = mico.load_mico(path, dtype, place, backend, image_size, config)
            _tell(loaded.load_report)
            return loaded
        return _load(path, kind, dtype, place, backend, ema, image_size, head or {}, adapters, shard)
    except ValueError as error:
        line = str(error)
        raise ValueError(line if line.startswith(str(path)) else f"{path}: {line}") from None


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype: expected a floating point dtype or one of {', '.join(_DTYPES)}, got {dtype!r}")
    return found


def _find(name: str | Path, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if not path.exists() and isinstance(name, str) and hub.NAME.fullmatch(name):
        path = hub.download(name, revision)
    elif revision is not None:
        raise ValueError(f"revision: expected None for a path, got {revision!r}")
    if not path.exists():
        raise ValueError(f"{path}: expected a file, a folder or a Hub repository 'owner/name', got nothing there")
    if path.is_dir() and not (path / upstream.CONFIG_FILE).is_file():
        files = sorted(one for one in path.iterdir() if one.suffix in (".pt", ".pkl"))
        if len(files) != 1:
            raise ValueError(
                f"{path}: expected {upstream.CONFIG_FILE} and {upstream.WEIGHTS_FILE}, or one .pt or .pkl file, got "
                f"{', '.join(one.name for one in files) or 'neither'}"
            )
        return files[0]
    return path


def _load(
    path: Path, kind: str | None, dtype: torch.dtype | None, device: torch.device, backend: str | None, ema: bool,
    image_size: int | None, head: Mapping[str, Any], adapters: Mapping[str, Adapter] | None,
    shard: Shard | None,
) -> OnePeaceEncoder:  # fmt: skip
    report = LoadReport(str(path))
    found = _read_folder(path, ema, head) if path.is_dir() else _read_file(path, ema, report.unknown, head)
    config = target(found, kind, image_size, head)
    with torch.device("meta"), Undrawn():  # no memory, and no numbers drawn, for what the file replaces
        model = MODELS[config.kind](config, backend, adapters)
    report.model = type(model).__name__
    put(model, fit(found.weights, found.config, model, config, report), dtype, device, shard, path)
    model.load_report = report
    _tell(report)
    return model.eval()


def _tell(report: LoadReport | None) -> None:
    assert report is not None
    special = report.unknown or report.left_out or report.fresh or report.resampled or report.copied
    _log.log(logging.WARNING if special else logging.INFO, "%s", report)


def _read_folder(path: Path, ema: bool, head: Mapping[str, Any]) -> Found:
    if ema:
        raise ValueError("ema: expected False for a folder that save() wrote, got True")
    config = read_config(path / upstream.CONFIG_FILE)
    if head and isinstance(config, ClassifyConfig):
        raise ValueError(f"head: expected none for a file with a head, got {dict(head)}")
    return Found(upstream.read_weights(path), config)


def _read_file(path: Path, ema: bool, unknown: list[str], head: Mapping[str, Any]) -> Found:
    values = pickles.read(path)
    states: Any = values.get("model") if isinstance(values, Mapping) else None
    if ema:
        extra = values.get("extra_state") if isinstance(values, Mapping) else None
        states = extra.get("ema") if isinstance(extra, Mapping) else None
        if not states:
            kept = sorted(map(str, extra)) if isinstance(extra, Mapping) else "none"
            raise ValueError(f"ema: expected a moving average in extra_state, got {kept}; load without ema")
    weights: dict[str, Tensor] = today(pickles.tensors(states))
    if not any(name.startswith(f"{ENCODER}.") for name in weights):
        if mico.is_mico(pickles.tensors(values)):
            raise ValueError("expected weights of ONE-PEACE, got those of MiCo; load them with model_type='mico'")
        shown = ", ".join([*weights][:3]) or "no tensors under 'model'"
        raise ValueError(f"expected weights of ONE-PEACE, such as {ENCODER}.*, got {shown}")
    if is_vision(pickles.tensors(states)):
        return from_vision(weights)
    settings = values.get("cfg")
    if settings is None and values.get("args") is not None:
        settings = values["args"]
    return from_settings(pickles.plain(settings), weights, unknown, head)
