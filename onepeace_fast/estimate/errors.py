"""The estimate beside what was measured: a line for each committed figure that it says something of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from onepeace_fast.config import TransformerConfig
from onepeace_fast.estimate import constants, scale, speed
from onepeace_fast.estimate.work import Batch, Work
from onepeace_fast.report.results import Results, Row

_OF_MEMORY = re.compile(r"(\d+) layers, width (\d+), batch (\d+)")
ALONE = scale.Sizes(0, 0, 0)
PASSES = ("forward", "forward_backward")


class Error(NamedTuple):
    """What, as it was measured and as it is estimated (a range, or one figure)."""

    what: str
    measured: float
    estimated: constants.Span
    unit: str

    @property
    def relative(self) -> float:
        """How far the estimate's middle is off."""
        return self.estimated.middle / self.measured - 1


def errors(files: Sequence[Results]) -> list[Error]:
    """Of all files: bytes kept and peaks, ratios of packed and padded time by FLOPs, and layers on named GPUs."""
    return [error for file in files for row in file.rows for error in _of_row(file, row)]


def of_scale(name: str, found: Mapping[str, Any]) -> list[Error]:
    """Of a file of ``benchmarks/scale.py``: bytes that a process sent and held."""
    errors: list[Error] = []
    for row in found["rows"]:
        for figure, value in scale.predicted(found, row["processes"])[row["what"]].items():
            what = f"{name}: {row['what']} of {row['processes']} processes, {figure.replace('_', ' ')}"
            errors.append(Error(what, row[figure] / 1e6, value.times(1e-6), "MB"))
    return errors


def _of_row(file: Results, row: Row) -> Iterator[Error]:
    place = f"{file.path.name}: {row.name}"
    if row.kind == "memory":
        title = next(title for title, rows in file.found["measured"].items() if row.values in rows)
        yield from _memory(place, title, row)
    elif row.kind == "table" and "fused over reference" in row.ratios and row.values.get("lengths"):
        yield from _ratio(place, row)
    elif row.kind == "layer" and row.mode == "forward_backward" and "sizes" in file.found:
        yield from _layer(place, file.found, row)


def _config(width: int, layers: int, hidden: int | None = None, heads: int | None = None) -> TransformerConfig:
    return TransformerConfig(
        embed_dim=width, ffn_embed_dim=hidden or 4 * width, layers=layers, attention_heads=heads or width // 64
    )


def _memory(place: str, title: str, row: Row) -> Iterator[Error]:
    """Of a table that names its sizes and its samples; the lengths are such as give its real and padded tokens."""
    if (found := _OF_MEMORY.search(title)) is None or not row.tokens or not row.padded:
        return
    layers, width, samples = map(int, found.groups())
    longest = row.padded // samples
    names = row.values["input"].split("+")
    # All real tokens in one modality's row: only their sum matters, and of the padded ones the length of a sample.
    others = {name: [1] * samples for name in names[1:]}
    for backend in ("reference", "fused"):
        batch = _Measured({names[0]: [longest] * samples, **others}, row.tokens, row.padded)
        work = Work(_config(width, layers), batch, backend == "fused", autocast=False)
        size = row.values[f"{backend}_bytes"]
        if row.mode == "saved":
            yield Error(f"{place}, {backend}", size / 2**20, _one(work.saved_bytes() / 2**20), "MiB")
            continue
        of_layer = 4 * width**2 + len(names) * 12 * width**2
        gradients = 4 * layers * of_layer
        least, most = work.transient_bytes()
        saved = work.saved_bytes()
        span = constants.Span(max(saved, gradients) + least, saved + gradients + most).times(2**-20)
        yield Error(f"{place}, {backend}", size / 2**20, span, "MiB")


@dataclasses.dataclass(frozen=True)
class _Measured(Batch):
    """A batch of which a file has the tokens and not the lengths."""

    real: int = 0
    with_padding: int = 0

    @property
    def rows(self) -> int:
        return self.real

    @property
    def padded(self) -> int:
        return self.with_padding

    @property
    def padded_length(self) -> int:
        return self.with_padding // self.samples

    @property
    def pairs(self) -> int:
        return self.real**2 // self.samples


def _one(value: float) -> constants.Span:
    return constants.Span(value, value)


def _ratio(place: str, row: Row) -> Iterator[Error]:
    """Time of the packed over the padded layout, as their FLOPs are; the model's other costs are not in it."""
    batch = Batch(row.values["lengths"])
    config = _config(row.values["width"], 1)
    flops = [Work(config, batch, packed, autocast=False) for packed in (True, False)]
    packed, padded = (one.forward().total if row.mode == "forward" else one.step().total for one in flops)
    yield Error(f"{place}, fused over reference", row.ratios["fused over reference"].median, _one(packed / padded), "")


def _layer(place: str, found: Mapping[str, Any], row: Row) -> Iterator[Error]:
    """A layer on a GPU that the constants name."""
    name = next((gpu for gpu in constants.gpus() if gpu in str(found["machine"].get("gpu", ""))), None)
    if name is None or not row.values.get("lengths"):
        return
    sizes = found["sizes"]
    config = _config(sizes["width"], 1, sizes["hidden"], sizes["heads"])
    ways = {"reference": "eager", "reference_compiled": "compiled"}
    ways |= {f"strategy_{way}": way for way in speed.STRATEGIES}
    for variant, way in ways.items():
        if variant in row.times:
            work = Work(config, Batch(row.values["lengths"]), way in speed.STRATEGIES)
            span = speed.layer(work, name, way).seconds.times(1e3)
            yield Error(f"{place}, {variant}", row.times[variant].median, span, "ms")
