"""MiCo's samples: a manifest of JSON lines, each a caption and files of any modalities; docs/mico.md describes it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from onepeace_fast.checks import describe, require
from onepeace_fast.data.manifest import CAPTION, MISSING, read_objects, report_problems

SUBTITLE = "subtitle"
_COLUMNS = {"image": "vision", "video": "vision"}  # other columns have the name of their modality


class Seen(NamedTuple):
    """The files of one modality of a sample, an array or a frame each, and the column that they stand in."""

    column: str
    paths: tuple[Path, ...]


class MixedSample(NamedTuple):
    """A caption, and what it belongs to; ``where`` is the place in the manifest, for messages."""

    caption: str
    subtitle: str | None
    seen: Mapping[str, Seen]
    where: str

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the sample has beside its caption."""
        return (*self.seen, *([] if self.subtitle is None else [SUBTITLE]))


def read_samples(
    path: str | os.PathLike[str], modalities: Sequence[str], *, missing: str = "fatal"
) -> list[MixedSample]:
    """The samples of a manifest in order.

    Args:
        path: a file of JSON lines in UTF-8, each with "caption" and any of "subtitle", "image" or "video", and the
            other modalities; a column that is null is as one that is not there.
        modalities: those of the model that have frames.
        missing: as for ``read_manifest``.

    Raises:
        ValueError: as ``read_manifest``; or a line that is no JSON object, an unknown column, one that does not fit, or
            a sample without any modality.
    """
    require(missing in MISSING, lambda: f"missing: expected one of {', '.join(MISSING)}, got {missing!r}")
    manifest = Path(os.path.expanduser(path))
    columns = {column: name for column, name in _COLUMNS.items() if name in modalities}
    columns |= {name: name for name in modalities}
    found: list[MixedSample] = []
    problems: list[str] = []
    for line, where, row in read_objects(manifest):
        sample = _read_row(manifest, where, {name: value for name, value in row.items() if value is not None}, columns)
        if problem := _problem(sample):
            problems.append(f"line {line}: {problem}")
        else:
            found.append(sample)
    total = len(found) + len(problems)
    require(total > 0, lambda: f"{manifest}: expected samples, got none")
    if problems:
        report_problems(manifest, problems, total, missing)
    require(bool(found), lambda: f"{manifest}: expected a usable sample, got none among {total}")
    return found


def _read_row(manifest: Path, where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> MixedSample:
    known = [CAPTION, SUBTITLE, *columns]
    seen: dict[str, Seen] = {}
    for column, value in row.items():
        close = difflib.get_close_matches(column, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        require(column in known, lambda: f"{where}: expected some of {', '.join(known)}, got {column!r}{hint}")  # noqa: B023
        if column in (CAPTION, SUBTITLE):
            require(isinstance(value, str), lambda: f"{where}: {column}: expected a text, got {describe(value)}")  # noqa: B023
            continue
        name, paths = columns[column], [value] if isinstance(value, str) else value
        require(
            isinstance(paths, list) and len(paths) > 0 and all(isinstance(one, str) and one for one in paths),
            lambda: f"{where}: {column}: expected a path, or a list of paths of frames, got {describe(value)}",  # noqa: B023
        )
        require(
            name not in seen,
            lambda: f"{where}: expected one of {seen[name].column} and {column}, got both",  # noqa: B023
        )
        seen[name] = Seen(column, tuple(manifest.parent / os.path.expanduser(one) for one in paths))
    subtitle = row.get(SUBTITLE)
    require(
        bool(seen) or subtitle is not None,
        lambda: f"{where}: expected at least one of {', '.join(known[1:])} beside the caption, got none",
    )
    return MixedSample(row.get(CAPTION, ""), subtitle, seen, where)


def _problem(sample: MixedSample) -> str | None:
    for name, text in ((CAPTION, sample.caption), (SUBTITLE, sample.subtitle)):
        if text is not None and not text.strip():
            return f"empty {name}"
    for seen in sample.seen.values():
        for path in seen.paths:
            if not os.path.isfile(path):  # False too where the name itself is none, as a text in a column of files
                return f"no file {path}"
    return None
