"""One description per op, from which its schema, fake, autograd registration and direct eager path are made.

An op is ``Operation(name, inputs, outputs, ...)`` over the structures of ``onepeace_fast.structures``. It is registered
as ``torch.ops.onepeace_fast.name``, which everything that looks at ops gets: compiled, exported and traced code, modes,
profilers, ``torch.func`` and tensors of other kinds. A plain eager call runs the same functions directly, through one
``torch.autograd.Function`` where a gradient is needed: the dispatcher takes longer than some kernels run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from onepeace_fast.ops.kernel_choice import runs_kernel
from onepeace_fast.ops.structure_layout import Layout, Leaf
from onepeace_fast.structures import Function, Needs

NAMESPACE = "onepeace_fast"
ELSEWHERE = "OnePeacePretrain alone has a reference backend for it"  # use_backend changes no op
_SAVED = object()
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
# What a tensor may have beside its values: one that is batched, negated by a bit or a subclass has other keys too.
_PLAIN_KEYS = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView"):
    _PLAIN_KEYS |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()


def is_eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing but plain eager execution looks at a call with these tensors."""
    return not torch.autograd._profiler_enabled() and is_untransformed(tensors)  # type: ignore[attr-defined]


def is_untransformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call with these tensors is plain eager execution, though a profiler may look at it."""
    looked_at = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    traced = forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None
    if looked_at or traced or torch._C._are_functorch_transforms_active():
        return False
    keys = torch._C._dispatch_keys
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN_TYPES or keys(tensor).raw_repr() & ~_PLAIN_KEYS):
            return False
    return True


class _Library(torch.library.Library):
    """A library whose ops refuse the derivatives that they do not have; torch would drop a tangent without a word."""

    def impl(self, op_name: str, fn: Function, dispatch_key: str = "", **options: Any) -> None:
        """Register ``fn``; what differentiates looks at its tensors first."""

        def checked(keyset: torch.DispatchKeySet, *arguments: Any) -> Any:
            _refuse_transforms(op_name, arguments)
            return fn(keyset, *arguments)

        super().impl(op_name, checked if dispatch_key == "Autograd" else fn, dispatch_key, **options)


def _refuse_transforms(op_name: str, arguments: Sequence[Any]) -> None:
    """Raise where a tensor carries a forward-mode tangent, or is differentiated by ``torch.func``."""
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and forward_ad._current_level < 0:
        return
    tensors = [tensor for tensor in _tensors(arguments) if tensor.is_floating_point()]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        got = "a forward-mode derivative (torch.func.jvp or torch.autograd.forward_ad)"
    elif transformed and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        got = "a derivative by torch.func"
    else:
        return
    raise RuntimeError(
        f"{NAMESPACE}::{op_name}: expected plain reverse mode, got {got}; use backward() or torch.autograd.grad; "
        + ELSEWHERE
    )


def _tensors(flat: Sequence[Any]) -> list[Tensor]:
    """The tensors among the values of leaves, those of lists included."""
    found: list[Tensor] = []
    for value in flat:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) is list:
            found += [item for item in value if isinstance(item, Tensor)]
    return found


_LIBRARY = _Library(NAMESPACE, "DEF")


class _Op:
    """A registered op: structures in, a structure out."""

    def __init__(
        self, name: str, inputs: Sequence[Layout], arguments: Sequence[Leaf], outputs: Layout, reference: Function,
        kernel: Function, fake: Function, triton: bool,
    ) -> None:  # fmt: skip
        self.name, self.reference, self.kernel, self.triton = name, reference, kernel, triton
        self.inputs, self.outputs = inputs, outputs
        self._numbers = [place for place, leaf in enumerate(arguments) if leaf.type == "SymInt[]"]
        self._single = len(outputs.leaves) == 1  # which torch gives out as itself, in no tuple
        taken = ", ".join(f"{leaf.type} {'_'.join(leaf.path)}" for leaf in arguments)
        given = ", ".join(leaf.type.removesuffix("?") for leaf in outputs.leaves)
        _LIBRARY.define(f"{name}({taken}) -> ({given})", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._at_boundary(self.run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._at_boundary(fake), lib=_LIBRARY)
        for key in ("FuncTorchBatched", "Batched"):  # the second is that of is_grads_batched
            _LIBRARY.impl(name, self._refuse_batch, key)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run(self, *given: Any) -> Any:
        """By the kernel where it runs on the first tensor, else by the reference."""
        first = next(value for value in given[0] if isinstance(value, Tensor))
        # The public function has chosen the dtypes: autocast must not change what is inside, as compiled it does not.
        # Nor is anything inside differentiated.
        with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
            return (self.kernel if runs_kernel(self.name, first, self.triton) else self.reference)(*given)

    def from_boundary(self, flat: Sequence[Any]) -> list[Any]:
        """The structures of an op's arguments."""
        flat, structures = [*flat], []
        for place in self._numbers:
            flat[place] = tuple(flat[place])
        for layout in self.inputs:
            structures.append(layout.build(flat[: len(layout.leaves)]))
            flat = flat[len(layout.leaves) :]
        return structures

    def _at_boundary(self, function: Function) -> Function:
        """``function`` over flat arguments and results. An op returns no None: what is absent is an empty vector."""

        def flat_function(*flat: Any) -> Any:
            results = self.outputs.flatten(function(*self.from_boundary(flat)))
            like = _tensors(flat)[0]

            def present(value: Tensor | None) -> Tensor:
                return like.new_empty(0) if value is None else value

            flat_results = tuple(list(map(present, r)) if isinstance(r, list) else present(r) for r in results)
            return flat_results[0] if self._single else flat_results

        return flat_function

    def _refuse_batch(self, *_: Any) -> None:
        raise RuntimeError(
            f"{NAMESPACE}::{self.name}: expected packed rows, got a batch by torch.vmap; pack all samples by one "
            f"route plan; {ELSEWHERE}"
        )


class Gradient(NamedTuple):
    """How an op is differentiated, once. A field ``passed`` of what is saved is for ``Operation.passing``.

    ``reference``, ``kernel`` and ``fake`` take what was saved and the needs, and give gradients, None where none is
    needed. ``select`` gives those fields of what is saved that are not inputs and outputs by name. ``finish`` gives
    the gradients by a call of the backward op, and beside it those that cost nothing.
    """

    saved: type[Any]
    gradients: type[Any]
    reference: Function
    kernel: Function
    fake: Function
    select: Callable[[Any, Any, Needs], dict[str, Any]] = lambda given, outputs, needs: {}
    finish: Callable[[Function, Any, Needs], Any] = lambda backward, saved, needs: backward(saved, needs)


class _Backward(_Op):
    """The backward op of an operation."""

    def __init__(self, name: str, gradient: Gradient, triton: bool) -> None:
        saved, gradients = Layout(gradient.saved), Layout(gradient.gradients)
        needs = [
            Leaf(("needs", *leaf.path), "bool[]" if leaf.type == "Tensor[]" else "bool") for leaf in gradients.leaves
        ]
        super().__init__(
            name, (saved, gradients), [*saved.leaves, *needs], gradients, gradient.reference, gradient.kernel,
            gradient.fake, triton,
        )  # fmt: skip
        torch.library.register_autograd(f"{NAMESPACE}::{name}", self._refuse, lib=_LIBRARY)
        self.grads = sum(field.startswith("grad_") for field in gradient.saved._fields)

    def __call__(self, saved: Any, needs: Needs) -> Any:
        # With create_graph a second derivative may follow, which the registered op refuses.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_eager(saved[: self.grads]):
            of_saved, of_needs = self.inputs
            flags = of_needs.flatten(needs)
            results = self.overload(*of_saved.flatten(saved), *flags)
            return self.outputs.build([
                [one if need else None for one, need in zip(value, flag, strict=True)] if type(flag) is list
                else value if flag else None
                for value, flag in zip(results, flags, strict=True)
            ])  # fmt: skip
        return self.run(saved, needs)

    def _refuse(self, ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{NAMESPACE}::{self.name.removesuffix('_backward')} is differentiable once: expected a first derivative, "
            f"got a request for its second; write it in plain PyTorch; {ELSEWHERE}"
        )


class Operation(_Op):
    """A differentiable op, called with the structure of its inputs.

    A call returns the first ``shown`` outputs, by default those that have a gradient: for which ``gradient.saved`` has
    a ``grad_``.
    """

    def __init__(
        self, name: str, inputs: type[Any], outputs: type[Any], *, reference: Function, kernel: Function,
        fake: Function, gradient: Gradient, triton: bool = True, shown: int | None = None,
    ) -> None:  # fmt: skip
        layout = Layout(inputs)
        super().__init__(name, (layout,), layout.leaves, Layout(outputs), reference, kernel, fake, triton)
        self.gradient = gradient
        self.backward = _Backward(f"{name}_backward", gradient, triton)
        self.visible = self.backward.grads
        self.shown = shown or self.visible
        self._inputs, (self._saved, self._gradients) = layout, self.backward.inputs
        fields = gradient.saved._fields
        assert fields[: self.visible] == tuple(f"grad_{field}" for field in outputs._fields[: self.visible])
        self._saved_fields = [(field, field in outputs._fields) for field in fields[self.visible :]]
        self._optional_grads = self._saved.leaves[0].type == "Tensor?"
        paths = [leaf.path for leaf in layout.leaves]
        self._places = [paths.index(leaf.path) for leaf in self._gradients.leaves]
        self._has_lists = any(leaf.type == "Tensor[]" for leaf in layout.leaves)
        # Function.apply itself first looks at every argument for what ``is_eager`` has excluded.
        self._apply = super(torch.autograd.Function, type(name, (_EagerFunction,), {})).apply  # type: ignore[misc]
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", self._registered_backward, setup_context=self._setup_context, lib=_LIBRARY
        )

    def __call__(self, given: Any) -> tuple[Tensor, ...]:
        flat = self._inputs.flatten(given)
        if torch.compiler.is_compiling() or not is_eager(_tensors(flat)):
            results = self.overload(*flat)
            return (results,) if self._single else results[: self.shown]
        if torch.is_grad_enabled():
            differentiable = self._differentiable(flat)
            if any([tensor is not None and tensor.requires_grad for tensor in differentiable]):
                return self._apply(self, given, False, *differentiable)
        return self.run(given)[: self.shown]

    def passing(self, given: Any) -> tuple[Tensor, ...]:
        """The first input, to be used from here on in its place, and what a call returns.

        In plain eager execution the gradient of its further use then reaches the backward pass, as ``passed``, which
        adds its own to it; autograd would do that with one more pass over both. Elsewhere it is the input itself.
        """
        flat = self._inputs.flatten(given)
        wanted = torch.is_grad_enabled() and flat[0].requires_grad and not torch.compiler.is_compiling()
        if wanted and is_eager(_tensors(flat)):
            return self._apply(self, given, True, *self._differentiable(flat))
        return (flat[0], *self(given))

    def _differentiable(self, flat: Sequence[Any]) -> list[Tensor | None]:
        """The tensors that may get a gradient, those of lists one by one."""
        found: list[Tensor | None] = []
        for value in (flat[place] for place in self._places):
            found += value if type(value) is list else [value]
        return found

    def needs(self, given: Any) -> Needs:
        """True where an input requires a gradient."""
        flat = self._inputs.flatten(given)
        return self._gradients.build([
            [tensor.requires_grad for tensor in flat[place]] if type(flat[place]) is list
            else flat[place] is not None and flat[place].requires_grad
            for place in self._places
        ])  # fmt: skip

    def saved(self, given: Any, outputs: Any, grads: Sequence[Tensor | None], needs: Needs) -> Any:
        """What the backward pass is given."""
        selected = self.gradient.select(given, outputs, needs)
        return self.gradient.saved._make([
            *grads,
            *[
                selected[field] if field in selected else getattr(outputs if is_output else given, field)
                for field, is_output in self._saved_fields
            ],
        ])  # fmt: skip

    def save(self, ctx: Any, given: Any, outputs: Any, needs: Needs) -> None:
        """Keep for the backward pass what it reads: tensors where hooks see them, all else beside them."""
        tensors, kept = [], []
        for value in self._saved.flatten(self.saved(given, outputs, [None] * self.visible, needs))[self.visible :]:
            if isinstance(value, Tensor):
                tensors.append(value)
                kept.append(_SAVED)
            elif type(value) is list:
                tensors += value
                kept.append([_SAVED] * len(value))
            else:
                kept.append(value)
        ctx.save_for_backward(*tensors)
        ctx.kept = kept
        if self._optional_grads or self.visible == 1:  # else zeros are made for every output that has no gradient
            ctx.set_materialize_grads(False)

    def differentiate(
        self, ctx: Any, grads: Sequence[Tensor | None], needs: Needs, passed: Tensor | None = None
    ) -> list[Any]:
        """Gradients by leaf, the first added to what was ``passed``; None where no output had one."""
        flat: list[Any] = [*grads[: self.visible]]
        if all([grad is None for grad in flat]):
            none = [[None] * len(flag) if type(flag) is list else None for flag in self._gradients.flatten(needs)]
            return [passed, *none[1:]]
        tensors = iter(ctx.saved_tensors)
        for item in ctx.kept:
            mine = [next(tensors) for _ in item] if type(item) is list else item
            flat.append(next(tensors) if item is _SAVED else mine)
        saved = self._saved.build(flat)
        if passed is not None:
            saved = saved._replace(passed=passed)
        gradients = self.gradient.finish(self.backward, saved, needs)
        return self._gradients.flatten(gradients)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        output = (output,) if self._single else output
        ctx.mark_non_differentiable(*output[self.visible :])
        # Beside lists of tensors torch takes an empty list of numbers for one of those.
        ctx.without_numbers = [place for place in self._numbers if self._has_lists and not len(inputs[place])]
        # An optional output is a matrix; where it is absent it has come out as an empty vector.
        results = [
            None if leaf.type == "Tensor?" and value.dim() == 1 else value
            for leaf, value in zip(self.outputs.leaves, output, strict=True)
        ]
        (given,) = self.from_boundary(inputs)
        self.save(ctx, given, self.outputs.build(results), self._registered_needs(ctx))

    def _registered_needs(self, ctx: Any) -> Needs:
        flags = (ctx.needs_input_grad[place] for place in self._places)
        return self._gradients.build([flag if isinstance(flag, bool) else list(flag or ()) for flag in flags])

    def _registered_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found: list[Any] = [None] * len(self._inputs.leaves)
        for place, value in zip(self._places, self.differentiate(ctx, grads, self._registered_needs(ctx)), strict=True):
            found[place] = value
        for place in ctx.without_numbers:
            found[place] = []
        return tuple(found)


class _EagerFunction(torch.autograd.Function):
    """A direct call with a gradient: autograd sees the tensors that may get one behind the inputs that hold them.

    Where it passes the first input, that comes out too, in front.
    """

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, given: Any, passes: bool, *differentiable: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs = operation.run(given)
        ctx.operation, ctx.needs = operation, operation.needs(given)
        operation.save(ctx, given, outputs, ctx.needs)
        ctx.mark_non_differentiable(*outputs[operation.visible : operation.shown])
        ctx.passes = passes
        if passes:
            ctx.set_materialize_grads(False)
        return (given[0], *outputs[: operation.shown]) if passes else outputs[: operation.shown]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        passed, grads = (grads[0], grads[1:]) if ctx.passes else (None, grads)
        found: list[Any] = [None, None, None]
        for value in ctx.operation.differentiate(ctx, grads, ctx.needs, passed):
            found += value if type(value) is list else (value,)
        return tuple(found)
