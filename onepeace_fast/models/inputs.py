"""Checks of a model's inputs before any work, and the one read of the device that a step needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onepeace_fast._routing import INTEGERS, check_samples
from onepeace_fast.checks import describe, require, require_device, require_tensor
from onepeace_fast.layers.adapters import PADDING_TOKEN, PATCH, Adapter
from onepeace_fast.relative_position import MAX_POSITIONS


class HostRead:
    """Collects small integer tensors and brings all of them to the host in one copy."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._values: list[list[int]] = []

    def add(self, tensor: Tensor) -> int:
        """Register a tensor; returns its place."""
        self._tensors.append(tensor.flatten().long())
        return len(self._tensors) - 1

    def fetch(self) -> None:
        """Copy everything registered: the only synchronisation."""
        away = [tensor for tensor in self._tensors if tensor.device.type != "cpu"]
        flat = iter(torch.cat(away).tolist() if away else ())
        for tensor in self._tensors:
            here = tensor.device.type == "cpu"
            self._values.append(tensor.tolist() if here else [next(flat) for _ in range(tensor.numel())])

    def __getitem__(self, place: int) -> list[int]:
        return self._values[place]


@dataclass(frozen=True)
class Subset:
    """Which tokens an encoder pass sees: bool masks [rows, length] and the number of True in each row."""

    masks: dict[str, Tensor]
    lengths: dict[str, list[int]]


@dataclass(frozen=True)
class Batch:
    """Checked inputs: each modality's tensor, its real tokens, and the sample of each row (None: rows in order)."""

    inputs: dict[str, Tensor]
    valid: Subset
    samples: dict[str, list[int]] | None

    def select(self, *names: str) -> Batch:
        """The same batch with some of its modalities."""
        return Batch(
            {name: self.inputs[name] for name in names},
            Subset({n: self.valid.masks[n] for n in names}, {n: self.valid.lengths[n] for n in names}),
            None if self.samples is None else {name: self.samples[name] for name in names},
        )


@dataclass(frozen=True)
class Hidden:
    """A denoising pass: hidden tokens bool [rows, length] (padding excluded), their number, and the tokens kept."""

    masks: dict[str, Tensor]
    counts: dict[str, int]
    kept: Subset


def read_batch(
    adapters: Mapping[str, Adapter],
    *,
    text: Tensor | None = None,
    image: Tensor | None = None,
    audio: Tensor | None = None,
    audio_padding: Tensor | None = None,
    samples: Mapping[str, Tensor | Sequence[int]] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    passes: Sequence[Mapping[str, str]] = (),
) -> tuple[Batch, list[Hidden]]:
    """Check everything and read the device once; raises ``ValueError`` before any work.

    ``passes`` says of each denoising pass which of ``masks`` (True where a token is hidden) each modality takes.
    """
    inputs = {n: v for n, v in (("text", text), ("image", image), ("audio", audio)) if v is not None}
    require(bool(inputs), "text, image, audio: got none, takes at least one modality")
    for name in inputs:
        require(name in adapters, f"{name}: got a tensor, takes none: the model was built without this modality")
    require(audio is not None or audio_padding is None, "audio_padding: got a tensor without audio, takes both")
    adapter = next(iter(adapters.values()))
    device, dtype = adapter.cls_embedding.device, adapter.cls_embedding.dtype
    checks = {
        "text": lambda: _check_text(text, adapters["text"]),
        "image": lambda: _check_image(image, adapters["image"], dtype),
        "audio": lambda: _check_audio(audio, audio_padding, adapters["audio"], dtype, device),
    }
    valid = {name: checks[name]() for name in inputs}
    for name, value in inputs.items():
        require_device(name, value, device)
    rows = {name: value.shape[0] for name, value in inputs.items()}
    places = [(modality, name) for names in passes for modality, name in names.items()]
    for modality, name in places:
        _check_mask(name, masks[name], valid[modality])
    if samples is None:
        check_samples(rows, None)
    else:
        _check_sample_rows(samples, device)

    read = HostRead()
    lengths_at = {name: read.add(mask.sum(1)) for name, mask in valid.items()}
    ids_at = None if text is None else read.add(((text < 0) | (text >= adapters["text"].vocab_size)).sum())
    cls_at = None if audio_padding is None else read.add(audio_padding[:, 0].sum())
    samples_at = {name: read.add(value) for name, value in (samples or {}).items() if isinstance(value, Tensor)}
    kept = {name: valid[modality] & ~masks[name] for modality, name in places}
    kept_at = {name: read.add(mask.sum(1)) for name, mask in kept.items()}
    hidden_cls_at = {name: read.add(masks[name][:, 0].sum()) for name in kept}
    read.fetch()

    if text is not None and read[ids_at][0]:
        limit = adapters["text"].vocab_size
        raise ValueError(f"text: got {read[ids_at][0]} token ids outside the vocabulary, takes 0 to {limit - 1}")
    require(cls_at is None or not read[cls_at][0], "audio_padding: got True at CLS, column 0, takes False there")
    for name, place in hidden_cls_at.items():
        require(not read[place][0], f"masks[{name!r}]: got True at CLS, column 0, takes False there")
    lengths = {name: read[place] for name, place in lengths_at.items()}
    sample_of = None
    if samples is not None:
        lists = {name: read[samples_at[name]] if name in samples_at else value for name, value in samples.items()}
        sample_of = check_samples(rows, lists)
    hidden = []
    for names in passes:
        kept_lengths = {modality: read[kept_at[name]] for modality, name in names.items()}
        counts = {modality: sum(lengths[modality]) - sum(kept_lengths[modality]) for modality in names}
        hidden_masks = {modality: masks[name] & valid[modality] for modality, name in names.items()}
        subset = Subset({modality: kept[name] for modality, name in names.items()}, kept_lengths)
        hidden.append(Hidden(hidden_masks, counts, subset))
    return Batch(inputs, Subset(valid, lengths), sample_of), hidden


def _check_sample_rows(samples: object, device: torch.device) -> None:
    require(isinstance(samples, Mapping), f"samples: got {describe(samples)}, takes {{modality: int64 [rows]}}")
    for name, value in samples.items():
        if isinstance(value, Tensor):
            fits = value.dtype in INTEGERS and value.dim() == 1 and value.device.type in ("cpu", device.type)
        else:
            fits = isinstance(value, Sequence) and all(type(item) is int for item in value)
        require(fits, f"samples[{name!r}]: got {describe(value)}, takes int64 [rows] or a list of integers")


def _check_text(text: Tensor, adapter: nn.Module) -> Tensor:
    require_tensor("text", text, (torch.int64, torch.int32), "[rows, length]", 2)
    limit = adapter.max_positions - 1
    require(text.shape[1] <= limit, f"text: got {text.shape[1]} tokens a row, takes at most {limit} beside CLS")
    return torch.cat([text.new_ones(text.shape[0], 1, dtype=torch.bool), text != PADDING_TOKEN], dim=1)


def _floats(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
    """Dtypes that a convolution takes: its weights', and under autocast the other ones too."""
    others = (torch.float32, torch.float16, torch.bfloat16) if torch.is_autocast_enabled(device.type) else ()
    return tuple(dict.fromkeys((dtype, *others)))


def _check_image(image: Tensor, adapter: nn.Module, dtype: torch.dtype) -> Tensor:
    require_tensor("image", image, _floats(dtype, adapter.cls_embedding.device), "[rows, 3, side, side]", 4)
    side, largest = image.shape[2], adapter.bias_grid * PATCH
    fits = image.shape[1] == 3 and side == image.shape[3] and side > 0 and side % PATCH == 0
    require(fits, f"image: got {describe(image)}, takes a square [rows, 3, side, side] with side a multiple of {PATCH}")
    bounded = not adapter.has_bias or side <= largest
    require(
        bounded, f"image: got side {side}, takes at most {largest}: the bias table covers {adapter.bias_grid} patches"
    )
    length = 1 + (side // PATCH) ** 2
    return torch.ones(image.shape[0], length, dtype=torch.bool, device=image.device)


def _check_audio(
    audio: Tensor, padding: Tensor | None, adapter: nn.Module, dtype: torch.dtype, device: torch.device
) -> Tensor:
    require_tensor("audio", audio, _floats(dtype, adapter.cls_embedding.device), "[rows, samples]", 2)
    frames = adapter.frames(audio.shape[1])
    require(frames > 0, f"audio: got {audio.shape[1]} samples, takes enough for one frame of the extractor")
    limit = min(adapter.max_positions, MAX_POSITIONS) - 1
    require(frames <= limit, f"audio: got {audio.shape[1]} samples, {frames} frames, takes at most {limit} frames")
    if padding is None:
        return torch.ones(audio.shape[0], frames + 1, dtype=torch.bool, device=audio.device)
    shape = (audio.shape[0], frames + 1)
    require(
        isinstance(padding, Tensor) and padding.dtype == torch.bool and padding.shape == shape,
        f"audio_padding: got {describe(padding)}, takes bool {list(shape)}, CLS and {frames} frames, True at padding",
    )
    require_device("audio_padding", padding, device)
    return ~padding


def _check_mask(name: str, mask: Tensor, valid: Tensor) -> None:
    require_tensor(f"masks[{name!r}]", mask, (torch.bool,), "[rows, length]", 2)
    shape = list(valid.shape)
    require(list(mask.shape) == shape, f"masks[{name!r}]: got {describe(mask)}, takes bool {shape}, CLS first")
    require_device(f"masks[{name!r}]", mask, valid.device)
