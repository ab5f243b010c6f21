"""Checks that every differentiable op must pass; an op is given as ``call(**leaves)`` with named leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from onepeace_fast.tolerance import assert_within_rule

Call = Callable[..., Any]
Leaves = Mapping[str, Tensor]


def tensors(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The outputs of an op as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A fixed random gradient for every output, rounded to its dtype."""
    return [normal(*o.shape, seed=1000 + i, dtype=o.dtype).to(o.device) for i, o in enumerate(outputs)]


def run(
    call: Call, leaves: Leaves, gradients: Sequence[Tensor] | None = None, frozen: Sequence[str] = ()
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and the gradient of every leaf, for the given gradients of the outputs."""
    mine = {name: leaf.detach().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    outputs = tensors(call(**mine))
    gradients = cotangents(outputs) if gradients is None else gradients
    torch.autograd.backward(
        outputs, [gradient.to(output.dtype) for gradient, output in zip(gradients, outputs, strict=True)]
    )
    return [output.detach() for output in outputs], {name: leaf.grad for name, leaf in mine.items()}


def check_against_naive(
    call: Call,
    naive: Call,
    leaves: Leaves,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    slices: Mapping[str, Sequence[object]] | None = None,
) -> None:
    """Outputs (out0, out1, ...) and every gradient by the tolerance rule; in float64 to twelve digits."""
    rounded = {name: leaf.to(dtype if isinstance(dtype, torch.dtype) else dtype[name]) for name, leaf in leaves.items()}
    outputs, gradients = run(call, rounded)
    given = cotangents(outputs)
    plain = run(naive, rounded, given)
    exact = run(naive, {name: leaf.double() for name, leaf in rounded.items()}, given)
    for theirs in (plain[1], exact[1]):
        for name, leaf in rounded.items():  # plain autograd gives none where no row took part
            theirs[name] = torch.zeros_like(leaf) if theirs[name] is None else theirs[name]
    for i, (output, expected) in enumerate(zip(outputs, plain[0], strict=True)):
        assert output.dtype == expected.dtype, f"out{i}: {output.dtype} is not {expected.dtype}"
        gradients |= {f"out{i}": output}
        plain[1][f"out{i}"], exact[1][f"out{i}"] = expected, exact[0][i]
    for name, value in gradients.items():
        if value.dtype == torch.float64:
            scale = exact[1][name].abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(value, exact[1][name], rtol=1e-11, atol=1e-12 * (1 + scale), msg=name)
            continue
        assert_within_rule(name, value, plain[1][name], exact[1][name], (slices or {}).get(name, ()))


def assert_same(actual: tuple[list, dict], expected: tuple[list, dict], what: str) -> None:
    """Outputs and gradients of two runs, bit by bit."""
    for i, (a, b) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert torch.equal(a, b), f"{what}: output {i} differs"
    assert_same_gradients(actual[1], expected[1], what)


def assert_close_gradients(actual: dict, expected: dict, what: str) -> None:
    """Gradients of two runs, but for the rounding that another order of summation brings."""
    for name, gradient in expected.items():
        largest = gradient.abs().max().item() if gradient.numel() else 0.0
        bound = 16 * torch.finfo(gradient.dtype).eps
        torch.testing.assert_close(actual[name], gradient, rtol=bound, atol=bound * largest, msg=f"{what}: {name}")


def assert_same_gradients(actual: dict, expected: dict, what: str) -> None:
    """Gradients of two runs, bit by bit."""
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), f"{what}: gradient of {name} is missing in one run"
        assert gradient is None or torch.equal(actual[name], gradient), f"{what}: gradient of {name} differs"


def check_gradcheck(call: Call, leaves: Leaves) -> None:
    """Float64 gradients against finite differences."""
    mine = [leaf.detach().double().requires_grad_() for leaf in leaves.values()]
    names = list(leaves)
    assert torch.autograd.gradcheck(lambda *values: call(**dict(zip(names, values, strict=True))), mine)


def check_deterministic(call: Call, leaves: Leaves, repeats: int = 10) -> None:
    """The same input gives the same bits, forward and backward."""
    first = run(call, leaves)
    for _ in range(repeats - 1):
        assert_same(run(call, leaves), first, "repeat")


def sliced(tensor: Tensor) -> Tensor:
    """The same values as columns of a wider tensor that holds NaN elsewhere."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), torch.nan)
    part = wide[..., 1 : 1 + tensor.shape[-1]]
    return part.copy_(tensor)


def stepped(tensor: Tensor) -> Tensor:
    """The same values as every second column of a wider tensor that holds NaN elsewhere."""
    part = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)[..., ::2]
    return part.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the first and last dimension exchanged in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = (sliced, stepped, transposed)


def check_gradient_layouts(call: Call, leaves: Leaves) -> None:
    """Expanded, sliced, stepped and transposed gradients give what contiguous ones give, but for rounding."""
    outputs, expected = run(call, leaves)
    given = cotangents(outputs)
    for layout in LAYOUTS:
        assert_close_gradients(run(call, leaves, [layout(g) for g in given])[1], expected, layout.__name__)
    ones = [torch.ones_like(output) for output in outputs]
    expanded = [output.new_ones(()).expand(output.shape) for output in outputs]
    assert_close_gradients(run(call, leaves, expanded)[1], run(call, leaves, ones)[1], "expanded")


def check_input_layouts(call: Call, leaves: Leaves, names: Sequence[str]) -> None:
    """Inputs that are sliced, stepped or transposed give the same results, and gradients of the inputs' shapes."""
    expected = run(call, leaves)
    for layout in LAYOUTS:
        for name in names:
            actual = run(call, {**leaves, name: layout(leaves[name])})
            for a, b in zip(actual[0], expected[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            for key, gradient in expected[1].items():
                torch.testing.assert_close(actual[1][key], gradient, rtol=1e-10, atol=1e-10, msg=key)


def check_frozen(call: Call, leaves: Leaves) -> None:
    """A frozen leaf gets no gradient, and the others the same bits as before."""
    expected = run(call, leaves)
    for name in leaves:
        actual = run(call, leaves, frozen=[name])
        assert actual[1][name] is None, f"{name} is frozen and got a gradient"
        assert_same(actual, (expected[0], {**expected[1], name: None}), f"{name} frozen")


def check_second_derivative(call: Call, leaves: Leaves) -> None:
    """Differentiating twice is refused in one line that names the op."""
    mine = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = tensors(call(**mine))
    gradients = torch.autograd.grad([o.square().sum() for o in outputs], list(mine.values()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"onepeace_fast::\w+ is differentiable once") as caught:
        sum(gradient.square().sum() for gradient in gradients).backward()
    assert "\n" not in str(caught.value)


class _ForwardRecorder(TorchFunctionMode):
    """Calls of our ops as autograd sees them, inputs that require grad included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "onepeace_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


class _BackwardRecorder(TorchDispatchMode):
    """Calls of our ops below autograd, those made by the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "onepeace_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def _flat(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _flat(value)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return [_detached(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_registration(call: Call, leaves: Leaves, forward: str) -> None:
    """``opcheck`` of the op on inputs that require grad, and of its backward op."""
    mine = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    with _ForwardRecorder() as above:
        outputs = tensors(call(**mine))
    with _BackwardRecorder() as below:
        torch.autograd.backward(outputs, cotangents(outputs))
    ((function, args),) = above.calls
    assert function._schema.name == f"onepeace_fast::{forward}"
    needing = [tensor for tensor in _flat(args) if tensor.requires_grad]
    assert len(needing) == len(leaves), "opcheck passes vacuously on inputs that need no gradient"
    torch.library.opcheck(function, args)
    ((function, args),) = below.calls
    assert function._schema.name == f"onepeace_fast::{forward}_backward"
    torch.library.opcheck(function, tuple(map(_detached, args)), test_utils=("test_schema", "test_faketensor"))


def check_compiled(call: Call, leaves: Leaves) -> None:
    """One graph without breaks, whose outputs and gradients have the eager ones' bits."""
    expected = run(call, leaves)
    torch._dynamo.reset()
    actual = run(torch.compile(call, fullgraph=True, backend="aot_eager"), leaves)
    assert_same(actual, expected, "compiled")


def check_compiled_once(cases: Sequence[tuple[Call, Leaves, Mapping[str, Any]]], call: Call) -> None:
    """One dynamic graph serves every case: ``call(**leaves, **arguments)`` with other numbers of rows each time.

    The first case's sizes must all differ: torch gives equal sizes one symbol.
    """
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for leaves, arguments in cases:
            expected = run(lambda arguments=arguments, **mine: call(**mine, **arguments), leaves)
            actual = run(lambda arguments=arguments, **mine: compiled(**mine, **arguments), leaves)
            assert_same(actual, expected, f"compiled with {[list(leaf.shape) for leaf in leaves.values()]}")


def message_of(function: Call, *args: Any, **kwargs: Any) -> str:
    """What the ``ValueError`` of a call says; nothing where there is none."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def refused(argument: str, function: Call, *args: Any, **kwargs: Any) -> None:
    """The call raises ``ValueError`` in one line that begins with the argument and says what was expected."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith(argument), message
    assert "\n" not in message and "expected" in message and "got" in message, message
