"""A model of a comparison: how it is run on the batch, and where its gradients go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onepeace_fast.checks import describe, require
from onepeace_fast.differences import UNNAMED, Gradient, named_tensors
from onepeace_fast.models.parameter_names import upstream_names

SEED = 0


class ComparedModel:
    """A callable with its arguments. Its calls take the number of a round, and run on the same inputs in each."""

    def __init__(
        self, name: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any],
        inputs: dict[str, Tensor], loss: Callable[[Any], Tensor] | None,
    ) -> None:  # fmt: skip
        require(callable(model), lambda: f"{name}: expected a module or another callable, got {describe(model)}")
        for key, tensor in inputs.items():
            require(
                tensor.is_leaf,
                f"input {key}: expected a tensor without a graph, got the result of an operation with a gradient; "
                "use its .detach().requires_grad_()",
            )
        self.name, self.model, self.args, self.kwargs, self.inputs, self.loss = name, model, args, kwargs, inputs, loss
        owner = getattr(model, "__self__", model)  # of a bound method
        self.module = owner if isinstance(owner, nn.Module) else None
        self.own: dict[str, Tensor] = {} if self.module is None else dict(upstream_names(self.module))
        self.leaves: list[Tensor] = []  # all to which the backward pass gives a gradient
        self.cotangents: dict[str, Tensor] = {}
        self.devices = {tensor.device for tensor in (*inputs.values(), *self.own.values())}

    def run(self) -> Any:
        """The output with its graph."""
        with torch.enable_grad():
            return self.model(*self.args, **self.kwargs)

    def forward(self, _: int = 0) -> Any:
        """The output without a graph."""
        with torch.no_grad():
            return self.model(*self.args, **self.kwargs)

    def both(self, _: int = 0) -> tuple[Tensor | None, ...]:
        """Forward and backward pass: the gradients of ``leaves``."""
        roots, weights = self._roots(self.run())
        return torch.autograd.grad(roots, self.leaves, weights, allow_unused=True)

    def first_run(self, with_graph: bool) -> tuple[Any, dict[str, Tensor]]:
        """The output, and its tensors by name; refuses a model that changes its inputs."""
        versions = {key: tensor._version for key, tensor in self.inputs.items() if not tensor.is_inference()}
        output = self.run() if with_graph else self.forward()
        for key, version in versions.items():
            require(
                self.inputs[key]._version == version,
                f"{self.name}: expected a model that keeps its inputs, got one that changes {key} in place; "
                "compare a function that clones it",
            )
        # A model may reuse its own.
        found = {key: tensor.detach().clone() for key, tensor in named_tensors(output).items()}
        require(bool(found), lambda: f"{self.name}: expected a tensor in the output, got {describe(output)}")
        self.devices |= {tensor.device for tensor in found.values()}
        return output, found

    def gradients(self, output: Any) -> list[Gradient]:
        """The gradients of parameters, of inputs and of what else the pass reaches; zeros where it does not reach one.

        Finds ``leaves`` and draws the cotangents of the outputs, the same for any model and dtype.
        """
        generator = torch.Generator().manual_seed(SEED)
        # By name: models may give the same outputs in another order.
        for key, tensor in sorted(named_tensors(output).items()) if self.loss is None else ():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
            drawn = drawn.bfloat16()  # of which wider dtypes have each value
            if tensor.requires_grad:
                self.cotangents[key] = drawn.to(tensor.device, tensor.dtype)
        roots, weights = self._roots(output)
        require(
            bool(roots) and all(root.requires_grad for root in roots),
            lambda: (
                f"{self.name}: expected an output that needs a gradient, got none; let parameters or inputs "
                "require one, or give backward=False"
            ),
        )
        self.leaves = _leaves(roots)
        self.devices |= {leaf.device for leaf in self.leaves}
        found = torch.autograd.grad(roots, self.leaves, weights, allow_unused=True)
        by_leaf = {id(leaf): gradient for leaf, gradient in zip(self.leaves, found, strict=True)}
        named = self.own | {f"input {key}": tensor for key, tensor in self.inputs.items()}
        known = {id(leaf) for leaf in named.values()}
        others = [leaf for leaf in self.leaves if id(leaf) not in known]
        named |= {f"{UNNAMED}{number} {list(leaf.shape)}": leaf for number, leaf in enumerate(others, 1)}
        return [
            Gradient(key, leaf, torch.zeros_like(leaf) if (value := by_leaf.get(id(leaf))) is None else value)
            for key, leaf in named.items()
            if leaf.requires_grad
        ]

    @property
    def parameters(self) -> list[Tensor]:
        """What the model has besides its inputs."""
        inputs = {id(tensor) for tensor in self.inputs.values()}
        return [*self.own.values(), *(leaf for leaf in self.leaves if id(leaf) not in inputs)]

    def _roots(self, output: Any) -> tuple[list[Tensor], list[Tensor] | None]:
        """Where the backward pass begins, and the weights there."""
        if self.loss is None:
            found = named_tensors(output)
            return [found[key] for key in self.cotangents], list(self.cotangents.values())
        with torch.enable_grad():
            loss = self.loss(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss: expected a function that returns a tensor of one entry, got {describe(loss)}")
        return [loss], None


@contextlib.contextmanager
def unchanged(*models: ComparedModel) -> Iterator[None]:
    """Puts back torch's random state and the models' buffers: what they hold, and those of a state dict themselves."""
    modules = [inner for model in models if model.module is not None for inner in model.module.modules()]
    tensors = {id(buffer): buffer for module in modules for buffer in module._buffers.values() if buffer is not None}
    # By ``data``: a graph that the user holds does not take its own buffers for changed ones.
    held = [(buffer, buffer.data, buffer.detach().clone()) for buffer in tensors.values() if _holds_values(buffer)]
    # Another buffer that a model replaces is a table of its own making, which its other attributes may count on.
    states = [
        {name: one for name, one in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for module in modules
    ]
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        try:
            yield
        finally:
            for buffer, data, values in held:
                buffer.data = data.copy_(values)
            for module, state in zip(modules, states, strict=True):
                module._buffers.update(state)


def _holds_values(buffer: Tensor) -> bool:
    """Whether a buffer has values that a model can write over: not before a lazy module's first call, nor expanded."""
    return not is_lazy(buffer) and not (buffer.layout is torch.strided and 0 in buffer.stride())


def _leaves(roots: list[Tensor]) -> list[Tensor]:
    """What a backward pass would give a gradient to, whether a module has it or a function closes over it."""
    found = {id(root): root for root in roots if root.is_leaf}
    todo: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = dict.fromkeys(todo)  # in an order that every run has
    while todo:
        node = todo.pop()
        if node.name().endswith("AccumulateGrad"):
            found[id(node.variable)] = node.variable
        new = dict.fromkeys(n for n, _ in node.next_functions if n is not None and n not in seen)
        seen |= new
        todo += new
    return list(found.values())
