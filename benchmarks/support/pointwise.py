"""The operations between the matrix products, each alone over the packed rows of a batch, in every way users write it.

They are bound by bandwidth, so a time is read as bytes that must move over bytes that a device copy moves in it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import MAX_AUTOTUNE, Factory, LeftOut, Variant, compiled, trained
from onepeace_fast.hardware.cases import OVER_ROWS, Rows, empty_tensors
from onepeace_fast.ops import gated_sub_ln, residual_layer_norm

EPS = 1e-5
GOAL = 0.85  # of the bandwidth of a copy
Function = Callable[..., Any]


class PointwiseCase:
    """Inputs of one operation: several sets of row tensors, gradients of its outputs, and parameters."""

    def __init__(
        self, shape: Shape, sizes: Sizes, device: torch.device, dtype: torch.dtype, sets: int, stream: torch.dtype
    ) -> None:
        self.rows, self.counts, self.sizes = shape.real_tokens, [sum(row) for row in shape.lengths.values()], sizes
        self.device, self.dtype, self.sets, self.stream = device, dtype, sets, stream
        bounds = [0, *torch.tensor(self.counts).cumsum(0).tolist()]
        self.offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        samples = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in shape.lengths.values()]
        self.sample = torch.cat(samples).to(device=device, dtype=torch.int32)
        self.drop_path = torch.where(torch.arange(shape.samples, device=device) % 5 == 0, 0.0, 1.25)

    def tensors(self, width: int, dtype: torch.dtype | None = None, leaf: bool = False) -> list[Tensor]:
        """One random matrix of rows for each set."""
        make = [torch.randn(self.rows, width, device=self.device).to(dtype or self.dtype) for _ in range(self.sets)]
        return [tensor.requires_grad_(leaf) for tensor in make]

    def vectors(self, width: int, count: int = 1, around: float = 0.0) -> list[Tensor]:
        """Parameters: vectors around a value."""
        made = [(around + 0.1 * torch.randn(width, device=self.device)).to(self.dtype) for _ in range(count)]
        return [vector.requires_grad_() for vector in made]

    def moved(self, *matrices: tuple[int, torch.dtype]) -> int:
        """Bytes of matrices of rows, each given by its width and dtype."""
        return sum(self.rows * width * dtype.itemsize for width, dtype in matrices)


class Operation:
    """One operation with its variants, and the bytes that each pass must move: every row tensor once each way."""

    def __init__(self, factories: Mapping[str, Factory], forward_bytes: int, backward_bytes: int) -> None:
        self.factories, self.goal = dict(factories), GOAL
        both = forward_bytes + backward_bytes
        self.bytes = {"forward": forward_bytes, "backward": backward_bytes, "forward_backward": both}

    def with_shares(self, records: dict[str, dict[str, Any]], copy_bytes_per_second: float | None) -> dict[str, Any]:
        """Add to every pass that was timed the rate of the bytes that it must move, and its share of a copy's."""
        for record in records.values():
            for mode, must_move in self.bytes.items():
                if mode not in record:
                    continue
                rate = must_move / (record[mode]["median_ms"] / 1e3)
                record[mode]["GB_per_second"] = round(rate / 1e9, 1)
                if copy_bytes_per_second:
                    record[mode]["share_of_copy"] = round(rate / copy_bytes_per_second, 3)
        return {"bytes": self.bytes, "goal": self.goal, "variants": records}


def operations(case: PointwiseCase) -> dict[str, Callable[[], Operation]]:
    """What is measured, by the name of the operation's file; made when it is its turn, for its memory."""
    made = {name: functools.partial(case_operation, name) for name in OVER_ROWS} | OPERATIONS
    return {name: functools.partial(make, case) for name, make in made.items()}


def rms_norm_peers(weight: Tensor) -> dict[str, Callable[[], Function]]:
    """Others' functions with one weight for all rows."""

    def liger() -> Function:
        function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return lambda x: function.apply(x, weight, EPS)

    def apex() -> Function:
        function = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
        return lambda x: function(x, weight, weight.shape, EPS)

    def quack() -> Function:
        function = importlib.import_module("quack").rmsnorm
        return lambda x: function(x, weight, eps=EPS)

    def transformer_engine() -> Function:
        module = importlib.import_module("transformer_engine.pytorch")
        return _with_parameters(module.RMSNorm(weight.shape[0], eps=EPS), weight=weight)

    return {"liger": liger, "apex": apex, "quack": quack, "transformer_engine": transformer_engine}


def _with_parameters(module: torch.nn.Module, **parameters: Tensor) -> Function:
    """A module's call over given tensors in the place of its parameters."""
    return lambda x: torch.func.functional_call(module, parameters, (x,))


def layer_norm_peers(weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Function]]:
    """Others' functions with one weight and bias for all rows."""

    def transformer_engine() -> Function:
        module = importlib.import_module("transformer_engine.pytorch")
        return _with_parameters(module.LayerNorm(weight.shape[0], eps=EPS), weight=weight, bias=bias)

    def liger() -> Function:
        function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return lambda x: function.apply(x, weight, bias, EPS)

    def apex() -> Function:
        function = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
        return lambda x: function(x, weight, bias, weight.shape, EPS)

    def flash_attention() -> Function:
        function = importlib.import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn
        return lambda x: function(x, weight, bias, eps=EPS)

    return {"liger": liger, "apex": apex, "flash-attn": flash_attention, "transformer_engine": transformer_engine}


def case_operation(name: str, case: PointwiseCase) -> Operation:
    """An operation of one output in the form of its first case, against that case's plain PyTorch."""
    width, rows = case.sizes.width, Rows(case.rows, case.device)
    first = next(OVER_ROWS[name](rows, width, case.dtype, empty_tensors(case.device)))
    matrices = {key: (width, leaf.dtype) for key, leaf in first.leaves.items() if leaf.dim() == 2}
    names = [key for key in first.leaves if key not in matrices]
    vectors = dict(zip(names, case.vectors(width, len(names), around=1.0), strict=True))
    peers = PEERS[name](**vectors) if name in PEERS else {}

    def of_rows(function: Function) -> Function:
        return lambda *rows: function(**dict(zip(matrices, rows, strict=True)), **vectors)

    sets = list(zip(*(case.tensors(*matrix, leaf=True) for matrix in matrices.values()), strict=True))
    inputs, output = list(matrices.values()), (width, case.dtype)
    return Operation(
        _factories(of_rows(first.call), of_rows(first.plain), peers, sets, case.tensors(width), list(vectors.values())),
        forward_bytes=case.moved(*inputs, output),
        backward_bytes=case.moved(*inputs, *inputs, output),
    )


def residual_operation(case: PointwiseCase) -> Operation:
    """LayerScale, DropPath's factor, the residual stream and the LayerNorm behind it, in one."""
    width = case.sizes.width
    (gamma,), (weight,), (bias,) = case.vectors(width), case.vectors(width, around=1.0), case.vectors(width)
    xs, ys = case.tensors(width, case.stream, leaf=True), case.tensors(width, leaf=True)
    gradients = list(zip(case.tensors(width, case.stream), case.tensors(width), strict=True))
    drop_path, sample = case.drop_path, case.sample

    def fused(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return residual_layer_norm(x, y, gamma, weight, bias, drop_path=drop_path, sample=sample, eps=EPS)

    def eager(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = x + (y * gamma * drop_path[sample.long(), None]).to(x.dtype)
        return out, F.layer_norm(out.to(y.dtype), (width,), weight, bias, EPS)

    stream, row = (width, case.stream), (width, case.dtype)
    return Operation(
        _factories(fused, eager, {}, list(zip(xs, ys, strict=True)), gradients, [gamma, weight, bias]),
        forward_bytes=case.moved(stream, row, stream, row),
        backward_bytes=case.moved(stream, row, stream, row, stream, row),
    )


def gated_sub_ln_operation(case: PointwiseCase) -> Operation:
    """GeGLU and the Sub-LayerNorm of each row's modality."""
    width, groups, counts, offsets = case.sizes.hidden, len(case.counts), case.counts, case.offsets
    weights, biases = case.vectors(width, groups, around=1.0), case.vectors(width, groups)
    pairs = list(zip(case.tensors(width, leaf=True), case.tensors(width, leaf=True), strict=True))

    def fused(u: Tensor, v: Tensor) -> Tensor:
        return gated_sub_ln(u, v, weights, biases, offsets=offsets, row_counts=counts, eps=EPS)

    def norms(h: Tensor) -> Tensor:
        norms_of = zip(h.split(counts), weights, biases, strict=True)
        return torch.cat([F.layer_norm(rows, (width,), weight, bias, EPS) for rows, weight, bias in norms_of])

    def eager(u: Tensor, v: Tensor) -> Tensor:
        return norms(F.gelu(u) * v)

    def liger() -> Function:
        geglu = importlib.import_module("liger_kernel.ops.geglu").LigerGELUMulFunction
        norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

        def run(u: Tensor, v: Tensor) -> Tensor:
            norms_of = zip(geglu.apply(u, v).split(counts), weights, biases, strict=True)
            return torch.cat([norm.apply(rows, weight, bias, EPS) for rows, weight, bias in norms_of])

        return run

    row = (width, case.dtype)
    return Operation(
        _factories(fused, eager, {"liger, tanh": liger}, pairs, case.tensors(width), [*weights, *biases]),
        forward_bytes=case.moved(row, row, row),
        backward_bytes=case.moved(row, row, row, row, row),
    )


PEERS: dict[str, Callable[..., dict[str, Callable[[], Function]]]] = {
    "layer_norm": layer_norm_peers, "rms_norm": rms_norm_peers
}  # fmt: skip
OPERATIONS = {"residual": residual_operation, "gated_sub_ln": gated_sub_ln_operation}


def _factories(
    fused: Function, eager: Function, peers: Mapping[str, Callable[[], Function]], sets: Sequence[tuple[Tensor, ...]],
    gradients: Sequence[Any], parameters: Sequence[Tensor],
) -> dict[str, Factory]:  # fmt: skip
    """The library's operation, plain PyTorch, the same compiled, and the peers."""

    def variant(function: Function) -> Variant:
        made = trained(function, sets, gradients, parameters)
        made.rows = lambda out: out[-1] if isinstance(out, tuple) else out  # the norm, behind a residual stream
        made.gradient_rows, made.gradients_compared = lambda gradient: gradient, made.inputs
        return made

    def peer_variant(peer: Callable[[], Function]) -> Variant:
        function = peer()
        if sets[0][0].device.type == "cpu":
            raise LeftOut("the package needs a CUDA device")
        return variant(function)

    return {
        "eager": lambda: variant(eager),
        "compiled": compiled(lambda: variant(torch.compile(eager, dynamic=False, mode="default"))),
        "max_autotune": compiled(lambda: variant(torch.compile(eager, dynamic=False, mode=MAX_AUTOTUNE))),
        **{name: lambda peer=peer: peer_variant(peer) for name, peer in peers.items()},
        "fused": lambda: variant(fused),
    }
