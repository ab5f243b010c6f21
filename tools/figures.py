"""Hold every figure that README and docs quote against a committed result file: python -m tools.figures [--write]

HTML comments in the text say where a figure is from; files are those of benchmarks/results.

    <!-- files A=cpu_X.json B=cpu_Y.json -->           names of files, for the rest of the document
    4423<!--A Stack/sounds/both passes/reference/median_ms--> ms      one figure, by its path in the file
    <!-- table A B [mode=forward]: {input} | {ours[median_ms]:.0f} ms -->   the table below, by a row of str.format

A path's part is a key, or the only one that begins with it; in a list a number from 0, * for all, or a string that one
of the row's values equals: several such parts choose one row. Before a path may stand median, min or max, of what *
gives, or 1/ for its inverse; behind it a factor, *1e-6. The rows of a table are found by their first cells of plain
text; {x!i} is 1 / x, a pair is shown as a range, {A[x]} is x in the row of that file. ``--write`` puts values in.

Other figures, with a unit or two decimals, are refused, unless a comment ``<!-- given: why -->`` in their paragraph
says why no file has them: a goal, the size of an input.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = re.compile(r"<!-- files (.*?) -->", re.DOTALL)
TABLE = re.compile(r"<!-- table ([A-Z ]+?)(?: \[(\w+)=([^]]+)\])?: (.*?) -->\n", re.DOTALL)
MARKED = re.compile(r"(?P<figure>[\d,]*\d(?:\.\d+)?)(?P<percent>%?)<!--(?P<file>[A-Z]) (?P<path>.*?)-->", re.DOTALL)
GIVEN = re.compile(r"<!-- given: [^>]+ -->")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
VERSIONS = re.compile(
    r"(?:Python|torch|Triton|CUDA|g\+\+|nvcc|transformers|pybind11|torchvision|librosa|SciPy|setuptools|driver|arXiv"
    r"|capability)\S* [\d.]+(?:(?:, | or | and | beside )[\d.]+)*"
)
OF_MANY = {"median": statistics.median, "min": min, "max": max}
UNITS = "ms|us|s|seconds|minutes|MB|GB|MiB|KiB|GiB|TB/s|TFLOP/s|times|percent"
FIGURE = re.compile(rf"(?<![\w.])(?:[\d,]*\d(?:\.\d+)?(?: (?:{UNITS})\b|%)|\d{{1,3}}\.\d\d(?![\d.]))")


class RowFormatter(string.Formatter):
    """str.format with {x!i} for 1 / x, and pairs as ranges."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """As documented; ``i`` inverts."""
        return 1 / value if conversion == "i" else super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        """A pair from its first to its second, or one figure where both are written alike."""
        if not isinstance(value, list):
            return format(value, format_spec)
        return "-".join(dict.fromkeys(format(end, format_spec) for end in value))


@functools.cache
def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def find(found: Any, path: str) -> Any:
    """The value at a path; raise ValueError where there is none or more than one."""
    parts = [part.strip() for part in " ".join(path.split()).split("/")]
    if isinstance(found, dict) and "measured" in found and not any(key.startswith(parts[0]) for key in found):
        found = found["measured"]
    return _follow(found, parts)


def _follow(found: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return found
    part, *rest = parts
    if isinstance(found, dict):
        keys = [key for key in found if key == part] or [key for key in found if key.startswith(part)]
        if len(keys) != 1:
            raise ValueError(f"{part}: expected one key that begins so, got {len(keys)}")
        return _follow(found[keys[0]], rest)
    if part == "*":
        return [_follow(row, rest) for row in found]
    if part.isdigit():
        return _follow(found[int(part)], rest)
    rows = [row for row in found if part in map(str, row.values())]
    if not rows:
        raise ValueError(f"{part}: expected a row with this value, got none")
    return _follow(rows if len(rows) > 1 else rows[0], rest)


def value_of(files: Mapping[str, str], file: str, path: str) -> float:
    """A figure's value."""
    if file not in files:
        raise ValueError(f"{file}: expected one of the document's files, got another name")
    inverse, of_many, factor = False, None, 1.0
    if path.startswith("1/"):
        inverse, path = True, path[2:]
    if (first := path.split(" ", 1)[0]) in OF_MANY:
        of_many, path = OF_MANY[first], path.split(" ", 1)[1]
    if scaled := re.fullmatch(r"(.*)\*([\de.-]+)", path, re.DOTALL):
        path, factor = scaled[1], float(scaled[2])
    value = find(_load(files[file]), path)
    if of_many is not None:
        value = of_many(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{path}: expected a number, got {value!r}")
    return factor * (1 / value if inverse else value)


def written(value: float, like: str) -> str:
    """A value with as many decimals, and thousands set apart, as another figure."""
    decimals = len(like.partition(".")[2])
    return f"{value:{',' if ',' in like else ''}.{decimals}f}"


def check(text: str) -> tuple[list[str], str]:
    """What is wrong with a document, a line each, and the document with the files' values."""
    files = dict(pair.split("=", 1) for block in FILES.findall(text) for pair in block.split())
    wrong = [f"{name}: expected a file of benchmarks/results, got none" for name in files.values()
             if not (RESULTS / name).is_file()]  # fmt: skip
    if wrong:
        return wrong, text

    def figure(match: re.Match[str]) -> str:
        try:
            value = value_of(files, match["file"], match["path"])
        except (ValueError, LookupError, TypeError) as error:
            wrong.append(f"{match['figure']}: {match['path']}: {error}")
            return match[0]
        now = written(value * (100 if match["percent"] else 1), match["figure"])
        if now != match["figure"]:
            wrong.append(f"expected {now}, got {match['figure']}: {match['path']}")
        return now + match[0][len(match["figure"]) :]

    text = MARKED.sub(figure, text)
    for match in reversed([*TABLE.finditer(text)]):
        start = match.end()
        stop = start + len("".join(_leading_rows(text[start:])))
        chosen = {name: _load(files[name]) for name in match[1].split()}
        template = " ".join(match[4].split())
        lines, faults = _table(chosen, (match[2], match[3]), template, text[start:stop].splitlines())
        wrong += faults
        text = text[:start] + "\n".join(lines) + "\n" + text[stop:]
    wrong += [f"in no result file: {line}" for line in unmarked(text)]
    return wrong, text


def _leading_rows(text: str) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        if not line.startswith("|"):
            return
        yield line


def _table(
    files: Mapping[str, Any], only: tuple[str | None, str], template: str, lines: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The lines of a table as the files have them, and what differs."""
    plain = [re.fullmatch(r"\{(\w+)\}", cell.strip()) for cell in template.split(" | ")]
    keys = [(place, match[1]) for place, match in enumerate(plain[:2]) if match]
    result, faults = list(lines[:2]), []
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        found: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            for row in _rows(content):
                fits = only[0] is None or str(row.get(only[0])) == only[1]
                if fits and keys and all(str(row.get(key)) == cells[place] for place, key in keys):
                    found.setdefault(name, row)
        now = None
        for row in found.values():
            try:
                now = f"| {RowFormatter().vformat(template, (), {**row, **found})} |"
                break
            except (KeyError, IndexError, TypeError, ValueError):
                continue
        if now is None:
            faults.append(f"in no result file: {line}")
        elif now != line:
            faults.append(f"expected {now}, got {line}")
        result.append(now or line)
    return result, faults


def _rows(found: Any) -> Iterator[dict[str, Any]]:
    """Every row of a file's tables; of the model's the strategies, by GPU."""
    if isinstance(found, dict) and "gpus" in found:
        for gpu, of_gpu in found["gpus"].items():
            for name, record in of_gpu["strategies"].items():
                yield {"gpu": gpu, "strategy": name, **record}
    elif isinstance(found, dict):
        for value in found.values():
            yield from _rows(value)
    elif isinstance(found, list):
        yield from (row for row in found if isinstance(row, dict))


def unmarked(text: str) -> Iterator[str]:
    """Figures that neither a mark nor a reason covers, with the beginning of their line."""
    for match in reversed([*TABLE.finditer(text)]):  # its rows were compared as they stand
        stop = match.end() + len("".join(_leading_rows(text[match.end() :])))
        text = text[: match.end()] + text[stop:]
    text = CODE.sub("", MARKED.sub("", text))
    for block in re.split(r"\n\s*\n", text):
        if GIVEN.search(block) or block.lstrip("\n").startswith("    "):  # the second is code
            continue
        plain = VERSIONS.sub("", COMMENT.sub("", block))
        for line in plain.splitlines():
            for found in FIGURE.finditer(line):
                yield f"{found[0]!r} in {line.strip()[:90]!r}"


def documents() -> list[Path]:
    """README and everything in docs and benchmarks that people read."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is wrong; with ``--write`` mend what the files know. Returns 1 where something is."""
    parser = argparse.ArgumentParser(prog="python -m tools.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the files' values into the documents")
    parser.add_argument("documents", type=Path, nargs="*", help="only these")
    options = parser.parse_args(arguments)
    count = 0
    for path in options.documents or documents():
        before = path.read_text(encoding="utf-8")
        wrong, after = check(before)
        if options.write and after != before:
            path.write_text(after, encoding="utf-8")
            wrong, _ = check(after)
        for line in wrong:
            print(f"{path.name}: {line}")
        count += len(wrong)
    print(f"{count} figures are wrong or in no result file")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
