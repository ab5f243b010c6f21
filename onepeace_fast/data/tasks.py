"""UnIVAL's tasks: a manifest of JSON lines, and what each task asks and answers; docs/unival.md describes both."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from onepeace_fast.checks import describe, require
from onepeace_fast.config import is_number
from onepeace_fast.data.manifest import MISSING, read_objects, report_problems
from onepeace_fast.data.text import Tokenizer

BINS = 1000
MATCHES = ("yes", "no")
_LOCATION = re.compile(r"<bin_(\d+)>")

_log = logging.getLogger(__name__)


class Task(NamedTuple):
    """What is seen or heard, and the texts of question and answer with the columns that they hold."""

    modality: str
    question: str
    answer: str

    @property
    def columns(self) -> list[str]:
        """Those of the texts."""
        return re.findall(r"{(\w+)}", self.question + self.answer)


# The questions are those that upstream's checkpoints were trained with.
TASKS = {
    "caption": Task("image", "what does the image describe?", "{caption}"),
    "vqa": Task("image", "{question}", "{answer}"),
    "grounding": Task("image", 'which region does the text " {text} " describe?', "{box}"),
    "matching": Task("image", 'does the image describe " {caption} "?', "{answer}"),
    "video_caption": Task("video", "what does the video describe?", "{caption}"),
    "audio_caption": Task("audio", "what does the audio describe?", "{caption}"),
}


class Sample(NamedTuple):
    """A file, what is asked about it and what is to be written; ``line`` of the manifest, from 1."""

    path: Path
    question: str
    answer: str
    line: int


def read_tasks(
    path: str | os.PathLike[str], *, bins: int = BINS, missing: str = "fatal", wanted: Sequence[str] | None = None
) -> dict[str, list[Sample]]:
    """The samples of every task, in the order of a manifest.

    Args:
        path: a file of JSON lines in UTF-8, each with "task" and that task's columns.
        bins: of locations.
        missing: as for ``read_manifest``.
        wanted: the tasks that must have samples; how many of others are left out is logged. None: all that there are.

    Raises:
        ValueError: as ``read_manifest``; or a line that is no JSON object, an unknown task, a column that is not there
            or does not fit, or a wanted task without a sample.
    """
    require(missing in MISSING, lambda: f"missing: expected one of {', '.join(MISSING)}, got {missing!r}")
    manifest = Path(os.path.expanduser(path))
    found: dict[str, list[Sample]] = {}
    problems, total = [], 0
    others: Counter[str] = Counter()
    for line, where, row in read_objects(manifest):
        task = _task_of(where, row)
        if wanted is not None and task not in wanted:
            others[task] += 1
            continue
        total += 1
        texts = {column: _text_of(where, task, column, row, bins) for column in TASKS[task].columns}
        modality = TASKS[task].modality
        require(isinstance(row.get(modality), str), lambda: _expected(where, task, modality, "a path", row))  # noqa: B023
        whole = manifest.parent / os.path.expanduser(row[modality])
        empty = [column for column, text in texts.items() if not text.strip()]
        if empty or not os.path.isfile(whole):
            problems.append(f"line {line}: " + (f"empty {empty[0]}" if empty else f"no file {whole}"))
            continue
        question, answer = (text.format(**texts) for text in TASKS[task][1:])
        found.setdefault(task, []).append(Sample(whole, question, answer, line))
    require(total > 0, lambda: f"{manifest}: expected samples of {', '.join(wanted or TASKS)}, got none")
    if problems:
        report_problems(manifest, problems, total, missing)
    for task in wanted or ():
        require(task in found, lambda: f"{manifest}: expected a usable sample of {task}, got none")  # noqa: B023
    require(bool(found), lambda: f"{manifest}: expected a usable sample, got none among {total}")
    if others:
        counts = ", ".join(f"{task} ({count:,})" for task, count in others.items())
        _log.warning("%s: samples of other tasks than %s are left out: %s", manifest, ", ".join(wanted or ()), counts)
    return found


def _task_of(where: str, row: Mapping[str, Any]) -> str:
    task = row.get("task")
    close = difflib.get_close_matches(str(task), TASKS, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if not (isinstance(task, str) and task in TASKS):
        raise ValueError(f"{where}: task: expected one of {', '.join(TASKS)}, got {task!r}{hint}")
    return task


def _expected(where: str, task: str, column: str, what: str, row: Mapping[str, Any]) -> str:
    got = describe(row[column]) if column in row else "none"
    return f"{where}: {column}: expected {what} for {task}, got {got}"


def _text_of(where: str, task: str, column: str, row: Mapping[str, Any], bins: int) -> str:
    value: Any = row.get(column)
    if column == "box":
        fits = isinstance(value, list) and len(value) == 4 and all(is_number(one) and 0 <= one <= 1 for one in value)
        ordered = fits and value[0] <= value[2] and value[1] <= value[3]
        what = "[left, top, right, bottom] as shares of width and height, from 0 to 1,"
        require(ordered, lambda: _expected(where, task, column, what, row))
        return " ".join(location(one, bins) for one in value)
    if task == "matching" and column == "answer":
        require(value in MATCHES, lambda: _expected(where, task, column, " or ".join(MATCHES), row))
    require(isinstance(value, str), lambda: _expected(where, task, column, "a text", row))
    return value


def location(share: float, bins: int = BINS) -> str:
    """The word of a place from 0 to 1: the nearest of ``bins`` that stand evenly from 0 to 1, both included."""
    nearest = round(share * (bins - 1))
    return f"<bin_{nearest}>"


class Vocabulary:
    """A tokenizer's words first, and the locations ``<bin_0>``, ``<bin_1>`` and so on in the last rows of a table.

    What stands between, upstream's codes of images, no text has.

    Raises:
        ValueError: fewer rows than tokens and locations.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, bins: int = BINS) -> None:
        size = tokenizer.vocab_size
        require(
            size + bins <= rows,
            f"vocab_size: expected at least {size + bins}, {size} tokens and {bins} locations, got {rows}",
        )
        self.tokenizer, self.bins, self._first = tokenizer, bins, rows - bins

    def tokens(self, text: str) -> tuple[list[int], list[bool]]:
        """As ``Tokenizer.tokens``, each location a word.

        Raises:
            ValueError: as there, or a location past the last.
        """
        ids: list[int] = []
        starts: list[bool] = []
        end = 0
        for found in _LOCATION.finditer(text):
            place = int(found[1])
            require(place < self.bins, f"text: expected locations up to <bin_{self.bins - 1}>, got {found[0]}")
            before = self._words(text[end : found.start()])
            ids += [*before[0], self._first + place]
            starts += [*before[1], True]
            end = found.end()
        after = self._words(text[end:]) if ids else self.tokenizer.tokens(text)
        return ids + after[0], starts + after[1]

    def _words(self, text: str) -> tuple[list[int], list[bool]]:
        return self.tokenizer.tokens(text) if text.strip() else ([], [])

    def text(self, ids: Sequence[int]) -> str:
        """What ``tokens`` made these ids of, in the tokenizer's spelling."""
        parts: list[str] = []
        words: list[int] = []
        for token in [*ids, self._first]:
            if token < self._first:
                words.append(token)
                continue
            parts += [self.tokenizer.decode(words)] if words else []
            parts.append(f"<bin_{token - self._first}>")
            words = []
        return " ".join(parts[:-1])


def without_locations(text: str) -> str:
    """A text's words alone, for a tokenizer to be trained on."""
    return _LOCATION.sub(" ", text)
