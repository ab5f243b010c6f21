"""Manifests: which file belongs to which caption, as TSV or Parquet; docs/training.md describes both."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from onepeace_fast.checks import describe, require
from onepeace_fast.data._optional import optional

COLUMNS, CAPTION = ("image", "audio"), "caption"
MISSING = ("fatal", "list", "skip")
_SHOWN = 3
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A file and its caption; ``line`` of the TSV, counted from 1, or row of the Parquet file, also from 1."""

    path: Path
    caption: str
    line: int


class Row(NamedTuple):
    """The cells of the columns that were asked for, files as whole paths; ``line`` as in ``Entry``."""

    cells: tuple[str, ...]
    line: int


def read_manifest(path: str | os.PathLike[str], modality: str, *, missing: str = "fatal") -> list[Entry]:
    """Read the pairs of a manifest in order and see that every file is there and every caption has text.

    Args:
        path: a TSV file, or Parquet where the name ends in ``.parquet``. ``~`` is expanded, in it and in its paths. A
            TSV's cell in quotes loses them, and quotes that are doubled inside are single ones.
        modality: "image" or "audio", the column with the files.
        missing: what to do about lines whose file is missing or whose caption is empty. "fatal": stop, name the first
            few and how many; "list": log each one, then stop; "skip": leave them out and log how many.

    Raises:
        ValueError: as above, or no such manifest, broken UTF-8, missing columns, a line with another number of columns,
            no pairs at all; one line that names the manifest.
        ImportError: a Parquet file, and pyarrow is missing.
    """
    require(modality in COLUMNS, lambda: f"modality: expected one of {', '.join(COLUMNS)}, got {modality!r}")
    rows = read_rows(path, (modality, CAPTION), missing=missing)
    return [Entry(Path(row.cells[0]), row.cells[1], row.line) for row in rows]


def read_rows(path: str | os.PathLike[str], columns: Sequence[str], *, missing: str = "fatal") -> list[Row]:
    """Read some columns of a manifest, "image", "audio" or "caption", as ``read_manifest`` does."""
    require(missing in MISSING, lambda: f"missing: expected one of {', '.join(MISSING)}, got {missing!r}")
    manifest, parquet = _existing(path)
    rows, problems = [], []
    for line, cells, whole in _whole_rows(manifest, parquet, columns):
        if problem := _problem(columns, cells, whole):
            problems.append(f"{'row' if parquet else 'line'} {line}: {problem}")
        else:
            rows.append(Row(tuple(whole), line))
    total = len(rows) + len(problems)
    require(total > 0, lambda: f"{manifest}: expected pairs below the header, got none")
    if problems:
        report_problems(manifest, problems, total, missing)
    require(bool(rows), lambda: f"{manifest}: expected a usable pair, got none among {total}")
    return rows


def read_items(path: str | os.PathLike[str], column: str) -> list[Row]:
    """The cells of one column that are not empty, files as whole paths that nobody has looked for.

    Raises:
        ValueError: no such manifest, broken UTF-8, no such column, or a line with another number of columns.
        ImportError: a Parquet file, and pyarrow is missing.
    """
    rows = _whole_rows(*_existing(path), (column,))
    return [Row(tuple(whole), line) for line, cells, whole in rows if cells[0].strip()]


def columns_of(path: str | os.PathLike[str]) -> list[str]:
    """Which of "image", "audio" and "caption" a manifest has, in this order.

    Raises:
        ValueError: no manifest there, or one that cannot be read.
        ImportError: a Parquet file, and pyarrow is missing.
    """
    manifest, parquet = _existing(path)
    if parquet:
        with _parquet_file(manifest) as file:
            names = file.schema_arrow.names
    else:
        with manifest.open("rb") as file:
            lines = (line.decode("utf-8-sig", "replace").rstrip("\r\n") for line in file)
            names = [_unquoted(cell) for cell in next(filter(None, lines), "").split("\t")]
    return [name for name in (*COLUMNS, CAPTION) if name in names]


def _whole_rows(manifest: Path, parquet: bool, columns: Sequence[str]) -> Iterator[tuple[int, list[str], list[str]]]:
    """Line, cells, and the cells with whole paths, of every row."""
    for line, cells in (_parquet_rows if parquet else _tsv_rows)(manifest, columns):
        whole = [cell if column == CAPTION else str(manifest.parent / os.path.expanduser(cell))
                 for column, cell in zip(columns, cells, strict=True)]  # fmt: skip
        yield line, cells, whole


def read_objects(manifest: Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Number, place for messages and JSON object of each line that has something.

    Raises:
        ValueError: no such manifest, or a line that is no JSON object.
    """
    require(manifest.is_file(), lambda: f"{manifest}: expected a manifest of JSON lines, got no file there")
    with manifest.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{manifest}, line {line}"
            try:
                row = json.loads(raw, object_pairs_hook=_each_once)
            except (ValueError, RecursionError) as error:  # also of other bytes than UTF-8, and of very deep lists
                raise ValueError(f"{where}: expected a JSON object, got another text ({error})") from None
            require(isinstance(row, dict), lambda: f"{where}: expected a JSON object, got {describe(row)}")  # noqa: B023
            yield line, where, row


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ``ValueError`` where a name stands in it twice, of which json itself takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _existing(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """A manifest that is there, and whether it is Parquet."""
    manifest = Path(os.path.expanduser(path))
    require(manifest.is_file(), lambda: f"{manifest}: expected a manifest, TSV or Parquet, got no file there")
    return manifest, manifest.suffix.lower() == ".parquet"


def _problem(columns: Sequence[str], cells: Sequence[str], whole: Sequence[str]) -> str | None:
    for column, cell in zip(columns, cells, strict=True):
        if column == CAPTION and not cell.strip():
            return f"empty caption of {cells[0]!r}"
    for column, cell, path in zip(columns, cells, whole, strict=True):
        if column != CAPTION and not cell:
            return "no path"
        if column != CAPTION and not os.path.isfile(path):
            return f"no file {path}"
    return None


def report_problems(manifest: Path, problems: list[str], total: int, missing: str) -> None:
    """Stop because of rows that are not whole, or log how many are left out; see ``read_manifest``."""
    found = f"{len(problems)} of {total} pairs without a file or a caption"
    if missing == "skip":
        _log.warning("%s: %s; they are left out", manifest, found)
        return
    if missing == "list":
        for problem in problems:
            _log.error("%s, %s", manifest, problem)
        raise ValueError(f"{manifest}: expected both of every pair, got {found}; they are listed above")
    shown = "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")
    raise ValueError(
        f"{manifest}: expected both of every pair, got {found} ({shown}); missing='list' shows all, 'skip' leaves them "
        "out"
    )


def _tsv_rows(manifest: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    header = None
    # As bytes, since a caption may hold characters that str.splitlines takes for the end of a line.
    with manifest.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{manifest}: expected UTF-8, got other bytes in line {line} ({error.reason}); save it so"
                ) from None
            if not text:
                continue
            cells = [_unquoted(cell) for cell in text.split("\t")]
            if header is None:
                header = cells
                _check_columns(manifest, header, columns, f" in line {line}")
                places = [header.index(column) for column in columns]
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{manifest}: expected {len(header)} columns as in the header, got {len(cells)} in line {line}; "
                    "one tab stands between two"
                )
            yield line, [cells[place] for place in places]
    if header is None:
        raise ValueError(f"{manifest}: expected a header with {' and '.join(map(repr, columns))}, got an empty file")


def _unquoted(cell: str) -> str:
    """A cell that is quoted as a whole, as spreadsheets write one with quotes in it; any other as it is."""
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


@contextmanager
def _parquet_file(manifest: Path) -> Iterator[Any]:
    arrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    try:
        with parquet.ParquetFile(manifest) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{manifest}: expected a Parquet file, got another ({reason})") from error


def _parquet_rows(manifest: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    row = 0
    with _parquet_file(manifest) as file:
        types, schema = optional("pyarrow").types, file.schema_arrow
        _check_columns(manifest, schema.names, columns, "")
        for name in columns:
            kind = schema.field(name).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise ValueError(f"{manifest}: expected a column {name!r} of strings, got {kind}")
        try:
            for batch in file.iter_batches(columns=list(columns)):
                for cells in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    row += 1
                    yield row, [cell or "" for cell in cells]
        except UnicodeDecodeError as error:
            raise ValueError(f"{manifest}: expected UTF-8, got other bytes after row {row} ({error.reason})") from None


def _check_columns(manifest: Path, names: list[str], columns: Sequence[str], place: str) -> None:
    for name in columns:
        if names.count(name) != 1:
            raise ValueError(
                f"{manifest}: expected one column {name!r}{place}, got {names.count(name)} among "
                f"{', '.join(map(repr, names[:10]))}{', ...' if len(names) > 10 else ''}"
            )
