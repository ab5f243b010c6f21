"""The nearest items of a file of embeddings, by all of its cosines or by an index of faiss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.embedding.embedder import EMBEDDED, Embedder, Embeddings
from onepeace_fast.embedding.store import COLUMNS, Identity, Item, in_one_step, reading, rows_of
from onepeace_fast.installation import optional

BLOCK = 1 << 16  # rows that are compared at once
LINKS, BREADTH = 32, 128  # of the index: neighbours of an item, and items that a search keeps in view


class Hit(NamedTuple):
    """An item and the cosine between its embedding and the query's."""

    score: float
    item: Item


def combine(embeddings: Embeddings) -> Tensor:
    """One query from all that was embedded: the sum of the embeddings, at length 1; float32 [dim].

    Raises:
        ValueError: nothing was embedded.
    """
    rows = [rows for name in EMBEDDED if (rows := getattr(embeddings, name)) is not None]
    require(sum(map(len, rows)) > 0, "query: expected at least one text, image or sound, got none")
    return F.normalize(torch.cat(rows).sum(0), dim=0)


def check_model(path: Path, embedder: Embedder) -> None:
    """Raise ``ValueError`` where a file's embeddings are of another model, whose cosines would mean nothing."""
    with reading(path) as (_, found):
        name = found.difference(Identity.of(embedder))
        require(name is None, lambda: f"{path}: expected embeddings of this model, got others ({name} differs)")


def nearest(path: Path, query: Tensor, count: int, modalities: Sequence[str] = EMBEDDED) -> list[Hit]:
    """The items of a file with the largest cosines, best first; of equal ones the first in the file.

    Args:
        path: a file that ``onepeace-fast embed`` wrote; a block of it is in memory at a time.
        query: float32 [dim], of length 1.
        count: items at most.
        modalities: those whose items are looked at.

    Raises:
        ValueError: no such file, or embeddings of another size.
    """
    scores, items = torch.empty(0, dtype=torch.float32, device="cpu"), list[Item]()
    with reading(path) as (file, _):
        _check_dim(path, file, query)
        for block, rows in rows_of(file, BLOCK):
            chosen = [place for place, item in enumerate(block) if item.modality in modalities]
            found = torch.from_numpy(rows[chosen]) @ query
            best, order = torch.cat([scores, found]).sort(descending=True, stable=True)
            candidates = [*items, *(block[place] for place in chosen)]
            scores, items = best[:count], [candidates[place] for place in order[:count].tolist()]
    return [Hit(score, item) for score, item in zip(scores.tolist(), items, strict=True)]


def nearest_by_index(
    path: Path, index_path: Path, query: Tensor, count: int, modalities: Sequence[str] = EMBEDDED
) -> list[Hit]:
    """As ``nearest``, by an index in a file beside, which is built where it is not there.

    The index (HNSW, Malkov and Yashunin, arXiv 1603.09320) looks at few items, and may miss one that is near.

    Raises:
        ValueError: as ``nearest``; an index that is no such file, or of other embeddings.
        ImportError: faiss is missing.
    """
    faiss: Any = optional("faiss", "search")
    with reading(path) as (file, _):
        dim = _check_dim(path, file, query)
        if not index_path.exists():
            index = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = BREADTH
            for _, rows in rows_of(file, BLOCK):
                index.add(numpy.ascontiguousarray(rows))
            in_one_step(index_path, lambda draft: _write_index(faiss, index, draft))
        index = _read_index(faiss, index_path)
        newer = index_path.stat().st_mtime_ns >= path.stat().st_mtime_ns
        require(
            newer and (index.ntotal, index.d) == (file.metadata.num_rows, dim),
            lambda: f"{index_path}: expected an index of {path}, got an older or another one; remove it",
        )
        kinds = file.read(columns=["modality"]).column("modality").to_pylist()
        places = numpy.array([place for place, kind in enumerate(kinds) if kind in modalities], dtype=numpy.int64)
        settings = {"efSearch": max(BREADTH, 2 * count)}
        if len(places) < len(kinds):
            settings["sel"] = faiss.IDSelectorBatch(places)
        scores, found = index.search(query.numpy()[None], count, params=faiss.SearchParametersHNSW(**settings))
        there = [int(place) for place in found[0] if place >= 0]
        table = file.read(columns=list(COLUMNS[:3])).take(there).to_pydict()
    items = zip(*(table[name] for name in COLUMNS[:3]), strict=True)
    return [Hit(float(score), Item(*cells)) for score, cells in zip(scores[0], items, strict=False)]


def _check_dim(path: Path, file: Any, query: Tensor) -> int:
    dim = int(file.schema_arrow.field("embedding").type.list_size)
    require(
        list(query.shape) == [dim],
        lambda: f"{path}: expected embeddings of {query.shape[-1]} numbers, as the query's, got {dim}",
    )
    return dim


def _write_index(faiss: Any, index: Any, draft: Path) -> None:
    try:
        faiss.write_index(index, str(draft))
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())[-200:]) from None


def _read_index(faiss: Any, path: Path) -> Any:
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"{path}: expected an index of faiss, got another file ({reason})") from None
    require(isinstance(index, faiss.IndexHNSWFlat), lambda: f"{path}: expected HNSW, got {type(index).__name__}")
    return index
