"""Calls of every operation, in each form that is worth telling apart.

selftest compares them with the reference, tune times the first of each entry of the table of launch parameters,
`make kernels` compiles what they launch, and the tests count the bytes that they move.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.kernels.launch_heuristic import WIDEST
from onepeace_fast.ops import (
    gated_sub_ln,
    layer_norm,
    relative_bias_attention,
    residual,
    residual_layer_norm,
    residual_rms_norm,
    rms_norm,
    routed_ffn,
    routed_linear,
)
from onepeace_fast.ops.layer_norm import layer_norm_and_stream
from onepeace_fast.ops.linear_residual import linear_residual
from onepeace_fast.relative_position import CLS_ENTRIES

MODALITIES = 3
INERT_ROWS = 3
HEADS = 4
HEAD_DIM = 64
HIDDEN_FACTOR = 4  # hidden columns of a feed-forward network for each of its width
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """``call(**leaves)`` is the operation; every leaf takes a gradient.

    ``entries`` are the launch parameters of its forward and its backward kernel in the table; ``slices`` those parts of
    outputs and leaves that are looked at one by one; ``plain`` is the same in plain PyTorch, for a benchmark.
    """

    operation: str
    variant: str
    call: Callable[..., Any]
    leaves: Mapping[str, Tensor]
    entries: tuple[str, ...] = ()
    slices: Mapping[str, Sequence[object]] = field(default_factory=dict)
    plain: Callable[..., Any] | None = None

    def outputs(self) -> list[Tensor]:
        """What the operation gives; from now on every leaf requires a gradient."""
        result = self.call(**{name: leaf.requires_grad_() for name, leaf in self.leaves.items()})
        return [result] if isinstance(result, Tensor) else list(result)

    def gradients(self, outputs: Sequence[Tensor], incoming: Sequence[Tensor], **how: bool) -> tuple[Tensor, ...]:
        """The gradient of each leaf for those of the outputs; ``how`` is autograd's."""
        return torch.autograd.grad(outputs, list(self.leaves.values()), incoming, **how)


def random_tensors(device: torch.device, seed: int = 0) -> Make:
    """Standard normal tensors, the same each time: ``make(*shape, dtype=..., scale=1, shift=0)``."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        value = torch.empty(shape, dtype=torch.float32, device=device).normal_(shift, scale, generator=generator)
        return value.to(dtype)

    return make


def empty_tensors(device: torch.device) -> Make:
    """Tensors whose values nobody reads."""

    def make(*shape: int, dtype: torch.dtype, **_: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return make


def pairs(
    cases: Callable[[Make, torch.device], Iterator[Case]], device: torch.device, seed: int = 0
) -> Iterator[tuple[Case, Case]]:
    """The same cases on the CPU and on a device, their random tensors made on the CPU."""
    cpu = torch.device("cpu")
    make, same = random_tensors(cpu, seed), random_tensors(cpu, seed)

    def copied(*shape: int, **how: Any) -> Tensor:
        return same(*shape, **how).to(device)

    return zip(cases(make, cpu), cases(copied, device), strict=True)


class Rows:
    """A packed batch: three modalities of which the second is empty, five samples, and inert rows at the end."""

    def __init__(self, rows: int, device: torch.device) -> None:
        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.rows, self.device = rows, device
        first, real = max(rows - INERT_ROWS, 0) // 3, max(rows - INERT_ROWS, 0)
        bounds = [0, first, first, real]
        self.counts = [stop - start for start, stop in pairwise(bounds)]
        self.modalities = [slice(start, stop) for start, stop in pairwise(bounds)]
        self.offsets = integers(bounds)
        # Four rows of five, the last of them first; of the modalities' rows among them the last is inert.
        self.some = integers([row for row in reversed(range(rows)) if row % 5])
        real_of_some = max(len(self.some) - 1, 0)
        self.some_offsets = integers([0, real_of_some // 3, real_of_some // 3, real_of_some])
        self.of_some = {"row_index": self.some, "offsets": self.some_offsets}
        self.seed = torch.full((), 7, dtype=torch.int64, device=device)  # dropout's
        drop_path = torch.tensor([1.25, 0.0, 1.25, 1.25, 1.25], dtype=torch.float32, device=device)
        sample = torch.arange(rows, dtype=torch.int32, device=device) % 5
        self.scaling = {"drop_path": drop_path, "sample": sample}


def kernel_cases(rows: int, width: int, dtype: torch.dtype, make: Make, device: torch.device) -> Iterator[Case]:
    """The operations that have kernels for packed rows of one width."""
    batch = Rows(rows, device)
    for operation, most in WIDEST.items():
        if width <= most:
            yield from OVER_ROWS[operation](batch, width, dtype, make)


def specified_cases(rows: int, dtype: torch.dtype, make: Make, device: torch.device) -> Iterator[Case]:
    """The operations that are not one Triton kernel; attention's reference takes time with ``rows`` squared."""
    batch = Rows(rows, device)
    # The one that takes every dtype on a GPU; a CPU has the reference alone.
    strategy = "per_modality" if device.type == "cuda" else None
    yield _routed_ffn(
        batch, 64, dtype, make, "Sub-LN, gamma, drop_path, residual", strategy=strategy, row_counts=batch.counts
    )
    yield from _relative_bias_attention(batch, dtype, make)
    yield _routed_linear(batch, 64, dtype, make, "per modality: bias", row_counts=batch.counts)


def _vectors(name: str, width: int, dtype: torch.dtype, make: Make, shift: float = 1.0) -> dict[str, Tensor]:
    return {f"{name}{m}": make(width, dtype=dtype, scale=0.5, shift=shift) for m in range(MODALITIES)}


def _listing(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """A call that hands its leaves on by their names; those that end in a number make a list."""

    def call(**leaves: Tensor) -> Any:
        given = dict(how)
        for name, leaf in leaves.items():
            if (listed := _unnumbered(name)) == name:
                given[name] = leaf
            else:
                given.setdefault(listed, []).append(leaf)
        return function(**given)

    return call


@cache  # some who call an operation take its time
def _unnumbered(name: str) -> str:
    return re.sub(r"_?\d$", "", name)


def _norm_parameters(width: int, dtype: torch.dtype, make: Make, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}weight": make(width, dtype=dtype, scale=0.5, shift=1.0), f"{prefix}bias": make(width, dtype=dtype),
    }  # fmt: skip


def _normalised(batch: Rows, width: int, dtype: torch.dtype, make: Make) -> dict[str, Tensor]:
    return {"x": make(batch.rows, width, dtype=dtype, scale=3.0, shift=1.0)}


def _layer_norm(batch: Rows, width: int, dtype: torch.dtype, make: Make) -> Iterator[Case]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), 1e-5)

    x, entries = _normalised(batch, width, dtype, make), ("layer_norm", "layer_norm_backward")
    shared = _norm_parameters(width, torch.float32, make)
    yield Case("layer_norm", "weight, bias", layer_norm, {**x, **shared}, entries, plain=plain)
    yield Case("layer_norm", "no parameters", layer_norm, x, entries)
    leaves = {**x, **_vectors("weight", width, dtype, make), **_vectors("bias", width, dtype, make, 0.0)}
    yield from _of_modalities(layer_norm, batch, leaves, entries)
    yield Case("layer_norm", "its stream", layer_norm_and_stream, {**x, **shared}, entries)
    of_some: dict[str, Any] = batch.of_some
    beside = partial(layer_norm_and_stream, **of_some)
    yield Case("layer_norm", "row index, its stream", beside, {**x, **shared}, entries)
    if width % HEADS == 0:
        entries = ("layer_norm_head_scale", "layer_norm_backward_head_scale")
        scale = {"head_scale": make(HEADS, dtype=torch.float32, scale=0.5, shift=1.0)}
        yield Case("layer_norm", "head scale", layer_norm, {**x, **shared, **scale}, entries)


def _of_modalities(
    norm: Callable[..., Tensor], batch: Rows, leaves: Mapping[str, Tensor], entries: tuple[str, ...]
) -> Iterator[Case]:
    """A norm with parameters for each modality, of all rows and of some."""
    slices, of_some = {"out0": batch.modalities, "x": batch.modalities}, batch.of_some
    yield Case(norm.__name__, "per modality", _listing(norm, offsets=batch.offsets), leaves, entries, slices)
    yield Case(norm.__name__, "row index", _listing(norm, **of_some), leaves, entries)


def _rms_norm(batch: Rows, width: int, dtype: torch.dtype, make: Make) -> Iterator[Case]:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[1:], weight.to(x.dtype), 1e-5)

    x, entries = _normalised(batch, width, dtype, make), ("rms_norm", "rms_norm_backward")
    weight = {"weight": make(width, dtype=torch.float32, scale=0.5, shift=1.0)}
    yield Case("rms_norm", "weight", rms_norm, {**x, **weight}, entries, plain=plain)
    yield Case("rms_norm", "no weight", rms_norm, x, entries)
    yield from _of_modalities(rms_norm, batch, {**x, **_vectors("weight", width, dtype, make)}, entries)


def _residual(batch: Rows, width: int, dtype: torch.dtype, make: Make) -> Iterator[Case]:
    streams = {torch.float32, dtype}
    scaling, dropout = batch.scaling, {"dropout": 0.1, "seed": batch.seed}
    for stream in sorted(streams, key=str):
        x, y = {"x": make(batch.rows, width, dtype=stream, scale=2.0)}, {"y": make(batch.rows, width, dtype=dtype)}
        gamma = {"gamma": make(width, dtype=torch.float32, scale=0.5)}
        norm = _norm_parameters(width, torch.float32, make, "norm_")
        of_stream = "" if len(streams) == 1 else f", {str(stream).removeprefix('torch.')} stream"
        rows, some = {**x, **y, **gamma}, {**x, "y": make(len(batch.some), width, dtype=dtype), **gamma}
        of_some = {**scaling, **dropout, **batch.of_some}

        def case(form: str, function: Callable[..., Any], leaves: Mapping[str, Tensor], **how: Any) -> Case:
            name = function.__name__
            call = partial(function, **how)
            return Case(name, f"{form}{of_stream}", call, leaves, (name, f"{name}_backward"))  # noqa: B023

        yield case("gamma, drop_path", residual, rows, **scaling)
        yield case("plain", residual, {**x, **y})
        yield case("gamma, drop_path, dropout", residual, rows, **scaling, **dropout)
        yield case("row index, dropout", residual, some, **of_some)
        yield case("gamma, drop_path", residual_layer_norm, {**rows, **norm}, **scaling)
        yield case("row index, dropout", residual_layer_norm, {**some, **norm}, **of_some)
        weight = {"norm_weight": norm["norm_weight"]}
        yield case("gamma, drop_path", residual_rms_norm, {**rows, **weight}, **scaling)


def _gated_sub_ln(batch: Rows, width: int, dtype: torch.dtype, make: Make) -> Iterator[Case]:
    gate = {"u": make(batch.rows, width, dtype=dtype)}
    gated = {**gate, "v": make(batch.rows, width, dtype=dtype)}
    norm = _vectors("norm_weight", width, torch.float32, make) | _vectors("norm_bias", width, torch.float32, make, 0.0)
    forms: dict[str, Mapping[str, Tensor]] = {
        "gelu, gate, norm": {**gated, **norm},
        "silu, gate": gated,
        "gelu_tanh, norm": {**gate, **norm},
        "relu, gate, norm": {**gated, **norm},
    }
    for form, leaves in forms.items():
        call = _listing(gated_sub_ln, offsets=batch.offsets, activation=form.partition(",")[0])
        slices = {"out0": batch.modalities} if "norm" in form else {}
        yield Case("gated_sub_ln", form, call, leaves, ("gated_sub_ln", "gated_sub_ln_backward"), slices)


OVER_ROWS = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "residual": _residual, "gated_sub_ln": _gated_sub_ln}


def product_cases(rows: int, width: int, dtype: torch.dtype, make: Make, device: torch.device) -> Iterator[Case]:
    """The operations of matrix products, this library's or the vendor's, in half precision or in the interpreter."""
    batch = Rows(rows, device)
    grouped: dict[str, Any] = {"strategy": "grouped"}
    yield _routed_ffn(batch, width, dtype, make, "grouped: Sub-LN, gamma, drop_path, residual", **grouped)
    yield _routed_ffn(batch, width, dtype, make, "grouped: silu, row index, recompute", True, True, **grouped,
                      activation="silu", recompute=True)  # fmt: skip
    yield _routed_ffn(batch, width, dtype, make, "grouped: gelu_tanh alone", False, **grouped, activation="gelu_tanh")
    yield _routed_ffn(batch, width, dtype, make, "grouped: relu, Sub-LN", **grouped, activation="relu")
    hybrid: dict[str, Any] = {"strategy": "hybrid", "row_counts": batch.counts}
    yield _routed_ffn(batch, width, dtype, make, "hybrid: with everything", **hybrid)
    yield _routed_ffn(batch, width, dtype, make, "hybrid: silu and nothing else", False, **hybrid, activation="silu")
    by_vendor: dict[str, Any] = {"strategy": "per_modality", "row_counts": batch.counts}
    yield _routed_ffn(batch, width, dtype, make, "per modality: Sub-LN, gamma, drop_path, residual", **by_vendor)
    yield from _linear_residual(batch, width, dtype, make)
    yield _routed_linear(batch, width, dtype, make, "grouped: bias")
    yield _routed_linear(batch, width, dtype, make, "grouped: no bias", bias=False)


def _linear_residual(batch: Rows, width: int, dtype: torch.dtype, make: Make) -> Iterator[Case]:
    linear = {"weight": make(width, width, dtype=dtype, scale=width**-0.5), "bias": make(width, dtype=dtype)}
    linear |= {"gamma": make(width, dtype=torch.float32, scale=0.5)}
    norm = _norm_parameters(width, torch.float32, make, "norm_")
    for stream in (torch.float32, dtype):
        x, z = (make(batch.rows, width, dtype=kind) for kind in (stream, dtype))
        form = f"{str(stream).removeprefix('torch.')} stream"
        yield Case("linear_residual", f"LayerNorm, {form}", linear_residual, {"x": x, "z": z, **linear, **norm})
        scaled = partial(_joined, **batch.scaling)
        yield Case("linear_residual", f"drop_path, {form}", scaled, {"x": x, "z": z, **linear})
    some = make(len(batch.some), width, dtype=dtype)
    of_some: dict[str, Any] = {**batch.scaling, **batch.of_some}
    call = partial(linear_residual, **of_some)
    yield Case("linear_residual", "LayerNorm, row index, drop_path", call, {"x": x, "z": some, **linear, **norm})


def _joined(**given: Any) -> Tensor:
    return linear_residual(**given)[0]


def timed_routed_ffn(
    rows: int, width: int, dtype: torch.dtype, make: Make, device: torch.device, strategy: str
) -> Case:  # fmt: skip
    """The routed FFN with everything, by one strategy, with the row counts on the host."""
    batch = Rows(rows, device)
    return _routed_ffn(batch, width, dtype, make, strategy, strategy=strategy, row_counts=batch.counts)


def _routed_ffn(
    batch: Rows, width: int, dtype: torch.dtype, make: Make, variant: str, full: bool = True, of_some: bool = False,
    **settings: Any,
) -> Case:  # fmt: skip
    """With everything, or without gate, norm, biases, LayerScale and residual; on all rows, or some of the stream's."""
    hidden = HIDDEN_FACTOR * width
    of_rows = batch.of_some if of_some else {"offsets": batch.offsets}
    how: dict[str, Any] = {**of_rows, **(batch.scaling if full else {"w1": None})}
    leaves = {"z": make(len(batch.some) if of_some else batch.rows, width, dtype=dtype)}
    shapes = {"w0": (hidden, width), "w1": (hidden, width), "w2": (width, hidden)}
    for name in shapes if full else ("w0", "w2"):
        scale = shapes[name][1] ** -0.5
        leaves |= {f"{name}_{m}": make(*shapes[name], dtype=dtype, scale=scale) for m in range(MODALITIES)}
    if full:
        leaves |= {"residual": make(batch.rows, width, dtype=torch.float32)}
        leaves |= _vectors("b2_", width, dtype, make, 0.0) | _vectors("norm_weight", hidden, torch.float32, make)
        leaves |= _vectors("norm_bias", hidden, torch.float32, make, 0.0)
        leaves["gamma"] = make(width, dtype=torch.float32, scale=0.5)

    def chosen(z: Tensor, **given: Any) -> Tensor:
        return routed_ffn(z, **given if z.dtype == dtype else {**given, "strategy": None})

    call = _listing(chosen, **how, **settings)
    return Case("routed_ffn", variant, call, leaves, slices={} if of_some else {"out0": batch.modalities})


def _routed_linear(
    batch: Rows, width: int, dtype: torch.dtype, make: Make, variant: str, bias: bool = True, **how: Any
) -> Case:
    columns = 2 * width
    leaves = {"x": make(batch.rows, width, dtype=dtype)}
    leaves |= {f"weight{m}": make(columns, width, dtype=dtype, scale=width**-0.5) for m in range(MODALITIES)}
    leaves |= _vectors("bias", columns, dtype, make, 0.0) if bias else {}
    call = _listing(routed_linear, offsets=batch.offsets, **how)
    return Case("routed_linear", variant, call, leaves, slices={"out0": batch.modalities, "x": batch.modalities})


def _relative_bias_attention(batch: Rows, dtype: torch.dtype, make: Make) -> Iterator[Case]:
    lengths, heads = batch.counts, 2
    cu_seqlens = torch.stack([batch.offsets[:-1], batch.offsets[1:]], 1)  # one sample
    modality = torch.full((batch.rows,), MODALITIES, dtype=torch.int32, device="cpu")
    code, is_cls = (torch.zeros(batch.rows, dtype=kind, device="cpu") for kind in (torch.int32, torch.bool))
    for m, rows in enumerate(batch.modalities):
        modality[rows] = m
        code[rows] = torch.arange(lengths[m], dtype=torch.int32, device="cpu")
        is_cls[rows.stop - 1] |= lengths[m] > 0
    leaves = {"qkv": make(batch.rows, 3, heads, HEAD_DIM, dtype=dtype)}
    for m, length in enumerate(lengths):
        leaves[f"bias{m}"] = make(heads, 2 * max(length, 1) - 1 + CLS_ENTRIES, dtype=torch.float32)
    leaves["head_scale"] = make(heads, dtype=torch.float32, scale=0.5, shift=1.0)

    call = _listing(
        relative_bias_attention, cu_seqlens=cu_seqlens, modality=modality.to(batch.device), code=code.to(batch.device),
        is_cls=is_cls.to(batch.device), code_offsets=[max(n, 1) - 1 for n in lengths], max_length=sum(lengths),
    )  # fmt: skip
    slices: dict[str, Sequence[object]] = {"out0": [(rows, head) for rows in batch.modalities for head in range(heads)]}
    entries = (slice(None, -CLS_ENTRIES), slice(-CLS_ENTRIES, None))
    slices |= {f"bias{m}": [(h, part) for h in range(heads) for part in entries] for m in range(MODALITIES)}
    yield Case("relative_bias_attention", "bias, head scale", call, leaves, slices=slices)
