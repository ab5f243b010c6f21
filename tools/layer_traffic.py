"""Count the bytes that a layer's forward and backward pass move outside its matrix products and its attention, by op.

    python -m tools.layer_traffic [--rows N N] [--width N] [--hidden N] [--write]

The packed layer runs at its real sizes on fake tensors, which have shapes and no memory: each op of PyTorch counts what
it reads and writes, each launch of a kernel its tensors once, as ``tests/kernels/test_traffic.py`` proves. ``LEAST``
has what the formulas need. Nothing here is a time, and no cache is modelled.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.support.report import markdown, write_text
from onepeace_fast.config import TransformerConfig
from onepeace_fast.kernels import launch
from onepeace_fast.layers import transformer
from onepeace_fast.ops import arguments, operation
from onepeace_fast.ops.kernel_choice import force_kernels
from onepeace_fast.ops.relative_bias_attention import RELATIVE_BIAS_ATTENTION as ATTENTION
from onepeace_fast.ops.relative_bias_attention import _fake as attention_fake
from onepeace_fast.ops.relative_bias_attention import _fake_backward as attention_fake_backward
from onepeace_fast.route_plan import RoutePlan
from onepeace_fast.tables import table

TITLE = "The bytes that a layer moves outside its matrix products and its attention, by op"
FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "layer_traffic.md"
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul"}
NO_MEMORY = {"device", "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
OVERWRITING = {"copy_", "zero_", "fill_"}  # they do not read what they change
GPU = ("sm_90", 132)  # how many partial sums there are is its multiprocessors'


class Pass(NamedTuple):
    """The row tensors that a formula reads and writes: of the stream, of the branch, of the hidden width.

    ``cast`` are those of the branch that the stream's own are where both have one dtype; ``weight`` are the output
    projection's weight and what is like it.
    """

    op: str
    formula: str
    stream: int = 0
    branch: int = 0
    hidden: int = 0
    cast: int = 0
    weight: int = 0


# Each once each way; bias gradients and sums for parameters are of rows that are at hand, as are additions. gamma_1's
# gradient is read off the output projection's, so that y_1 is not: see ``onepeace_fast/ops/linear_residual.py``.
LEAST = (
    Pass("layer_norm_forward_kernel", "LN_1: x in, z out", 1, 1, 0),
    Pass("layer_norm_forward_kernel", "Sub-LN of attention: o in, n out", 0, 2, 0),
    Pass("residual_forward_kernel", "attention's residual, LN_2: x, y_1 in, x', z out", 2, 2, 0),
    Pass("gated_sub_ln_forward_kernel", "u, v in, n out", 0, 0, 3),
    Pass("residual_forward_kernel", "the FFN's residual: x', y_2 in, x'' out", 2, 1, 0),
    Pass("residual_backward_kernel", "the FFN's residual: dx'', y_2 in, dy_2 out", 1, 2, 0),
    Pass("gated_sub_ln_backward_kernel", "dn, u, v in, du, dv, n out", 0, 0, 6),
    Pass("residual_backward_kernel", "attention's residual, LN_2: dx'', dz, x' in, dx', dy_1 out", 3, 1, 0, cast=1),
    Pass("mul", "W in, gamma_1 W out", weight=2),
    Pass("linear_residual_gradient_kernel", "dy_1^T n, W in, dW out", weight=3),
    Pass("layer_norm_backward_kernel", "Sub-LN of attention: dn, o in, do out", 0, 3, 0),
    Pass("layer_norm_backward_kernel", "LN_1: dz, x, dx' in, dx out", 3, 1, 0),
)


class Moved(NamedTuple):
    """An op's calls, what they move, and how much of that is in tensors with a row for each token."""

    calls: int = 0
    rows: int = 0
    others: int = 0

    def add(self, rows: int, others: int) -> Moved:
        return Moved(self.calls + 1, self.rows + rows, self.others + others)


class Traffic(TorchDispatchMode):
    """Count what ops and launches inside read and write; ``moved`` is by name, all matrix products under one."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        self.moved: dict[str, Moved] = {}
        self._rows = set(rows)
        self._paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._paused:
            self._count(function._schema, args, kwargs or {}, result)
        return result

    def _count(self, schema: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        name = schema.name.partition("::")[2]
        views = any(of.alias_info is not None and not of.alias_info.is_write for of in schema.returns)
        if views or name in NO_MEMORY:
            return
        touched = _tensors(result) if all(of.alias_info is None for of in schema.returns) else []
        for place, argument in enumerate(schema.arguments):
            tensors = _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
            changed = argument.alias_info is not None and argument.alias_info.is_write
            touched += tensors * (2 if changed and not (argument.is_out or name in OVERWRITING) else 1)
        self._add("matrix products" if name in PRODUCTS else name, touched)

    def launched(self, configuration: launch.Configuration) -> None:
        """Count a launch: each of its tensors is read or written, once; of partial sums those that a program has."""
        name = configuration.kernel.__name__
        self._add(name, [
            tensor[0, :: tensor.shape[0] if name == "partial_sums_kernel" else 1] if tensor.dim() == 3 else tensor
            for tensor in _tensors([*configuration.arguments.values()])
        ])  # fmt: skip

    def leave_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, inside which nothing is counted."""

        def uncounted(*given: Any) -> Any:
            self._paused = True
            try:
                return function(*given)
            finally:
                self._paused = False

        return uncounted

    def _add(self, name: str, tensors: Sequence[Tensor]) -> None:
        rows = sum(_bytes(tensor) for tensor in tensors if self._rows & set(tensor.shape))
        self.moved[name] = self.moved.get(name, Moved()).add(rows, sum(map(_bytes, tensors)) - rows)


def _bytes(tensor: Tensor) -> int:
    """What is in memory: an expanded dimension is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def layer_traffic(
    counts: Sequence[int], width: int, hidden: int, stream: torch.dtype, half: torch.dtype = torch.bfloat16
) -> dict[str, Moved]:
    """What a training step of a layer moves, by op; text and image with so many rows.

    Parameters and branches are half precision; over a float32 stream under autocast.
    """
    rows = sum(counts)
    plan = RoutePlan.from_lengths({"text": [counts[0]], "image": [counts[1]]})
    traffic = Traffic([rows, *counts])
    config = TransformerConfig(embed_dim=width, ffn_embed_dim=hidden, layers=1, attention_heads=width // 64, audio=None)
    autocast = torch.autocast("cpu", dtype=half, enabled=stream != half)
    with (
        force_kernels(True),
        patch.object(launch.Configuration, "launch", lambda self, grid: traffic.launched(self)),
        patch.object(launch, "INTERPRETER", GPU),
        patch.object(arguments, "is_on_host", lambda x: False),  # a fake tensor has no values to check
        patch.object(operation, "is_eager", lambda tensors: True),  # as on a GPU, where no mode looks on
        patch.object(transformer, "projects_together", lambda z: True),
        patch.object(ATTENTION, "run", traffic.leave_out(attention_fake)),
        patch.object(ATTENTION.backward, "run", traffic.leave_out(attention_fake_backward)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        layer = transformer.TransformerLayer(config).train()
        for parameter in layer.parameters():  # nothing converts a module of fake tensors
            parameter.data = parameter.data.to(half)
        layer.packed_ffn = functools.partial(layer.packed_ffn, strategy="per_modality")  # type: ignore[method-assign]
        x = torch.empty(rows, width, dtype=stream).requires_grad_()
        bias = [torch.empty(width // 64, 2 * at + 4).requires_grad_() for at in plan.code_offsets]
        gradient = torch.empty_like(x)
        with traffic:
            with autocast:
                out = layer(x, plan, bias)
            out.backward(gradient)
    return traffic.moved


def least_bytes(rows: int, width: int, hidden: int, stream: torch.dtype, half: torch.dtype) -> dict[str, int]:
    """What ``LEAST`` comes to, by op."""
    found: dict[str, int] = {}
    for op in LEAST:
        branch = op.branch + (op.cast if stream != half else 0)
        columns = (op.stream * stream.itemsize + branch * half.itemsize) * width + op.hidden * half.itemsize * hidden
        found[op.op] = found.get(op.op, 0) + rows * columns + op.weight * half.itemsize * width**2
    return found


def ratios(moved: Mapping[str, Moved], least: Mapping[str, int]) -> dict[str, float]:
    """What is moved to the least of it: of all ops, and without those of the hidden width, which some strategies lack.

    Matrix products are not counted.
    """
    counted = {name: of.rows + of.others for name, of in moved.items() if name != "matrix products"}
    of_all = sum(counted.values()) / sum(least.values())
    counted, least = ({n: size for n, size in of.items() if "gated_sub_ln" not in n} for of in (counted, least))
    return {"all": of_all, "without the hidden width": sum(counted.values()) / sum(least.values())}


def rows_of(moved: Mapping[str, Moved], least: Mapping[str, int], unit: int) -> list[tuple[str, ...]]:
    """The table of a stream in row tensors of the branch, the heading first."""
    found: list[tuple[str, ...]] = [("op", "calls", "rows", "other", "least", "ratio")]
    for name, (calls, by_row, others) in moved.items():
        need = least.get(name, 0)
        cells = (f"{by_row / unit:.2f}", f"{others / unit:.2f}", f"{need / unit:.2f}" if need else "")
        found.append((name, str(calls), *cells, f"{(by_row + others) / need:.2f}" if need else ""))
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Print a table for each dtype of the residual stream."""
    parser = argparse.ArgumentParser(prog="python -m tools.layer_traffic", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs=2, default=(1264, 8224), help="of text and of image")
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--write", action="store_true", help=f"write the tables into results/{FILE.name} too")
    options = parser.parse_args(given)
    half, rows = torch.bfloat16, sum(options.rows)
    document = [f"# {TITLE}", "By `python -m tools.layer_traffic --write`; counted, not measured: no time, no cache."]
    for stream in (half, torch.float32):
        moved = layer_traffic(options.rows, options.width, options.hidden, stream)
        least = least_bytes(rows, options.width, options.hidden, stream, half)
        unit = rows * options.width * half.itemsize
        heading = f"{rows} rows of {options.width} in {half}, {unit / 1e6:.1f} MB, over a stream in {stream}"
        lines = rows_of(moved, least, unit)
        found = [f"{of}: {ratio:.3f} times the least" for of, ratio in ratios(moved, least).items()]
        print("\n".join([f"\n{heading}:\n", table(lines), "", *found]))
        document += [f"## {heading}", markdown(lines), *found]
    if options.write:
        write_text(FILE, "\n\n".join(document) + "\n")
        print(f"\nWritten to {FILE}")


if __name__ == "__main__":
    main()
