"""The tables of a run on a GPU, for people: each section's alone, and all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.support import attention_goals as goals
from benchmarks.support.pointwise import GOAL
from benchmarks.support.report import markdown, number
from benchmarks.support.variants import MODES, PASSES
from onepeace_fast.tables import table

Rows = list[Sequence[str]]


def section_tables(name: str, section: Mapping[str, Any]) -> list[Rows]:
    """The tables of one section."""
    title = f"{name}; {section['rows']} rows" if "rows" in section else name
    if section["kind"] == "ceilings":
        return [_ceiling_rows(section["variants"])]
    if section["kind"] in ("attention", "pointwise"):
        tables = [_share_rows(title, section["variants"])]
        if section["kind"] == "attention":
            tables += [goals.goal_rows(section), goals.pair_rows(section)]
        return [rows for rows in tables if len(rows) > 1]
    return [_tax_rows(title, section["variants"])]


def section_text(name: str, section: Mapping[str, Any]) -> str:
    """One section's tables for a terminal, with its errors and what it left out."""
    tables = [table(rows) for rows in section_tables(name, section)]
    return "\n".join([*tables, *(f"ERROR {line}" for line in errors(name, section))])


def document(result: Mapping[str, Any]) -> str:
    """The whole run as Markdown."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    blocks = [f"# {machine.get('gpu', machine['processor'])}, {result['date']}", f"{versions}; {result['dtype']}."]
    for name, section in result["sections"].items():
        blocks.append(f"## {name}")
        blocks += [markdown(rows) for rows in section_tables(name, section)]
    blocks.append(f"Pointwise operations: the goal is {GOAL:.0%} of a copy's bandwidth.")
    if result["errors"]:
        blocks.append("## Errors\n\n" + "\n".join(f"- {line}" for line in result["errors"]))
    if left := reasons(result["skipped"]):
        blocks.append("## Left out\n\n" + "\n".join(f"- {line}" for line in left))
    if result["unmeasured"]:
        blocks.append("## Sections not reached\n\n" + "\n".join(f"- {name}" for name in result["unmeasured"]))
    return "\n\n".join(blocks) + "\n"


def reasons(skipped: Sequence[str]) -> list[str]:
    """How many variants were left out for each reason."""
    counted = Counter(line.split(": ", 1)[1] for line in skipped)
    return [f"{count} variants {reason}" for reason, count in counted.items()]


def errors(name: str, section: Mapping[str, Any]) -> list[str]:
    """A line for every error of a section."""
    own = [f"{name}: {section['error']}"] if "error" in section else []
    states = ((v, state, record) for v, record in section["variants"].items() for state in ("error", "wrong"))
    return own + [
        f"{name}, {v}: {'wrong: ' * (state == 'wrong')}{record[state]}"
        for v, state, record in states
        if state in record
    ]


def _state(record: Mapping[str, Any]) -> str:
    states = {"wrong": "wrong", "error": "error", "skipped": "left out"}
    return next((shown for state, shown in states.items() if state in record), "-")


def _ceiling_rows(ceilings: Mapping[str, Any]) -> Rows:
    copy, product = ceilings["copy"], ceilings["product"]
    what = f"product of {product['side']}^3, {product['dtype']}"
    return [
        ("ceilings, measured", "rate"),
        ("copy", f"{number(copy.get('GB_per_second'), 0)} GB/s"),
        (what, f"{number(product.get('TFLOP_per_second'), 1)} TFLOP/s"),
    ]


def _tax_rows(title: str, variants: Mapping[str, Any]) -> Rows:
    rows: Rows = [(title, "forward ms", "fwd+bwd ms", "tax forward", "tax fwd+bwd", "runs")]
    for name, record in variants.items():
        times = [number(record[mode]["median_ms"], 3) if mode in record else _state(record) for mode in MODES]
        taxes = [number(record.get("tax", {}).get(mode), 3) for mode in MODES]
        runs = str(record["forward_backward"]["runs"]) if "forward_backward" in record else "-"
        rows.append((name, *times, *taxes, runs))
    return rows


def _share_rows(title: str, variants: Mapping[str, Any]) -> Rows:
    heads = ("forward ms", "of copy", "backward ms", "of copy", "fwd+bwd ms", "of copy", "error over allowed")
    rows: Rows = [(title, *heads)]
    for name, record in variants.items():
        cells = []
        for mode in PASSES:
            timed = record.get(mode, {})
            time = number(timed["median_ms"], 4) if timed else _state(record)
            cells += [time, number(timed.get("share_of_copy"), 2)]
        rows.append((name, *cells, number(max(record.get("checked", {}).values(), default=None), 2)))
    return rows
