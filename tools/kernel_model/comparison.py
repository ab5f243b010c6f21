"""What became worse since the last committed result of the model, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tools.kernel_model.constants import Span, constants
from tools.kernel_model.table import NAMES, Result, comparable, text_range


def regressions(found: Result, before: Result) -> list[str]:
    """A line for each launch and strategy that is worse than it was; nothing where the shape is another one."""
    return [line for line, worse in _differences(found, before) if worse]


def gains(found: Result, before: Result) -> list[str]:
    """A line for each launch and strategy that became faster."""
    return [line for line, worse in _differences(found, before) if not worse]


def _differences(found: Result, before: Result) -> Iterator[tuple[str, bool]]:
    if not comparable(found, before):
        return
    for architecture, code in found["code"].items():
        for name, record in code.items():
            if was := before["code"].get(architecture, {}).get(name):
                yield from ((f"{architecture}, {name}: {line}", True) for line in _of_code(record, was))
    for gpu, of_gpu in found["gpus"].items():
        old = before["gpus"].get(gpu, {"kernels": {}, "strategies": {}})
        for name, record in of_gpu["kernels"].items():
            if was := old["kernels"].get(name):
                yield from _of_time(f"{gpu}, {name}", record["us"], was["us"])
        for name, record in of_gpu["strategies"].items():
            if was := old["strategies"].get(name):
                for field, what in NAMES.items():
                    yield from _of_time(f"{gpu}, strategy {name}, {what}", record[field], was[field])


def _of_code(record: Mapping[str, Any], was: Mapping[str, Any]) -> Iterator[str]:
    if record["registers"] > was["registers"]:
        yield f"{record['registers']} registers, more than {was['registers']}"
    if record["resident"] < was["resident"]:
        yield f"{record['resident']} programs a multiprocessor, fewer than {was['resident']}"
    if record["spilled"] > was["spilled"]:
        yield f"{record['spilled']} bytes spilled, more than {was['spilled']}"


def _of_time(what: str, now: list[float], was: list[float]) -> Iterator[tuple[str, bool]]:
    change = Span(*now).middle / Span(*was).middle - 1
    if abs(change) > constants().regression:
        way = "up" if change > 0 else "down"
        yield f"{what}: {text_range(now)} us, {way} {abs(change):.0%} from {text_range(was)}", change > 0
