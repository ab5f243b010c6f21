"""What goes into UnIVAL's encoder and decoder, checked: token ids, feature maps, and where each token stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from onepeace_fast.checks import describe, read_values, require, require_device, require_tensor, require_values
from onepeace_fast.models.unival.config import VISUAL, UnivalConfig
from onepeace_fast.models.unival.spectrogram import MEL_BINS, WINDOW
from onepeace_fast.relative_position import window_code_offset, window_codes
from onepeace_fast.routing import INTEGERS

BEGIN, PADDING, END = 0, 1, 2
AUDIO_STEP = 32  # frames, and bins, of a spectrogram to one place of its map
_RANKS = {"image": 4, "video": 5, "audio": 4}
_LAYOUTS = {
    "image": "[rows, channels, height, width]", "video": "[rows, channels, frames, height, width]",
    "audio": "[rows, channels, height, width]",
}  # fmt: skip
# What goes into networks.
_RAW_LAYOUTS = {
    "image": "[rows, 3, height, width]", "video": "[rows, 3, frames, height, width]", "audio": "[rows, samples]",
}  # fmt: skip


class Tokens(NamedTuple):
    """One modality of a padded batch.

    Places are where tokens may stand: several tokens share one, as those of all rows do. ``table_rows`` says which row
    of a table of positions a place has, ``codes`` its code for the relative bias.
    """

    values: Tensor  # ids int64 [rows, length], or features [rows, length, channels]
    valid: Tensor  # bool [rows, length]
    samples: list[int]  # of each row
    table_rows: Tensor  # int64 [places]
    codes: Tensor  # int64 [places]
    code_offset: int
    place: Tensor | None = None  # int64 [rows, length]; None: the column

    @property
    def places(self) -> Tensor:
        """The place of each token, int64 [rows, length]."""
        if self.place is not None:
            return self.place
        return torch.arange(self.valid.shape[1], device=self.valid.device).expand(self.valid.shape)


def text_tokens(name: str, ids: Tensor, samples: list[int], limit: int, vocab_size: int) -> Tokens:
    """Texts, padded with 1.

    Raises:
        ValueError: ids that do not fit, or more of them than there are positions.
    """
    require_tensor(name, ids, INTEGERS, "[rows, length]", 2)
    rows, length = ids.shape
    require(rows > 0, f"{name}: expected at least one text, got none")
    require(0 < length <= limit, lambda: f"{name}: expected 1 to {limit} tokens, one for a position, got {length}")
    require_values(
        ((ids >= 0) & (ids < vocab_size)).all(), f"{name}: expected ids from 0 to {vocab_size - 1}, got others"
    )
    places = torch.arange(length, device=ids.device)
    return Tokens(ids.long(), ids != PADDING, samples, places, places, length - 1)


def code_tokens(ids: Tensor, samples: list[int], config: UnivalConfig) -> Tokens:
    """Images written as codes behind their beginning, which is the last column here, as CLS is last of its segment."""
    length, window = ids.shape[1], config.code_window
    limit = window**2 + 1
    require(
        length <= limit,
        lambda: f"code: expected at most {limit} tokens, those of a window of {window} x {window}, got {length}",
    )
    rows, codes = grid_places(window, window, config, ids.device)
    ids, place = ids.long().roll(-1, 1), torch.arange(length, device=ids.device).roll(-1, 0).expand(ids.shape)
    first = rows.new_zeros(1)  # the beginning's row; its code is never used
    return Tokens(
        ids, ids != PADDING, samples, torch.cat([first, rows])[:length], torch.cat([first, codes])[:length],
        window_code_offset((config.image_bucket_size,) * 2), place,
    )  # fmt: skip


def grid_places(height: int, width: int, config: UnivalConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of a table of positions, and codes, of the places of a map: int64 [height * width] each."""
    side = config.image_bucket_size
    row, column = (torch.arange(size, device=device) for size in (height, width))
    return (1 + row[:, None] * side + column).flatten(), window_codes((height, width), (side, side), device).long()


def visual_tokens(
    name: str, features: Tensor, samples: list[int], config: UnivalConfig, patches: Tensor | None
) -> Tokens:
    """A feature map, row by row, of a video frame by frame; ``patches`` are the ones to take, in their order.

    Frames share their places. The map of an audio is laid row by row into a square, whatever its shape.

    Raises:
        ValueError: a map that does not fit, or is larger than the positions.
    """
    require(name in config.modalities, f"{name}: expected one of {', '.join(config.modalities)}, got {name}")
    fits = isinstance(features, Tensor) and features.is_floating_point() and features.dim() == _RANKS[name]
    if not fits or features.shape[1] != config.feature_channels:
        raise ValueError(
            f"{name}: expected floating point {_LAYOUTS[name]} of {config.feature_channels} channels, got "
            f"{describe(features)}"
        )
    height, width = features.shape[-2:]
    count = features[0, 0].numel() if features.shape[0] else 0
    if name == "audio":
        height = width = math.ceil(math.sqrt(height * width))
    side = config.image_bucket_size
    require(
        max(height, width) <= side and height * width > 0,
        lambda: (
            f"{name}: expected a map of at most {side} x {side} positions, got one that takes {height} x {width}; "
            "give a smaller one"
        ),
    )
    require(0 not in features.shape[2:], f"{name}: expected at least one frame, got none")
    rows, codes = grid_places(height, width, config, features.device)
    place = None
    if patches is not None:
        patches = place = _checked_patches(name, patches, features.shape[0], count, features.device)
        place = place % (height * width) if name == "video" else place
    elif name == "video":
        place = (torch.arange(count, device=features.device) % (height * width)).expand(features.shape[0], -1)
    values = taken(features, patches)
    valid = torch.ones(values.shape[:2], dtype=torch.bool, device=features.device)
    return Tokens(values, valid, samples, rows, codes, window_code_offset((side, side)), place)


def require_seen(config: UnivalConfig, name: str, x: Tensor) -> None:
    """Raise ``ValueError`` where a model does not take a map, or pixels, frames or a waveform, of one sample."""
    maps, _ = split_raw(config, {name: x[None]})
    visual_tokens(name, maps[name], [0], config, None)  # type: ignore[arg-type]


def taken(features: Tensor, patches: Tensor | None) -> Tensor:
    """A feature map's tokens [rows, length, channels], all of them or these patches."""
    values = features.flatten(2).transpose(1, 2)
    return values if patches is None else values.gather(1, patches.long()[:, :, None].expand(-1, -1, values.shape[2]))


def split_raw(
    config: UnivalConfig, maps: Mapping[str, Tensor | None]
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The maps, with one of zeros where a network will make it, and what goes into these networks.

    Raises:
        ValueError: pixels, frames or a waveform that do not fit.
    """
    raw = {
        name: x for name, x in maps.items() if name in config.modalities and config.networks and _is_raw(x, name)
    }  # fmt: skip
    return {**maps, **{name: _map_of(name, x, config) for name, x in raw.items()}}, raw


def _is_raw(x: object, name: str) -> TypeGuard[Tensor]:
    if not isinstance(x, Tensor):
        return False
    return x.dim() == 2 if name == "audio" else x.dim() == _RANKS[name] and x.shape[1] == 3


def _map_of(name: str, x: Tensor, config: UnivalConfig) -> Tensor:
    """Zeros without memory in the shape of a network's feature map."""
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected floating point {_RAW_LAYOUTS[name]}, got {describe(x)}")
    if name == "audio":
        least = max((AUDIO_STEP - 1) * config.audio_hop, WINDOW // 2 + 1)  # half a frame is reflected at each end
        require(x.shape[1] >= least, lambda: f"audio: expected at least {least} samples, got {x.shape[1]}")
        size = [(x.shape[1] // config.audio_hop + 1) // AUDIO_STEP, MEL_BINS // AUDIO_STEP]
    else:
        steps = [16, 32, 32] if name == "video" else [32, 32]
        size = [-(-extent // step) for extent, step in zip(x.shape[2:], steps, strict=True)]
    return x.new_zeros(()).expand(x.shape[0], config.feature_channels, *size)


def _checked_patches(name: str, patches: Tensor, rows: int, count: int, device: torch.device) -> Tensor:
    require_tensor(f"patches[{name!r}]", patches, INTEGERS, "[rows, patches]", 2)
    require(
        patches.shape[0] == rows and patches.shape[1] > 0,
        lambda: f"patches[{name!r}]: expected at least one for each of {rows} rows, got {describe(patches)}",
    )
    require_device(f"patches[{name!r}]", patches, device)
    require_values(
        ((patches >= 0) & (patches < count)).all(), f"patches[{name!r}]: expected 0 to {count - 1}, got others"
    )
    return patches.long()


def read_source(
    config: UnivalConfig, source: Tensor, maps: Mapping[str, Tensor | None],
    samples: Mapping[str, Sequence[int] | Tensor] | None, patches: Mapping[str, Tensor] | None,
) -> dict[str, Tokens]:  # fmt: skip
    """The encoder's tokens by modality, in the order of a sequence.

    Raises:
        ValueError: an input that does not fit.
    """
    text = text_tokens("source", source, [], config.max_source_positions, config.vocab_size)
    count, given = source.shape[0], {name: x for name, x in maps.items() if x is not None}
    for what, names in (("input", given), ("samples", samples or {}), ("patches", patches or {})):
        known = config.modalities if what == "input" else [*given]
        unknown = [name for name in names if name not in known]
        require(not unknown, lambda: f"{what}: expected some of {', '.join(known) or 'none'}, got {unknown}")  # noqa: B023
    found = {}
    for name in VISUAL:
        if name in given:
            require(isinstance(given[name], Tensor), lambda: f"{name}: expected a tensor, got {describe(given[name])}")  # noqa: B023
            require_device(name, given[name], source.device)
            own = _samples_of(name, given[name], count, (samples or {}).get(name))
            found[name] = visual_tokens(name, given[name], own, config, (patches or {}).get(name))
    return {**found, "text": text._replace(samples=[*range(count)])}


def _samples_of(name: str, x: Tensor, count: int, samples: Sequence[int] | Tensor | None) -> list[int]:
    rows = x.shape[0]
    if samples is None:
        require(
            rows == count,
            lambda: f"samples: expected the sample of each of the {rows} rows of {name}, of {count} texts, got none",
        )
        return [*range(count)]
    own = read_values(samples) if isinstance(samples, Tensor) else samples
    whole = isinstance(own, Sequence) and all(type(value) is int for value in own)
    fits = whole and len(own) == rows and len(set(own)) == rows and all(0 <= value < count for value in own)
    require(fits, lambda: f"samples[{name!r}]: expected {rows} different samples below {count}, got {own}")
    return [*own]


def require_texts(what: str, valid: Tensor) -> None:
    """Raise ``ValueError`` where a token, bool [rows, length], stands behind padding."""
    require_values(
        (valid[:, 1:] <= valid[:, :-1]).all(),
        f"{what}: expected texts with their padding, {PADDING}, behind them, got one with a token behind it",
    )


def read_target(
    config: UnivalConfig, what: str, ids: Tensor, source: Tensor, code: Sequence[bool] | Tensor | None
) -> dict[str, Tokens]:
    """The decoder's tokens: "text", and "code" of the samples that write an image.

    Raises:
        ValueError: ids that do not fit, or padding before a token.
    """
    whole = text_tokens(what, ids, [], config.max_target_positions, config.vocab_size)
    require_device(what, ids, source.device)
    require_texts(what, whole.valid)
    count = source.shape[0]
    require(ids.shape[0] == count, lambda: f"{what}: expected a row for each of {count} texts, got {ids.shape[0]}")
    flags = [False] * count
    if code is not None:
        given: Any = read_values(code) if isinstance(code, Tensor) else code
        fits = isinstance(given, Sequence) and len(given) == count and all(x in (0, 1) for x in given)
        require(fits, lambda: f"code: expected True or False for each of {count} texts, got {describe(given)}")
        flags = [bool(x) for x in given]
    found = {}
    for name, wanted in (("text", False), ("code", True)):
        own = [sample for sample, flag in enumerate(flags) if flag == wanted]
        rows = ids if len(own) == count else ids[torch.tensor(own, dtype=torch.int64, device=ids.device)]
        if own:
            found[name] = (
                code_tokens(rows, own, config) if wanted
                else whole._replace(values=rows.long(), valid=rows != PADDING, samples=own)
            )  # fmt: skip
    return found
