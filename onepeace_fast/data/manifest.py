"""Manifests: which file belongs to which caption, as TSV or Parquet; docs/training.md describes both."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onepeace_fast.checks import require
from onepeace_fast.data._optional import optional

COLUMNS = ("image", "audio")
MISSING = ("fatal", "list", "skip")
_SHOWN = 3
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A file and its caption; ``line`` of the TSV, counted from 1, or row of the Parquet file, also from 1."""

    path: Path
    caption: str
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
    require(missing in MISSING, lambda: f"missing: expected one of {', '.join(MISSING)}, got {missing!r}")
    manifest = Path(os.path.expanduser(path))
    require(manifest.is_file(), lambda: f"{manifest}: expected a manifest, TSV or Parquet, got no file there")
    parquet = manifest.suffix.lower() == ".parquet"
    entries, problems = [], []
    for line, file, caption in (_parquet_rows if parquet else _tsv_rows)(manifest, modality):
        entry = Entry(manifest.parent / os.path.expanduser(file), caption, line)
        if problem := _problem(entry, file):
            problems.append(f"{'row' if parquet else 'line'} {line}: {problem}")
        else:
            entries.append(entry)
    total = len(entries) + len(problems)
    require(total > 0, lambda: f"{manifest}: expected pairs below the header, got none")
    if problems:
        _report(manifest, problems, total, missing)
    require(bool(entries), lambda: f"{manifest}: expected a usable pair, got none among {total}")
    return entries


def _problem(entry: Entry, file: str) -> str | None:
    if not entry.caption.strip():
        return f"empty caption of {file!r}"
    if not file:
        return "no path"
    return None if os.path.isfile(entry.path) else f"no file {entry.path}"


def _report(manifest: Path, problems: list[str], total: int, missing: str) -> None:
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


def _tsv_rows(manifest: Path, modality: str) -> Iterator[tuple[int, str, str]]:
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
                _check_columns(manifest, header, modality, f" in line {line}")
                places = header.index(modality), header.index("caption")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{manifest}: expected {len(header)} columns as in the header, got {len(cells)} in line {line}; "
                    "one tab stands between two"
                )
            yield line, cells[places[0]], cells[places[1]]
    if header is None:
        raise ValueError(f"{manifest}: expected a header with {modality!r} and 'caption', got an empty file")


def _unquoted(cell: str) -> str:
    """A cell that is quoted as a whole, as spreadsheets write one with quotes in it; any other as it is."""
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _parquet_rows(manifest: Path, modality: str) -> Iterator[tuple[int, str, str]]:
    arrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    columns = [modality, "caption"]
    row = 0
    try:
        with parquet.ParquetFile(manifest) as file:
            schema = file.schema_arrow
            _check_columns(manifest, schema.names, modality, "")
            for name in columns:
                kind = schema.field(name).type
                if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                    raise ValueError(f"{manifest}: expected a column {name!r} of strings, got {kind}")
            for batch in file.iter_batches(columns=columns):
                for file_name, caption in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    row += 1
                    yield row, file_name or "", caption or ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: expected UTF-8, got other bytes after row {row} ({error.reason})") from None
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{manifest}: expected a Parquet file, got another ({reason})") from error


def _check_columns(manifest: Path, names: list[str], modality: str, place: str) -> None:
    for name in (modality, "caption"):
        if names.count(name) != 1:
            raise ValueError(
                f"{manifest}: expected one column {name!r}{place}, got {names.count(name)} among "
                f"{', '.join(map(repr, names[:10]))}{', ...' if len(names) > 10 else ''}"
            )
