"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onepeace_fast.tables import table


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """The same as a Markdown table."""
    heading, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))


def number(value: float | None, digits: int = 2) -> str:
    """A number of a table, a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


class Report:
    """Collects the rows of several tables, each row a dictionary of what was measured and how to print it."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.sections: dict[str, dict[str, Any]] = {}  # of peers, as in a result file
        self.footers: dict[str, str] = {}

    def add(self, title: str, shown: dict[str, str], measured: dict[str, Any], footer: str = "") -> None:
        """Add a row: ``shown`` by heading for the table, ``measured`` for the JSON."""
        self.rows.setdefault(title, []).append({"shown": shown, "measured": measured})
        self.footers[title] = footer

    def text(self) -> str:
        """All tables."""
        tables = []
        for title, rows in self.rows.items():
            body = table([list(rows[0]["shown"]), *(list(row["shown"].values()) for row in rows)])
            tables.append("\n".join(filter(None, (title, body, self.footers[title]))))
        return "\n\n".join(tables)

    def measured(self) -> dict[str, list[dict[str, Any]]]:
        """Everything that was measured, by title."""
        return {title: [row["measured"] for row in rows] for title, rows in self.rows.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a results file in one step."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: if this process ends, the old or the new file is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
