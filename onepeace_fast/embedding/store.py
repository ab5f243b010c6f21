"""Files of embeddings: Parquet with a row for each item, written in parts that a kill leaves whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.embedding.embedder import EMBEDDED, Embedder
from onepeace_fast.installation import optional
from onepeace_fast.models.base import EmbeddingModel

COLUMNS = ("modality", "item", "line", "embedding")
PREFIX = "onepeace_fast."  # of the entries in a file's metadata
ROWS = 4096  # of a row group


class Item(NamedTuple):
    """What was embedded: its modality, its path or text, and the first line of the manifest that has it."""

    modality: str
    value: str
    line: int


@dataclass(frozen=True)
class Identity:
    """What made embeddings: digests, by name, of each modality's projection and of how inputs were prepared.

    Two models compare where every name that both have has one value.
    """

    digests: Mapping[str, str]

    @classmethod
    def of(cls, embedder: Embedder) -> Identity:
        """That of a model with its processor."""
        model, processor = embedder.model, embedder.processor
        assert isinstance(model, EmbeddingModel)
        found = {}
        for name in set(EMBEDDED) & set(model.config.encoder.modalities):
            weight = model.get_submodule(f"{name}_proj").weight
            assert isinstance(weight, Tensor)
            # In bfloat16, so that a file's model is the same in whichever dtype it was loaded.
            found[name] = _digest(weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        if "image" in found:
            found["pixels"] = f"{processor.image_size} {processor.fit}"
        if processor.tokenizer is not None:
            found["tokenizer"] = _digest(processor.tokenizer.text().encode())
        return cls(found)

    def difference(self, other: Identity) -> str | None:
        """The first name that both have with different values."""
        common = sorted(set(self.digests) & set(other.digests))
        return next((name for name in common if self.digests[name] != other.digests[name]), None)


class Parts:
    """The folder ``{out}.parts``, in which a file of embeddings grows: each part appears in one step.

    Args:
        out: the file that ``finish`` writes.
        identity: what makes the embeddings; parts of another are refused.

    Raises:
        ValueError: the file is there already, or parts of another model or that are no parts.
        ImportError: pyarrow is missing.
    """

    def __init__(self, out: Path, identity: Identity) -> None:
        check_free(out)
        optional("pyarrow.parquet", "train")
        self.out, self.folder, self._identity = out, out.with_name(out.name + ".parts"), identity
        self.folder.mkdir(exist_ok=True)
        self.done: set[tuple[str, str]] = set()
        self._paths = sorted(self.folder.glob("[0-9]*.parquet"))
        for path in self._paths:
            with reading(path) as (file, found):
                if name := found.difference(identity):
                    raise ValueError(
                        f"{path}: expected embeddings of this model and tokenizer, got others ({name} differs); "
                        f"remove {self.folder} to begin again"
                    )
                for items, _ in rows_of(file):
                    self.done |= {(item.modality, item.value) for item in items}

    def add(self, items: Sequence[Item], embeddings: Tensor) -> None:
        """Write one more part; float32 [items, dim]."""
        last = int(self._paths[-1].stem) if self._paths else -1
        path = self.folder / f"{last + 1:06d}.parquet"
        _write(path, [(items, embeddings.numpy())], embeddings.shape[1], self._identity)
        self._paths.append(path)
        self.done |= {(item.modality, item.value) for item in items}

    def finish(self, wanted: Sequence[Item]) -> int:
        """Write the file of all parts' items that are wanted, in one step, and remove the parts; the items in it."""
        line, count = {(item.modality, item.value): item.line for item in wanted}, 0

        def kept() -> Iterator[tuple[list[Item], numpy.ndarray]]:
            nonlocal count
            for path in self._paths:
                with reading(path) as (file, _):
                    for items, rows in rows_of(file):
                        places = [n for n, item in enumerate(items) if (item.modality, item.value) in line]
                        chosen = [items[n] for n in places]
                        count += len(chosen)
                        yield [one._replace(line=line[one.modality, one.value]) for one in chosen], rows[places]

        with reading(self._paths[0]) as (file, _):
            dim = file.schema_arrow.field("embedding").type.list_size
        _write(self.out, kept(), dim, self._identity)
        shutil.rmtree(self.folder)
        return count


def check_free(out: Path) -> None:
    """Raise ``ValueError`` where a file cannot be made."""
    require(not out.exists(), lambda: f"{out}: expected a name without a file, got one that is taken; remove it")
    require(out.parent.is_dir(), lambda: f"{out}: expected a file in a folder that exists, got {out.parent}")


@contextmanager
def reading(path: Path) -> Iterator[tuple[Any, Identity]]:
    """An open file of embeddings, and what made them.

    Raises:
        ValueError: no such file, or another.
        ImportError: pyarrow is missing.
    """
    arrow, parquet = optional("pyarrow", "train"), optional("pyarrow.parquet", "train")
    require(path.is_file(), lambda: f"{path}: expected a file of embeddings, got no file there")
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected Parquet, got another file ({' '.join(str(error).split())})") from None
    with file:
        names = file.schema_arrow.names
        require(
            names == list(COLUMNS) and arrow.types.is_fixed_size_list(file.schema_arrow.field("embedding").type),
            lambda: f"{path}: expected columns {', '.join(COLUMNS)}, as `onepeace-fast embed` writes, got {names}",
        )
        entries = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
        digests = {key.removeprefix(PREFIX): value for key, value in entries.items() if key.startswith(PREFIX)}
        try:
            yield file, Identity(digests)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: expected a whole file, got {' '.join(str(error).split())}") from None


def rows_of(file: Any, size: int = ROWS) -> Iterator[tuple[list[Item], numpy.ndarray]]:
    """A file's items and embeddings, float32 [items, dim], ``size`` at a time."""
    for batch in file.iter_batches(batch_size=size):
        columns = [batch.column(name).to_pylist() for name in COLUMNS[:3]]
        embeddings = batch.column("embedding")
        rows = embeddings.flatten().to_numpy(zero_copy_only=False).reshape(len(embeddings), -1)
        yield [Item(*cells) for cells in zip(*columns, strict=True)], rows


def _write(path: Path, blocks: Any, dim: int, identity: Identity) -> None:
    """Write a file beside its place, on the disk, and put it there in one step."""
    arrow, parquet = optional("pyarrow", "train"), optional("pyarrow.parquet", "train")
    types = (arrow.string(), arrow.string(), arrow.int64(), arrow.list_(arrow.float32(), dim))
    metadata = {PREFIX + name: value for name, value in identity.digests.items()}
    schema = arrow.schema(list(zip(COLUMNS, types, strict=True)), metadata=metadata)

    def fill(draft: Path) -> None:
        with draft.open("wb") as file:
            with parquet.ParquetWriter(file, schema) as writer:
                for items, rows in blocks:
                    if not items:
                        continue
                    flat = arrow.array(numpy.ascontiguousarray(rows, dtype=numpy.float32).ravel())
                    cells = zip(zip(*items, strict=True), types[:3], strict=True)
                    columns = [arrow.array(column, kind) for column, kind in cells]
                    embeddings = arrow.FixedSizeListArray.from_arrays(flat, dim)
                    writer.write_batch(arrow.record_batch([*columns, embeddings], schema=schema))
            file.flush()
            os.fsync(file.fileno())

    in_one_step(path, fill)


def in_one_step(path: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a draft beside the path and put it there; where that fails nothing is left.

    Raises:
        ValueError: the disk is full or refuses; one line that names the path.
    """
    draft = path.with_name(path.name + ".new")
    try:
        fill(draft)
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        reason = error.strerror or " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected room for a file, got an error ({reason}); nothing is half-written"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text by ``in_one_step``; a file's name in it may be no text."""

    def fill(draft: Path) -> None:
        draft.write_text(text, encoding="utf-8", errors="replace")

    in_one_step(path, fill)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
