"""Files of results as rows: what was timed together, with what a picture needs to place it.

Three kinds are read: what ``pytest benchmarks --results`` and ``onepeace-fast bench`` write, what ``benchmarks/gpu.py``
writes (both form in benchmarks/README.md), and what ``python -m tools.kernel_model --write`` writes, which is a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MODEL_TITLE = "A model of the compiled kernels, not a measurement"
MODES = ("forward", "backward", "forward_backward")
SHOWN = {"forward": "forward", "backward": "backward", "forward_backward": "both passes"}
_BOTH = "forward_backward"
_TOKENS = ("packed_tokens", "real_tokens", "rows")
# Strings of a row that say how it was judged and not what was timed.
_VERDICTS = ("chosen", "verdict", "mode", "variant", "measure")


class Timed(NamedTuple):
    """A time in ms and how it varied: between quartiles where the file has them, else between least and most."""

    median: float
    low: float
    high: float
    has_quartiles: bool
    host: float | None = None


class Ratio(NamedTuple):
    """A ratio of times of the same rounds, with its 95% interval."""

    low: float
    median: float
    high: float


@dataclass
class Row:
    """What was timed together, in one mode; ``times``, ``tax``, ``peaks`` and ``failures`` are by variant."""

    section: str
    mode: str
    kind: str = "table"
    tokens: int | None = None
    padded: int | None = None
    modalities: int | None = None
    times: dict[str, Timed] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    tax: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Section and mode."""
        return f"{self.section}, {SHOWN.get(self.mode, self.mode)}" if self.mode else self.section


@dataclass
class Results:
    """A file of times."""

    path: Path
    found: Mapping[str, Any]
    rows: list[Row]

    @property
    def machine(self) -> str:
        """GPU or processor, threads on a CPU, versions."""
        machine = self.found["machine"]
        versions = machine.get("versions", {})
        named = [f"{name} {versions[name]}" for name in ("torch", "triton", "onepeace_fast") if name in versions]
        gpu = machine.get("gpu")
        where = str(gpu) if gpu else f"{machine.get('processor', 'a CPU')}, {machine.get('threads')} threads"
        return ", ".join([where, *named, f"Python {versions['python']}" if "python" in versions else ""]).rstrip(", ")

    @property
    def on_gpu(self) -> bool:
        """Whether the times are of a GPU."""
        return "gpu" in self.found["machine"]

    @property
    def title(self) -> str:
        """The file's name and date."""
        return f"{self.path.name}, {self.found.get('date', 'no date')}"


@dataclass
class Model:
    """A file of the model of the kernels: no measurement."""

    path: Path
    found: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The file's name and shape."""
        shape = self.found["shape"]
        return f"{self.path.name}: {' + '.join(map(str, shape['counts']))} rows, width {shape['width']}"


def read(path: Path) -> Results | Model:
    """One file; raises ValueError in one line for any other, OSError where it cannot be read."""
    refusal = f"{path}: expected results of benchmarks or of the model of the kernels, got "
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{refusal}no JSON ({error}); give a .json file of benchmarks/results") from None
    if isinstance(found, dict) and found.get("title") == MODEL_TITLE:
        return Model(path, found)
    if not isinstance(found, dict) or "machine" not in found or not {"sections", "measured"} & set(found):
        raise ValueError(f"{refusal}another file; give those that `make bench`, `make gpu` or `make kernels` wrote")
    try:
        rows = [*_of_sections(found.get("sections", {})), *_of_tables(found.get("measured", {}))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal}rows of another form: {error!r}; see benchmarks/README.md") from None
    return Results(path, found, rows)


def timed(record: Mapping[str, Any]) -> Timed:
    """A record of times: the process's own time where its quartiles are there, else by the clock."""
    prefix = "cpu_" if "cpu_lower_quartile_ms" in record else ""
    host = record.get("host_median_ms")
    if f"{prefix}lower_quartile_ms" in record:
        ends = (record[f"{prefix}lower_quartile_ms"], record[f"{prefix}upper_quartile_ms"])
        return Timed(record[f"{prefix}median_ms"], *ends, True, host)
    return Timed(record["median_ms"], record["min_ms"], record["max_ms"], False, host)


def _is_timed(value: Any) -> bool:
    return isinstance(value, dict) and "median_ms" in value and "min_ms" in value


def _of_sections(sections: Mapping[str, Any]) -> Iterator[Row]:
    for name, section in sections.items():
        lengths = section.get("lengths") or {}
        for mode in MODES:
            row = Row(
                name, mode, section["kind"], section.get("rows"), section.get("padded_tokens"),
                len(lengths) or None, values=section,
            )  # fmt: skip
            for variant, record in section.get("variants", {}).items():
                _add_variant(row, variant, record)
            if row.times or (mode == _BOTH and row.failures):
                yield row


def _add_variant(row: Row, variant: str, record: Mapping[str, Any]) -> None:
    mode = row.mode
    if _is_timed(record.get(mode)):
        row.times[variant] = timed(record[mode])
    if mode in (record.get("tax") or {}):
        row.tax[variant] = record["tax"][mode]
    if mode in (record.get("over_ours") or {}):
        row.ratios[f"{variant} over fused"] = Ratio(*record["over_ours"][mode])
    if mode in (record.get("peak_bytes") or {}):
        row.peaks[variant] = record["peak_bytes"][mode]
    for what in ("wrong", "error", "skipped"):
        if what in record:
            row.failures[variant] = f"{what}: {record[what]}" if what != "skipped" else record[what]


def _of_tables(tables: Mapping[str, Any]) -> Iterator[Row]:
    for title, measured in tables.items():
        heading = title.partition(":")[0].partition(",")[0]
        for values in measured:
            labels = [str(value) for name, value in values.items() if isinstance(value, str) and name not in _VERDICTS]
            section = ", ".join([heading, *labels])
            for name in ("samples", "real_tokens") if "builder" in values else ():
                section += f", {values[name]} {name.replace('_', ' ')}"
            mode = {"both passes": _BOTH}.get(values.get("mode", ""), values.get("mode", values.get("measure", "")))
            row = Row(section, mode, _kind(values), *_placed(values), values=values)
            if "variant" in values:
                yield from _by_mode(row, values)
                continue
            row.times = {name: timed(value) for name, value in values.items() if _is_timed(value)}
            row.ratios = {
                name.replace("_over_", " over "): Ratio(*value)
                for name, value in values.items()
                if "_over_" in name and isinstance(value, list) and len(value) == 3
            }
            by_variant = {
                name.removesuffix("_bytes"): value for name, value in values.items() if name.endswith("_bytes")
            }
            row.peaks = by_variant.pop("peak", {}) | by_variant
            yield row


def _kind(values: Mapping[str, Any]) -> str:
    return "memory" if "measure" in values else "plan" if "builder" in values else "table"


def _placed(values: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    tokens = next((values[name] for name in _TOKENS if isinstance(values.get(name), int)), None)
    return tokens, values.get("padded_tokens"), len(values["lengths"]) if values.get("lengths") else None


def _by_mode(row: Row, values: Mapping[str, Any]) -> Iterator[Row]:
    """A table whose rows are variants: each mode by itself."""
    for mode in MODES:
        if _is_timed(values.get(mode)):
            yield Row(row.section, mode, "table", row.tokens, row.padded, row.modalities,
                      times={values["variant"]: timed(values[mode])}, values=values)  # fmt: skip
