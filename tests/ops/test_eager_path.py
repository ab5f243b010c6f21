"""The direct eager path: taken in plain eager execution alone, with the bits of the registered op."""

from unittest import mock

import pytest
import torch
from support.contract import normal
from support.every_op import attention_inputs, rowwise_inputs
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from onepeace_fast import RoutePlan
from onepeace_fast.attention_structures import Segments
from onepeace_fast.ops.operation import Operation, is_eager
from onepeace_fast.structures import DropPath, Routing

PLAN = RoutePlan.from_lengths({"text": [2, 3], "image": [4]}, samples={"text": [0, 1], "image": [1]}, first_is_cls=True)


def every_op() -> dict:
    """Each op with all options, and the ops over rows also by a row index; x is twice as long as its branch then."""
    seeds = iter(range(1000))

    def make(*shape):
        return normal(*shape, seed=next(seeds))

    found = {}
    for stream in (9, 18):
        index = torch.randperm(stream, generator=torch.Generator().manual_seed(1))[:9].int() if stream > 9 else None
        routing = Routing(PLAN.offsets, PLAN.row_counts, index)
        drop_path = DropPath(torch.tensor([1.25, 0.0]), torch.arange(stream, dtype=torch.int32) % 2)
        for operation, given in rowwise_inputs(make, 9, stream, routing, drop_path, ("reference",)):
            found[f"{operation.name} {stream}"] = operation, given
    segments = Segments(PLAN.cu_seqlens, PLAN.modality, PLAN.code, PLAN.is_cls, PLAN.max_length)
    found["relative_bias_attention"] = attention_inputs(make, 9, segments, PLAN.code_offsets)
    return found


OPS = every_op()


class Looks(TorchFunctionMode):
    """Sees every op, and changes nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class LooksBelow(TorchDispatchMode):
    """Sees every op below autograd, and changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def leaves_of(operation: Operation, given: object) -> list[torch.Tensor]:
    """The tensors of the inputs that may get a gradient."""
    return [t for t in operation._differentiable(operation._inputs.flatten(given)) if t is not None]


def results(operation: Operation, given: object) -> list[torch.Tensor | None]:
    """The outputs, and the gradient of each leaf that requires one, None for the others."""
    outputs = operation(given)
    leaves = leaves_of(operation, given)
    needing = [leaf for leaf in leaves if leaf.requires_grad]
    given_gradients = [normal(*o.shape, seed=5 + i) for i, o in enumerate(outputs[: operation.visible])]
    found = torch.autograd.grad(outputs[: operation.visible], needing, given_gradients, allow_unused=True)
    gradients = iter(found)
    return [*(output.detach() for output in outputs), *(next(gradients) if t.requires_grad else None for t in leaves)]


@pytest.fixture
def counted(monkeypatch):
    """How often the registered ops were called, forward and backward."""
    calls = {"forward": 0, "backward": 0}

    def counting(kind, overload):
        def call(*arguments):
            calls[kind] += 1
            return overload(*arguments)

        return call

    for operation, _ in OPS.values():
        for kind, op in (("forward", operation), ("backward", operation.backward)):
            if not hasattr(op.overload, "counted"):
                call = counting(kind, op.overload)
                call.counted = True
                monkeypatch.setattr(op, "overload", call)
    return calls


class MadeZeros(TorchDispatchMode):
    """Shapes of the zeros that are made outside of ops."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "zeros" in function.name():
            self.shapes.append([*result.shape])
        return result


def test_outputs_without_a_gradient_get_no_zeros():
    operation, given = OPS["routed_ffn 9"]
    with MadeZeros() as made:
        results(operation, given)
    assert made.shapes == []


@pytest.mark.parametrize("name", OPS)
def test_plain_eager_execution_calls_no_registered_op_and_has_its_bits(name, counted):
    operation, given = OPS[name]
    direct = results(operation, given)
    assert counted == {"forward": 0, "backward": 0}
    with LooksBelow():
        registered = results(operation, given)
    assert counted == {"forward": 1, "backward": 1}
    assert all(same(a, b) and a is not None for a, b in zip(direct, registered, strict=True))


# The gradients of projections' weights are one tensor, needed where one of them is; linear_residual has another formula
# where gamma is frozen.
OTHER_BITS = ("projections", "linear_residual")


@pytest.mark.parametrize("name", [name for name, (operation, _) in OPS.items() if operation.name not in OTHER_BITS])
def test_what_is_frozen_is_not_asked_for_and_the_others_keep_their_bits(name):
    operation, given = OPS[name]
    expected = results(operation, given)
    leaves = leaves_of(operation, given)
    outputs = len(expected) - len(leaves)
    for frozen in range(len(leaves)):
        leaves[frozen].requires_grad_(False)
        try:
            with mock.patch.object(operation.backward, "run", wraps=operation.backward.run) as run:
                found = results(operation, given)
                (_, needs), _ = run.call_args
        finally:
            leaves[frozen].requires_grad_()
        flags = [flag for value in needs for flag in flat(value)]
        slots = operation._differentiable(operation._inputs.flatten(given))
        absent = [flag for flag, leaf in zip(flags, slots, strict=True) if leaf is None]
        flags = [flag for flag, leaf in zip(flags, slots, strict=True) if leaf is not None]
        assert not any(absent) and flags == [i != frozen for i in range(len(leaves))]
        expected_now = [None if i == outputs + frozen else value for i, value in enumerate(expected)]
        assert all(same(a, b) for a, b in zip(found, expected_now, strict=True))


def same(a, b) -> bool:
    """Whether both are None, or have the same bits."""
    return a is b if a is None or b is None else torch.equal(a, b)


def flat(value):
    """Flags one after another."""
    return [flag for item in value for flag in flat(item)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_refused_and_not_dropped(name):
    operation, given = OPS[name]
    leaves = leaves_of(operation, given)
    outputs = operation(given)
    (first, *_) = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves, create_graph=True)
    assert first.requires_grad, "the gradient's own gradient would be zero, without a word"
    message = ""
    try:
        first.sum().backward()
    except RuntimeError as error:
        message = str(error)
    assert message.startswith(f"onepeace_fast::{operation.name} is differentiable once") and "\n" not in message
    assert message.endswith("; OnePeacePretrain alone has a reference backend for it")


@pytest.mark.parametrize("name", OPS)
def test_what_is_kept_is_seen_by_hooks_and_guarded_against_changes(name):
    operation, given = OPS[name]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        outputs = operation(given)
    saved = operation.saved(given, operation.run(given), [None] * operation.visible, operation.needs(given))
    tensors = [t for value in operation._saved.flatten(saved) for t in (value if isinstance(value, list) else [value])]
    assert len(packed) == sum(isinstance(t, torch.Tensor) for t in tensors)
    outputs = operation(given)
    with torch.no_grad():
        given[0].add_(0)
        given[1].add_(0) if isinstance(given[1], torch.Tensor) else None
    kept = {id(t) for t in tensors}
    changed = any(id(t) in kept for t in given[:2])
    message = ""
    try:
        sum(o.sum() for o in outputs).backward(inputs=leaves_of(operation, given))
    except RuntimeError as error:
        message = str(error)
    finally:
        for leaf in leaves_of(operation, given):
            leaf.grad = None
    assert ("modified by an inplace operation" in message) == changed


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith(("residual", "routed_ffn"))])
def test_nothing_inside_an_op_is_differentiated(name):
    operation, given = OPS[name]
    drop_path = given.drop_path._replace(scale=given.drop_path.scale.clone().requires_grad_())
    leaves = leaves_of(operation, given)
    for leaf in leaves:
        leaf.requires_grad_(False)
    try:
        outputs = operation(given._replace(drop_path=drop_path))
    finally:
        for leaf in leaves:
            leaf.requires_grad_()
    assert not any(output.requires_grad for output in outputs)


class Subclass(torch.Tensor):
    """A tensor of another class, with nothing of its own."""


def inside(context):
    """Look inside a context."""

    def look(x, see):
        with context():
            see([x])

    return look


LOOKERS = {
    "function mode": inside(Looks),
    "dispatch mode": inside(LooksBelow),
    "profiler": inside(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
    "forward mode": inside(forward_ad.dual_level),
    "torch.func": lambda x, see: torch.func.grad(lambda y: see([x]) or y.sum())(x),
    "tracing": lambda x, see: torch.jit.trace(lambda y: see([y]) or y + 1, (x,), check_trace=False),
    "batch": lambda x, see: torch._vmap_internals._vmap(lambda y: see([x, y]) or y)(x),
    "subclass": lambda x, see: see([x, x.as_subclass(Subclass)]),
    "meta": lambda x, see: see([x, x.to("meta")]),
    "negative": lambda x, see: see([x, torch.view_as_complex(normal(3, 2, seed=2)).conj().imag]),
}


@pytest.mark.parametrize("looker", LOOKERS)
def test_whatever_looks_at_ops_sees_the_registered_one(looker):
    x, seen = normal(3, 4, seed=1), []
    assert is_eager([x, None, torch.nn.Parameter(x)]) is True
    LOOKERS[looker](x, lambda tensors: seen.append(is_eager(tensors)))
    assert seen == [False]


def test_a_profile_names_the_ops():
    operation, given = OPS["layer_norm 9"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results(operation, given)
    names = {event.key for event in profile.key_averages()}
    assert {"onepeace_fast::layer_norm", "onepeace_fast::layer_norm_backward"} <= names
