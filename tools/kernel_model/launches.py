"""What a layer launches at one batch: the routed FFN by its strategies, and the operations between products."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from tools.products import COUNTS, HIDDEN, WIDTH

DTYPE = "bfloat16"


class Shape(NamedTuple):
    """Rows of each modality, and the widths of their rows."""

    counts: tuple[int, ...] = COUNTS
    width: int = WIDTH
    hidden: int = HIDDEN

    @property
    def rows(self) -> int:
        """Of all modalities."""
        return sum(self.counts)


class Launch(NamedTuple):
    """One launch: the operation and pass that it is of, and all that it is launched with."""

    operation: str
    configuration: Any

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.configuration.kernel.__name__.removesuffix("_kernel")

    @property
    def traffic(self) -> int:
        """Bytes of its tensors, each moved once; one that is read and written stands in two arguments."""
        from torch import Tensor

        tensors = {}
        for name, value in self.configuration.arguments.items():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, Tensor):
                    tensors[name, one.data_ptr()] = one.numel() * one.element_size()
        return sum(tensors.values())


def recorded(shape: Shape, architecture: str) -> dict[str, Launch]:
    """Every launch of both passes of each operation on a GPU of this architecture, by a name of its own."""
    import torch

    from onepeace_fast.hardware.cases import empty_tensors
    from onepeace_fast.kernels.launch import recording
    from onepeace_fast.ops.kernel_choice import force_kernels
    from tools.cubin import CHIPS

    make = empty_tensors(torch.device("cpu"))
    found: dict[str, Launch] = {}
    for name, operation in OPERATIONS.items():
        with force_kernels(True), recording(architecture, CHIPS[architecture].multiprocessors) as configurations:
            operation(shape, make, getattr(torch, DTYPE))
        repeated: Counter[str] = Counter()
        for configuration in configurations:
            launch = Launch(name, configuration)
            repeated[launch.kernel] += 1
            number = f" {repeated[launch.kernel]}" if repeated[launch.kernel] > 1 else ""
            found[f"{name}: {launch.kernel}{number}"] = launch
    return found


def _without_products() -> contextlib.AbstractContextManager[Any]:
    """A context in which the vendor's products are not computed: nobody reads what they give."""
    from torch.utils._python_dispatch import TorchDispatchMode

    products = {"mm": 0, "addmm": 1}  # where the left operand stands; the right one comes next

    class WithoutProducts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = function._schema.name.removeprefix("aten::")
            if name not in products:
                return function(*args, **kwargs)
            left, right = args[products[name] : products[name] + 2]
            return kwargs["out"] if "out" in kwargs else left.new_empty(left.shape[0], right.shape[1])

    return WithoutProducts()


def _both_passes(call: Callable[..., Any], leaves: dict[str, Any]) -> None:
    """Forward and backward with a gradient of every leaf."""
    import torch

    flat = [
        leaf.requires_grad_() for value in leaves.values() for leaf in (value if isinstance(value, list) else [value])
    ]
    result = call(**leaves)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    torch.autograd.grad(outputs, flat, [torch.empty_like(output) for output in outputs])


def _offsets(shape: Shape) -> Any:
    import torch

    return torch.tensor([0, *accumulate(shape.counts)], dtype=torch.int32)


def _routed_ffn(shape: Shape, make: Any, dtype: Any, strategy: str = "grouped") -> None:
    """With gate, Sub-LayerNorm, LayerScale and residual, as the model has them."""
    from onepeace_fast.ops import routed_ffn

    rows, width, hidden = shape.rows, shape.width, shape.hidden

    def each(*size: int) -> list[Any]:
        return [make(*size, dtype=dtype) for _ in shape.counts]

    leaves = {
        "z": make(rows, width, dtype=dtype), "w0": each(hidden, width), "w1": each(hidden, width),
        "w2": each(width, hidden), "b2": each(width), "norm_weight": each(hidden), "norm_bias": each(hidden),
        "residual": make(rows, width, dtype=dtype), "gamma": make(width, dtype=dtype),
    }  # fmt: skip
    settings = {"offsets": _offsets(shape), "row_counts": shape.counts, "strategy": strategy}
    with _without_products():
        _both_passes(lambda **given: routed_ffn(**given, **settings), leaves)


def _gated_sub_ln(shape: Shape, make: Any, dtype: Any) -> None:
    """As between the vendor's products: the backward pass stores n once more."""
    import torch

    from onepeace_fast.kernels.gated_sub_ln import gated_sub_ln_backward_and_n, gated_sub_ln_forward
    from onepeace_fast.structures import GatedSubLNGradients, GatedSubLNInputs, GatedSubLNSaved, Routing

    u, v, grad = (make(shape.rows, shape.hidden, dtype=dtype) for _ in range(3))
    weight, bias = ([make(shape.hidden, dtype=dtype) for _ in shape.counts] for _ in range(2))
    routing, needed = Routing(_offsets(shape), shape.counts), [True] * len(shape.counts)
    with torch.no_grad():
        outputs = gated_sub_ln_forward(GatedSubLNInputs(u, v, weight, bias, routing, "gelu", 1e-5))
        saved = GatedSubLNSaved(grad, u, v, outputs.mean, outputs.rstd, weight, bias, routing, "gelu")
        gated_sub_ln_backward_and_n(saved, GatedSubLNGradients._make((True, True, needed, needed)))


def _residual(shape: Shape, make: Any, dtype: Any) -> None:
    from onepeace_fast.ops import residual

    x, y = (make(shape.rows, shape.width, dtype=dtype) for _ in range(2))
    _both_passes(residual, {"x": x, "y": y, "gamma": make(shape.width, dtype=dtype)})


def _residual_layer_norm(shape: Shape, make: Any, dtype: Any) -> None:
    from onepeace_fast.ops import residual_layer_norm

    x, y = (make(shape.rows, shape.width, dtype=dtype) for _ in range(2))
    vectors = {name: make(shape.width, dtype=dtype) for name in ("gamma", "norm_weight", "norm_bias")}
    _both_passes(residual_layer_norm, {"x": x, "y": y, **vectors})


def _layer_norm(shape: Shape, make: Any, dtype: Any) -> None:
    from onepeace_fast.ops import layer_norm

    vectors = {name: make(shape.width, dtype=dtype) for name in ("weight", "bias")}
    _both_passes(layer_norm, {"x": make(shape.rows, shape.width, dtype=dtype), **vectors})


def _layer_norm_and_stream(shape: Shape, make: Any, dtype: Any) -> None:
    """Around a branch: its backward pass adds the gradient of the stream."""
    from onepeace_fast.ops.layer_norm import layer_norm_and_stream

    vectors = {name: make(shape.width, dtype=dtype) for name in ("weight", "bias")}
    _both_passes(layer_norm_and_stream, {"x": make(shape.rows, shape.width, dtype=dtype), **vectors})


OPERATIONS = {
    "routed_ffn": _routed_ffn,
    "hybrid": functools.partial(_routed_ffn, strategy="hybrid"),
    "gated_sub_ln": _gated_sub_ln,
    "residual": _residual,
    "residual_layer_norm": _residual_layer_norm,
    "layer_norm": _layer_norm,
    "layer_norm_and_stream": _layer_norm_and_stream,
}
