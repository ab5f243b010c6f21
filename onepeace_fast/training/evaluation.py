"""Retrieval of a checkpoint on a manifest: both sides of the pairs are embedded, then each looks for the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from onepeace_fast.checks import require
from onepeace_fast.data.batches import FileDataset, collate_clips
from onepeace_fast.data.manifest import CAPTION, columns_of, read_rows
from onepeace_fast.data.text import TokenizedCaptions, Tokenizer, pad_tokens
from onepeace_fast.layers.adapters import PATCH, AudioAdapter
from onepeace_fast.models.pretrain import OnePeacePretrain
from onepeace_fast.progress import progress
from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import CHECKSUMS_FILE, TOKENIZER_FILE, TRAINING_FILE
from onepeace_fast.training.retrieval import Figures, figures

MODALITIES = {CAPTION: "text", "image": "image", "audio": "audio"}  # by the column of a manifest
WORKERS = 2  # reading processes, as in training


class Items(NamedTuple):
    """The different items of a column, and which rows hold each."""

    column: str
    values: list[str]
    item_of_row: list[int]


def evaluate(folder: Path, manifest: Path, columns: Sequence[str] | None, batch_size: int) -> dict[str, Figures]:
    """The figures of both directions, such as {"image to text": ..., "text to image": ...}.

    Args:
        folder: a checkpoint.
        manifest: pairs as in training, or with the columns image and audio.
        columns: the two that are paired; None where the manifest has no more.
        batch_size: items that are embedded at once.

    Raises:
        ValueError: what does not fit, in one line.
    """
    folder, first, second = Path(folder).expanduser(), *_pair(manifest, columns)
    names = [MODALITIES[first], MODALITIES[second]]
    require_whole(folder)
    require_trained(folder, names)
    model = OnePeacePretrain.load(folder).eval().float()  # the files' pixels and samples are float32
    known = model.config.encoder.modalities
    require(
        set(names) <= set(known),
        f"{folder}: expected a model of {' and '.join(names)}, got one of {' and '.join(known)}",
    )
    rows = read_rows(manifest, (first, second))
    sides = [_items(column, [row.cells[place] for row in rows]) for place, column in enumerate((first, second))]
    for side in sides:
        require(
            len(set(side.values)) > 1,
            f"{manifest}: expected at least two different entries of {side.column!r}, got one; nothing can be confused",
        )
    # Read before the long work, which a missing tokenizer would make useless.
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE) if second == CAPTION else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    embedded = [_embed(model, tokenizer, side, batch_size, device) for side in sides]
    for name, embeddings in zip(names, embedded, strict=True):
        finite = bool(embeddings.isfinite().all())
        require(finite, f"{folder}: expected finite embeddings of {name}, got some that are infinite or no number")
    right = _right_answers(*sides)
    return {
        f"{names[0]} to {names[1]}": figures(embedded[0], embedded[1], right[0]),
        f"{names[1]} to {names[0]}": figures(embedded[1], embedded[0], right[1]),
    }


def _pair(manifest: Path, columns: Sequence[str] | None) -> tuple[str, str]:
    """The two columns, files first."""
    found = columns_of(manifest)
    wanted = found if columns is None else list(columns)
    if columns is None and len(found) != 2:
        what = f"{manifest}: expected two of the columns image, audio and caption, got {', '.join(found) or 'none'}"
        raise ValueError(f"{what}; say which by --columns" if len(found) == 3 else what)
    require(
        len(set(wanted)) == 2 and set(wanted) <= set(found),
        f"--columns: expected two of the columns of {manifest} ({', '.join(found)}), got {' and '.join(wanted)}",
    )
    first, second = sorted(wanted, key=found.index)
    return first, second


def require_whole(folder: Path) -> None:
    """Refuse a damaged checkpoint."""
    if (folder / CHECKSUMS_FILE).exists() and (reason := checkpoint.damage(folder)):
        raise ValueError(f"{folder}: expected a whole checkpoint, got a damaged one ({reason})")


def require_trained(folder: Path, modalities: Sequence[str]) -> None:
    """Refuse modalities whose weights are as they were drawn, of a whole checkpoint."""
    if not (folder / TRAINING_FILE).exists():
        return  # a model that save() wrote: what trained it is not known
    trained = checkpoint.load_state(folder).get("trained", modalities)  # older checkpoints do not say
    absent = [name for name in modalities if name not in trained]
    require(
        not absent,
        f"{folder}: expected a checkpoint trained on {' and '.join(modalities)}, got one of {' and '.join(trained)}",
    )


def _items(column: str, cells: Sequence[str]) -> Items:
    """Equal files are one item; every caption is one, as in COCO's protocol, also where two are equal."""
    if column == CAPTION:
        return Items(column, list(cells), list(range(len(cells))))
    values = list(dict.fromkeys(cells))
    place = {value: index for index, value in enumerate(values)}
    return Items(column, values, [place[cell] for cell in cells])


def _right_answers(first: Items, second: Items) -> tuple[list[list[int]], list[list[int]]]:
    """For each item of a side the items of the other that share a row with it, or with an equal caption."""
    by_value: list[dict[str, set[int]]] = [{}, {}]
    for items in zip(first.item_of_row, second.item_of_row, strict=True):
        for side, (own, other) in enumerate((items, items[::-1])):
            by_value[side].setdefault((first, second)[side].values[own], set()).add(other)
    # An image is right for a caption if that caption, word for word, stands with it.
    answers = [[sorted(by_value[side][value]) for value in (first, second)[side].values] for side in (0, 1)]
    if second.column == CAPTION:
        places: dict[str, list[int]] = {}
        for place, caption in enumerate(second.values):
            places.setdefault(caption, []).append(place)
        answers[0] = [sorted({p for own in found for p in places[second.values[own]]}) for found in answers[0]]
    return answers[0], answers[1]


@torch.no_grad()
def _embed(
    model: OnePeacePretrain, tokenizer: Tokenizer | None, side: Items, batch_size: int, device: torch.device
) -> Tensor:
    """Embeddings of a side's items, [items, dim], on the device."""
    if side.column == CAPTION:
        assert tokenizer is not None
        batches = _texts(tokenizer, side, batch_size)
    else:
        batches = _files(model, side, batch_size)
    bar = progress(f"Embedding {side.column}", "item", len(side.values))
    embedded = []
    for batch in batches:
        embedded.append(model.embed(**{name: value.to(device) for name, value in batch.items()}).float())
        bar.update(len(embedded[-1]))
    bar.close()
    return torch.cat(embedded)


def _texts(tokenizer: Tokenizer, side: Items, batch_size: int) -> Iterator[dict[str, Tensor]]:
    captions = TokenizedCaptions(side.values, tokenizer, name=lambda place: f"caption {place + 1}")
    for start in range(0, len(captions), batch_size):
        rows = range(start, min(start + batch_size, len(captions)))
        yield {"text": pad_tokens([captions[row] for row in rows])[0]}


def _files(model: OnePeacePretrain, side: Items, batch_size: int) -> Iterator[dict[str, Tensor]]:
    encoder, pixels, together = model.config.encoder, None, cast("Callable[..., Any]", _images)
    if side.column == "image":
        assert encoder.image is not None
        pixels = encoder.image.position_grid * PATCH
    else:
        # The method over the configuration, without the adapter, because workers may get it pickled.
        together = functools.partial(_clips, frames=functools.partial(cast(Any, AudioAdapter.frames), encoder.audio))
    files = FileDataset([Path(value) for value in side.values], pixels)
    workers = WORKERS if len(files) > batch_size else 0
    yield from DataLoader(files, batch_size=batch_size, collate_fn=together, num_workers=workers)


def _images(items: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"image": torch.stack(list(items))}


def _clips(items: Sequence[Tensor], frames: Callable[[int], int]) -> dict[str, Tensor]:
    batch = collate_clips(items, frames)
    return {name: batch[name] for name in ("audio", "audio_padding")}
