"""The model's result at one shape: as a file of JSON holds it, and as tables for people."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.kernel_model import summary
from tools.kernel_model.compiled import PIECES, Compiled
from tools.kernel_model.constants import GPU, Span, constants
from tools.kernel_model.estimate import Estimate, estimate
from tools.kernel_model.launches import DTYPE, Shape
from tools.kernel_model.measured import Measured
from tools.kernel_model.strategies import Strategy, strategies, vendor_times

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"
TITLE = "A model of the compiled kernels, not a measurement"
_FILE = re.compile(r"model_(\d{4}-\d\d-\d\d)(?:\.(\d+))?\.json")
KERNEL_HEADINGS = ("launch", "us", "before", "of roofline", "HBM MB", "GFLOP", "tiles", "waves", "registers", "shared",
                   "programs", "buffers", "waits", "faults")  # fmt: skip
UNITS = ("tensor", "memory", "issue", "float", "integer", "mufu", "shared", "shuffles")
CODE_HEADINGS = ("launch", "part", "instructions", "clocks of a warp", "loads waited for")
NAMES = {"feed_forward": "FFN", "layer": "layer"}
STRATEGY_HEADINGS = ("strategy", "FFN us", "before", "over vendor", "layer us", "before", "layer tax")

Result = dict[str, Any]


def result(
    shape: Shape, kernels: Sequence[Compiled], gpus: Sequence[str], measured: Mapping[str, Measured] | None = None
) -> Result:
    """Estimates of every launch and strategy on these GPUs; what was measured on one stands in the place of its own."""
    found: Result = {
        "title": TITLE, "date": today(), "dtype": DTYPE, "shape": shape._asdict() | {"counts": list(shape.counts)},
        "versions": _versions(), "code": {}, "gpus": {},
    }  # fmt: skip
    for kernel in kernels:
        found["code"].setdefault(kernel.architecture, {})[kernel.name] = _code_record(kernel)
    for name in gpus:
        gpu, known = constants().gpus[name], (measured or {}).get(name)
        errors: dict[str, float] = {}
        if known is not None:
            gpu = _with_rates(gpu, known, shape, errors)
        mine = [kernel for kernel in kernels if kernel.architecture == gpu.architecture]
        records = {kernel.name: _time_record(estimate(kernel, gpu, shape)) for kernel in mine}
        if known is not None:
            _replace_launches(records, known, errors)
        times = {launch: Span(*record["us"]) for launch, record in records.items()}
        of_strategies = {one.name: _strategy_record(one) for one in strategies(times, gpu, shape)}
        if known is not None:
            _replace_strategies(of_strategies, known, errors)
        found["gpus"][name] = {
            "architecture": gpu.architecture, "kernels": records, "strategies": of_strategies, "errors": errors,
        }  # fmt: skip
    return found


def _with_rates(gpu: GPU, known: Measured, shape: Shape, errors: dict[str, float]) -> GPU:
    """The GPU with the rates that were measured on it."""
    if known.copy is not None:
        errors["rate of a copy"] = _error(gpu.copy, known.copy)
        gpu = gpu._replace(copy=known.copy)
    if known.vendor is not None:
        time = sum(vendor_times(gpu, shape).values())
        errors["the vendor's products of the FFN"] = _error(time, known.vendor)
        gpu = gpu._replace(vendor=gpu.vendor * time / known.vendor)
    return gpu


def _replace_launches(records: dict[str, dict[str, Any]], known: Measured, errors: dict[str, float]) -> None:
    """Where several launches were measured together each gets its share of the estimate's."""
    for names, time in known.launches.items():
        estimates = {name: Span(*records[name]["us"]).middle for name in names}
        total = sum(estimates.values())
        errors[" + ".join(names)] = _error(total, time)
        for name in names:
            records[name] |= {"us": [round(estimates[name] * time / total, 1)] * 2, "measured": True}


def _replace_strategies(records: dict[str, dict[str, Any]], known: Measured, errors: dict[str, float]) -> None:
    for field, over, times, base in (
        ("feed_forward", "ratio", known.feed_forward, known.vendor), ("layer", "tax", known.layer, known.layer_products)
    ):  # fmt: skip
        for name, time in times.items():
            record = records[name]
            errors[f"strategy {name}, {NAMES[field]}"] = _error(Span(*record[field]).middle, time)
            record[field] = [round(time, 1)] * 2
            record["measured"] = True
            if base is not None:
                record[over] = [round(time / base, 3)] * 2


def _error(estimated: float, measured: float) -> float:
    return round(estimated / measured - 1, 3)


def _strategy_record(one: Strategy) -> dict[str, Any]:
    return {name: [round(end, 3) for end in span] for name, span in one._asdict().items() if name != "name"}


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def _versions() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__}


def _time_record(found: Estimate) -> dict[str, Any]:
    return {
        "us": [round(found.time.low, 1), round(found.time.high, 1)], "of_roofline": round(found.share, 3),
        "HBM_bytes": found.traffic, "FLOP": found.flop, "tiles": found.tiles, "waves": round(found.waves, 2),
        "bounds_us": {unit: round(time, 1) for unit, time in found.bounds.items()},
    }  # fmt: skip


def _code_record(kernel: Compiled) -> dict[str, Any]:
    return {
        "registers": kernel.registers, "spilled": kernel.spilled, "shared": kernel.shared, "resident": kernel.resident,
        "warps": kernel.warps, "stages": kernel.stages, "buffers": list(kernel.buffers),
        "outstanding": kernel.outstanding, "faults": list(kernel.faults),
        "parts": [
            {
                piece: {
                    "counts": code.counts, "instructions": code.instructions, "loads_waited_for": code.exposed_loads,
                    "warp_clocks": [round(clocks) for clocks in code.clocks],
                }
                for piece in PIECES
                if (code := getattr(part, piece)).instructions
            }
            for part in kernel.parts
        ],
    }  # fmt: skip


def text_range(value: Sequence[float], digits: int = 0) -> str:
    """A range, or one figure where both ends are the same."""
    low, high = (f"{end:.{digits}f}" for end in value)
    return low if low == high else f"{low}-{high}"


def comparable(found: Result, before: Result | None) -> bool:
    """Whether there is an earlier result of the same shape and dtype."""
    return before is not None and all(found[name] == before[name] for name in ("shape", "dtype"))


def tables(found: Result, before: Result | None = None) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Each table with its heading, with the times of an earlier result where that is of the same shape."""
    old_gpus = before["gpus"] if before is not None and comparable(found, before) else {}
    for gpu, of_gpu in found["gpus"].items():
        old = old_gpus.get(gpu, {"kernels": {}, "strategies": {}})
        code = found["code"][of_gpu["architecture"]]
        rows = [
            _kernel_row(name, record, code[name], old["kernels"].get(name))
            for name, record in of_gpu["kernels"].items()
        ]
        yield f"{gpu}: launches", [KERNEL_HEADINGS, *rows]
        rows = [
            (name, *(text_range([record["bounds_us"].get(unit, 0)] * 2) for unit in UNITS))
            for name, record in of_gpu["kernels"].items()
        ]
        yield f"{gpu}: the least time of each unit", [("launch", *(f"{unit} us" for unit in UNITS)), *rows]
        rows = [
            _strategy_row(name, record, old["strategies"].get(name)) for name, record in of_gpu["strategies"].items()
        ]
        yield f"{gpu}: strategies", [STRATEGY_HEADINGS, *rows]
        if of_gpu["errors"]:
            rows = [(name, f"{error:+.1%}") for name, error in of_gpu["errors"].items()]
            yield f"{gpu}: the model's error, where it was measured", [("what", "estimate over time"), *rows]
    for architecture, code in found["code"].items():
        rows = [row for name, record in code.items() for row in _code_rows(name, record)]
        yield f"{architecture}: instructions of a warp", [CODE_HEADINGS, *rows]


def _kernel_row(
    name: str, record: Mapping[str, Any], code: Mapping[str, Any], was: Mapping[str, Any] | None
) -> tuple[str, ...]:  # fmt: skip
    waits = "-" if code["outstanding"] is None else str(code["outstanding"])
    buffers = "-" if not code["buffers"] else "/".join(map(str, code["buffers"]))
    return (
        _marked(name, record), text_range(record["us"]), _before(was, "us"), f"{record['of_roofline']:.0%}",
        f"{record['HBM_bytes'] / 1e6:.0f}", f"{record['FLOP'] / 1e9:.0f}", str(record["tiles"]),
        f"{record['waves']:.2f}", str(code["registers"]), str(code["shared"]), str(code["resident"]), buffers, waits,
        "; ".join(code["faults"]) or "none",
    )  # fmt: skip


def _before(was: Mapping[str, Any] | None, field: str) -> str:
    return "-" if was is None else text_range(was[field])


def _marked(name: str, record: Mapping[str, Any]) -> str:
    return f"{name} (measured)" if record.get("measured") else name


def _code_rows(name: str, record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for number, part in enumerate(record["parts"], start=1):
        for piece, code in part.items():
            counted = ", ".join(f"{count} {kind}" for kind, count in code["counts"].items())
            what, clocks = piece if number == 1 else f"{piece} {number}", text_range(code["warp_clocks"])
            yield name, what, f"{code['instructions']}: {counted}", clocks, str(code["loads_waited_for"])


def _strategy_row(name: str, record: Mapping[str, Any], was: Mapping[str, Any] | None) -> tuple[str, ...]:
    return (
        _marked(name, record), text_range(record["feed_forward"]), _before(was, "feed_forward"),
        text_range(record["ratio"], 2), text_range(record["layer"]), _before(was, "layer"),
        text_range(record["tax"], 2),
    )  # fmt: skip


def document(found: Result, before: Result | None = None) -> str:
    """All of it as Markdown."""
    from benchmarks.support.report import markdown

    shape = found["shape"]
    about = (
        f"{' + '.join(map(str, shape['counts']))} rows, width {shape['width']}, hidden {shape['hidden']}, "
        f"{found['dtype']}, Triton {found['versions']['triton']}. Times are ranges in us, from least to most. How to "
        "read it: [benchmarks](../README.md#the-model-of-the-kernels)."
    )
    blocks = [f"# {found['title']}, {found['date']}", about]
    for heading, rows in tables(found, before):
        blocks += [f"## {heading}", markdown(rows)]
    return "\n\n".join(blocks) + "\n"


def last_file(folder: Path = FOLDER) -> Path | None:
    """The newest file of the model in a folder; None where there is none."""
    named = [(match, path) for path in folder.glob("model_*.json") if (match := _FILE.fullmatch(path.name))]
    return max(named, key=lambda pair: (pair[0][1], int(pair[0][2] or 1)))[1] if named else None


def write(found: Result, folder: Path = FOLDER, before: Result | None = None) -> Path:
    """Write the result as JSON and as Markdown and return the path of the first; a day's second one has a number."""
    from benchmarks.support.report import write_json, write_text

    path, number = folder / f"model_{found['date']}.json", 1
    while path.exists():
        number += 1
        path = folder / f"model_{found['date']}.{number}.json"
    write_json(path, found)
    write_text(path.with_name(f"{path.stem}.md"), document(found, before))
    if folder == FOLDER:
        write_text(summary.FILE, summary.text(found, path.name))
    return path


def load(path: Path) -> Result:
    """A file of the model; raise ValueError in one line for any other."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("title") != TITLE:
        raise ValueError(f"{path}: expected a result of the model, got another file")
    return found
