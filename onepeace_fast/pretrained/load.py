"""Models from public checkpoints, from folders of this library and from the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onepeace_fast import hub
from onepeace_fast.config import ClassifyConfig, named_kind, read_config
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.models import OnePeaceEncoder, upstream
from onepeace_fast.models.fill import Shard
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.mico import Mico, MicoConfig
from onepeace_fast.models.unival import Unival
from onepeace_fast.pretrained import pickles
from onepeace_fast.pretrained.mico import KIND as MICO
from onepeace_fast.pretrained.mico import is_mico, load_mico
from onepeace_fast.pretrained.settings import ENCODER, MODELS, Found, from_settings, from_vision, kind_of, target
from onepeace_fast.pretrained.unival import KIND as UNIVAL
from onepeace_fast.pretrained.unival import is_unival, load_unival, load_unival_folder
from onepeace_fast.pretrained.weights import Undrawn, fit, is_vision, put, today

_log = logging.getLogger(__name__)
_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float64": torch.float64,
}  # fmt: skip


def from_pretrained(
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
) -> Any:
    """Build a model from a file, in evaluation mode; what was not simply copied is in its ``load_report``, logged once.

    The file is mapped into memory, and every parameter goes straight into its dtype and onto its device. All of it is
    checked before.

    Args:
        path_or_hub_id: upstream's ``.pt`` or vision ``.pkl``, a folder that ``save`` wrote or that holds one of these
            files, or the name of a repository of the Hugging Face Hub, "owner/name".
        model_type: "pretrain", "retrieval", "classify" or "encoder", also as upstream has it ("one_peace_retrieval"),
            "unival" or "mico"; None: what the file holds. Parts that the model does not have are left out.
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

    Returns:
        a model of ONE-PEACE; ``Unival`` for UnIVAL's file, which takes no image_size, head or adapters; ``Mico`` for
        MiCo's, which takes no head, adapters or shard, and leaves CLIP's text encoder out.

    Raises:
        ValueError: what is not there, broken, of another model or holds code; one line that names the file. Settings
            that this library does not implement.
        ImportError: SciPy or huggingface_hub is needed and missing; one line that says how to install it.
    """
    kind = model_type if model_type in (None, UNIVAL, MICO) else kind_of(model_type)
    dtype = _dtype(dtype)
    path = _find(path_or_hub_id, revision)
    try:
        place = torch.device(device or "cpu")
        return _load(path, kind, dtype, place, backend, ema, image_size, head or {}, adapters, shard, config)
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
    shard: Shard | None, config: MicoConfig | None,
) -> OnePeaceEncoder | Unival | Mico:  # fmt: skip
    report = LoadReport(str(path))
    if path.is_dir() and named_kind(path / upstream.CONFIG_FILE) == UNIVAL:
        plain = {"image_size": image_size, "head": head or None, "adapters": adapters, "ema": ema or None}
        _require_plain(kind, UNIVAL, "UnIVAL", **plain, config=config)
        return _reported(load_unival_folder(path, dtype, device, backend, shard, report), report)
    settings, weights = (None, {}) if path.is_dir() else _read_file(path, ema)
    if is_mico(weights):
        _require_plain(kind, MICO, "MiCo", head=head or None, adapters=adapters, shard=shard)
        return _reported(load_mico(path, weights, dtype, device, backend, image_size, config, report), report)
    if config is not None:
        raise ValueError("config: expected none but for a file of MiCo's, got one")
    if is_unival(weights):
        _require_plain(kind, UNIVAL, "UnIVAL", image_size=image_size, head=head or None, adapters=adapters)
        return _reported(load_unival(path, settings, weights, dtype, device, backend, shard, report), report)
    if kind in (UNIVAL, MICO):
        shown = ", ".join([*weights][:3]) or "none"
        raise ValueError(f"model_type: expected weights of {kind}, or one of {', '.join(MODELS)}, got {shown}")
    found = _read_folder(path, ema, head) if path.is_dir() else _one_peace(settings, weights, report.unknown, head)
    wanted = target(found, kind, image_size, head)
    with torch.device("meta"), Undrawn():  # no memory, and no numbers drawn, for what the file replaces
        model = MODELS[wanted.kind](wanted, backend, adapters)
    report.model = type(model).__name__
    put(model, fit(found.weights, found.config, model, wanted, report), dtype, device, shard, path)
    return _reported(model, report)


def _reported(model: Any, report: LoadReport) -> Any:
    model.load_report = report
    special = report.unknown or report.left_out or report.fresh or report.resampled or report.copied
    _log.log(logging.WARNING if special else logging.INFO, "%s", report)
    return model.eval()


def _require_plain(kind: str | None, own: str, family: str, **options: Any) -> None:
    """Refuse what is for other models alone."""
    if kind not in (None, own):
        raise ValueError(f"model_type: expected {own!r} or None for a file of {family}'s, got {kind!r}")
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: expected none for a file of {family}'s, got {value!r}")


def _read_folder(path: Path, ema: bool, head: Mapping[str, Any]) -> Found:
    if ema:
        raise ValueError("ema: expected False for a folder that save() wrote, got True")
    config = read_config(path / upstream.CONFIG_FILE)
    if head and isinstance(config, ClassifyConfig):
        raise ValueError(f"head: expected none for a file with a head, got {dict(head)}")
    return Found(upstream.read_weights(path), config)


def _read_file(path: Path, ema: bool) -> tuple[Any, dict[str, Tensor]]:
    """A file's settings, and its weights."""
    values = pickles.read(path)
    states: Any = values.get("model", values) if isinstance(values, Mapping) else None
    if ema:
        extra = values.get("extra_state") if isinstance(values, Mapping) else None
        states = extra.get("ema") if isinstance(extra, Mapping) else None
        if not states:
            kept = sorted(map(str, extra)) if isinstance(extra, Mapping) else "none"
            raise ValueError(f"ema: expected a moving average in extra_state, got {kept}; load without ema")
    settings = values.get("cfg") if isinstance(values, Mapping) else None
    if settings is None and isinstance(values, Mapping) and values.get("args") is not None:
        settings = values["args"]
    return pickles.plain(settings), pickles.tensors(states)


def _one_peace(settings: Any, given: Mapping[str, Tensor], unknown: list[str], head: Mapping[str, Any]) -> Found:
    weights = today(given)
    if not any(name.startswith(f"{ENCODER}.") for name in weights):
        shown = ", ".join([*weights][:3]) or "no tensors under 'model'"
        raise ValueError(f"expected weights of ONE-PEACE, such as {ENCODER}.*, got {shown}")
    return from_vision(weights) if is_vision(given) else from_settings(settings, weights, unknown, head)
