"""What a run on a GPU measures, section by section: the most telling first, what compiles longest after it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks.support import attention_goals as goals
from benchmarks.support import decoder_attention, shapes
from benchmarks.support import relative_bias_attention as attention
from benchmarks.support.feed_forward import FeedForwardCase
from benchmarks.support.layer import DROP_PATH, MODEL_LAYERS, LayerCase, strategies
from benchmarks.support.pointwise import PointwiseCase, operations
from benchmarks.support.routed_rows import RoutedRows, ragged_shape
from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.step import StepCase
from benchmarks.support.variants import MODES, Factory, Runner
from onepeace_fast.timing import DeviceLost, HostClock, recovered

FULL = Sizes(width=1536, hidden=6144, heads=24)
TINY = Sizes(width=64, hidden=128, heads=2)
MODALITIES_BY_ROWS = 2
POINTWISE = ("layer_norm", "residual", "gated_sub_ln")  # what the model launches
COMPILED = {  # the compiled peers of each kind, and what is measured beside them
    "layer": ("products", "reference", "reference_compiled", "reference_max_autotune", "fused"),
    "ffn": (
        "products",
        "sliced",
        "sliced_compiled",
        "sliced_max_autotune",
        "boolean_mask_compiled",
        "grouped_mm_compiled",
        "fused",
    ),
    "attention": ("reference", "reference_compiled", "reference_max_autotune", "flex_attention", "fused"),
    "pointwise": ("eager", "compiled", "max_autotune", "fused"),
    "step": ("products", "reference", "reference_compiled", "reference_max_autotune", "fused"),
}
Records = dict[str, dict[str, Any]]


class Prepared(NamedTuple):
    """The variants of a section, the one that the others are compared with, and what is made of their records."""

    factories: Mapping[str, Factory]
    base: str
    finish: Callable[[Records], dict[str, Any]]


@dataclass
class Setting:
    """Where and how large everything runs.

    ``copy_rate`` is what a copy moves, in bytes per second, ``found`` the sections that are measured, by name.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    sets: int
    layers: int
    copy_rate: float | None = None
    found: Mapping[str, Any] = field(default_factory=dict)
    _last_case: tuple[Shape, LayerCase] | None = None

    @property
    def where(self) -> tuple[Sizes, torch.device, torch.dtype, int]:
        """The arguments of every case after its shape."""
        return self.sizes, self.device, self.dtype, self.sets

    def layer_case(self, shape: Shape) -> LayerCase:
        """A layer and a batch, which the section that follows gets too with the same shape."""
        if self._last_case is None or self._last_case[0] != shape:
            self._last_case = None  # to free its memory
            self._last_case = (shape, LayerCase(shape, *self.where))
        return self._last_case[1]


class Section(NamedTuple):
    """What is measured together, with a table of its own.

    ``names`` are the variants that are measured, None for all that are not compiled; ``warmed`` those whose kernels or
    graphs a process of its own may compile beforehand.
    """

    name: str
    kind: str
    prepare: Callable[[Setting], Prepared]
    names: tuple[str, ...] | None = None
    warmed: tuple[str, ...] = ()

    def measure(self, setting: Setting, runner: Runner) -> dict[str, Any]:
        """The section's record; an ``error`` where not even its inputs can be made."""
        torch.compiler.reset()  # every section compiles anew, and none runs into the limit of recompilations
        runner.clock.frequencies.clear()
        try:
            prepared = self.prepare(setting)
            records = runner.measure(self.chosen(prepared.factories), base=prepared.base)
            record = {"kind": self.kind, "variants": records, **prepared.finish(records)}
            return record | ({"clocks_mhz": found} if (found := frequencies(runner.clock)) else {})
        except DeviceLost:
            raise
        except Exception as error:
            return {"kind": self.kind, "variants": {}, "error": recovered(runner.clock, "", error)}

    def chosen(self, factories: Mapping[str, Factory]) -> dict[str, Factory]:
        """The variants that this section measures."""
        return {
            name: factory
            for name, factory in factories.items()
            if (name in self.names if self.names else not getattr(factory, "is_compiled", False))
        }


def frequencies(clock: HostClock) -> dict[str, float]:
    """How fast the clock of the device or processor ran in a section; nothing where it cannot be asked."""
    found = clock.frequencies
    if not found:
        return {}
    figures = (("least", min(found)), ("median", statistics.median(found)), ("most", max(found)))
    return {**{name: round(value) for name, value in figures}, "samples": len(found)}


def full_shapes() -> list[Shape]:
    """The batches that the goals are stated for."""
    return [
        Shape("vision-language 32", {"text": shapes.text(32), "image": shapes.image(32)}),
        Shape("image 64", {"image": shapes.image(64)}),
        Shape("audio 16", {"audio": shapes.audio(16)}),
        Shape("audio-language 16", {"text": shapes.text(16), "audio": shapes.audio(16)}),
    ]


def tiny_shapes() -> list[Shape]:
    """The same kinds of batches, small enough for a test."""
    text, image, audio = shapes.text(3, 2, 6), shapes.image(3, grid=4), shapes.audio(3, 5, 20)
    return [
        Shape("vision-language tiny", {"text": text, "image": image}),
        Shape("image tiny", {"image": image}),
        Shape("audio tiny", {"audio": audio}),
        Shape("audio-language tiny", {"text": text, "audio": audio}),
    ]


def headline(quick: bool, device: torch.device) -> list[Section]:
    """What a first minute must answer; nothing here waits for torch.compile."""
    (batch, *_), (image, *_) = _batches(quick), _attention_shapes(quick)
    own = tuple(f"strategy_{name}" for name in strategies(device))
    by_rows = [ragged_shape(MODALITIES_BY_ROWS, rows) for rows in ((16, 48) if quick else (256, 1024, 4096, 32768))]
    return [
        layer_section(batch, warmed=("fused", *own, f"fused_drop_path_{DROP_PATH}")),
        feed_forward_section(batch, warmed=("fused", *own)),
        *(feed_forward_section(shape, True, names=("products", "sliced", *own)) for shape in by_rows),
        attention_section(image),
        *(pointwise_section(name, batch, warmed=("fused",)) for name in POINTWISE),
    ]


def rest(quick: bool) -> list[Section]:
    """The compiled peers at the headline's shapes, every other shape, and the compiled peers there."""
    (batch, *batches), (image, *images) = _batches(quick), _attention_shapes(quick)
    compiled_there = [] if quick else [
        *(section(shape) for shape in batches for section in (layer_section, feed_forward_section)),
        *map(attention_section, images),
    ]  # fmt: skip
    return [
        compiled_section(layer_section(batch)), compiled_section(feed_forward_section(batch)),
        compiled_section(attention_section(image)),
        *(compiled_section(pointwise_section(name, batch)) for name in POINTWISE),
        _bias(batch),
        *(section(shape) for shape in batches for section in (layer_section, feed_forward_section, _bias)),
        *map(attention_section, images),
        *map(decoder_attention_section, _decoder_batches(quick)),
        *map(compiled_section, compiled_there),
    ]  # fmt: skip


def _batches(quick: bool) -> list[Shape]:
    return tiny_shapes() if quick else full_shapes()


def _attention_shapes(quick: bool) -> list[Shape]:
    return attention.tiny_shapes() if quick else attention.full_shapes()


def _decoder_batches(quick: bool) -> list[decoder_attention.Batch]:
    return decoder_attention.small_batches() if quick else decoder_attention.full_batches()


def compiled_section(section: Section) -> Section:
    """The compiled peers of a section, with what they are held against measured again beside them."""
    names = COMPILED[section.kind]
    warmed = tuple(name for name in names if name.endswith(("compiled", "max_autotune")) or name == "flex_attention")
    return section._replace(name=f"{section.name}, compiled peers", names=names, warmed=warmed)


def _described(shape: Shape) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "lengths": {name: list(lengths) for name, lengths in shape.lengths.items()},
        "rows": shape.real_tokens,
        "padded_tokens": shape.padded_tokens,
    }


def layer_section(shape: Shape, **how: Any) -> Section:
    def prepare(setting: Setting) -> Prepared:
        case = setting.layer_case(shape)
        operations = case.products().operations
        return Prepared(
            case.factories(),
            "reference",
            lambda records: {**_described(shape), **with_tax(records), "forward_operations": operations},
        )

    return Section(f"layer, {shape.name}", "layer", prepare, **how)


def feed_forward_section(shape: Shape, rows_alone: bool = False, **how: Any) -> Section:
    def prepare(setting: Setting) -> Prepared:
        case = RoutedRows(shape, *setting.where) if rows_alone else setting.layer_case(shape)
        factories = FeedForwardCase(case).factories()
        return Prepared(factories, "sliced", lambda records: {**_described(shape), **with_tax(records)})

    return Section(f"routed FFN, {shape.name}", "ffn", prepare, **how)


def _bias(shape: Shape) -> Section:
    def finish(records: Records) -> dict[str, Any]:
        for record in records.values():
            if "forward_backward" in record:
                record["per_layer_ms"] = record["forward_backward"]["median_ms"] / MODEL_LAYERS
        return _described(shape)

    def prepare(setting: Setting) -> Prepared:
        return Prepared(setting.layer_case(shape).bias_factories(), "reference", finish)

    return Section(f"bias, {shape.name}", "bias", prepare)


def attention_section(shape: Shape, **how: Any) -> Section:
    def prepare(setting: Setting) -> Prepared:
        operation = attention.AttentionCase(shape, *setting.where, setting.layers).operation()

        def finish(records: Records) -> dict[str, Any]:
            result = {**_described(shape), **operation.with_shares(records, setting.copy_rate)}
            result["ratios"] = goals.ratios(records, operation.bytes, setting.copy_rate)
            result["goals"] = goals.verdicts(result["ratios"], shape.name, records)
            whole = setting.found.get(f"attention, {shape.subset_of.name}") if shape.subset_of else None
            if whole and goals.PER_PAIR[-1] in records:
                result["time_per_pair"] = goals.times_per_pair(records, whole["variants"], shape)
            return result

        return Prepared(operation.factories, "reference", finish)

    return Section(f"attention, {shape.name}", "attention", prepare, **how)


def decoder_attention_section(batch: decoder_attention.Batch, **how: Any) -> Section:
    def prepare(setting: Setting) -> Prepared:
        case = decoder_attention.DecoderAttentionCase(batch, *setting.where)
        found = {**_described(batch[0]), **decoder_attention.described(batch)}
        return Prepared(case.factories(), "reference", lambda records: found)

    return Section(f"attention, {batch[0].name}", "attention", prepare, **how)


def pointwise_section(name: str, shape: Shape, **how: Any) -> Section:
    def prepare(setting: Setting) -> Prepared:
        operation = operations(PointwiseCase(shape, *setting.where, stream=torch.float32))[name]()

        def finish(records: Records) -> dict[str, Any]:
            return {**_described(shape), **operation.with_shares(records, setting.copy_rate)}

        return Prepared(operation.factories, "eager", finish)

    return Section(f"{name}, {shape.name}", "pointwise", prepare, **how)


def step_section(shape: Shape, **how: Any) -> Section:
    """A training step of a stack of the setting's layers."""

    def prepare(setting: Setting) -> Prepared:
        case = StepCase(shape, *setting.where)
        return Prepared(case.factories(), "reference", lambda records: {**_described(shape), **with_tax(records)})

    return Section(f"step, {shape.name}", "step", prepare, **how)


def with_tax(records: Records) -> dict[str, Records]:
    """Add to every variant its time over that of the bare products, for each mode."""
    base = records["products"]
    for record in records.values():
        modes = [mode for mode in MODES if mode in record and mode in base]
        record["tax"] = {mode: round(_time(record[mode]) / _time(base[mode]), 4) for mode in modes}
    return {"variants": records}


def _time(found: Mapping[str, float]) -> float:
    """The process's own time where it was taken, which other programs disturb less."""
    return found.get("cpu_median_ms", found["median_ms"])
