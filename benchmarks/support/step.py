"""A training step of a stack from embedded tokens to every gradient, by both backends and as others route it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.support import products
from benchmarks.support.boolean_masks import route_by_masks
from benchmarks.support.checked import wide_dtype
from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import HOW_FUSED_RUNS, MAX_AUTOTUNE, OURS, Factory, Variant, compiled
from onepeace_fast.models.passes import Encoded, PaddedTokens
from onepeace_fast.models.stack import Stack


class StepCase:
    """A stack and sets of embedded tokens with gradients of its output, zero at padding; the same numbers for all."""

    def __init__(self, shape: Shape, sizes: Sizes, device: torch.device, dtype: torch.dtype, sets: int) -> None:
        torch.manual_seed(0)
        self.shape, self.sizes, self.device, self.dtype, self.sets = shape, sizes, device, dtype, sets
        self.stack = Stack(sizes.config(list(shape.lengths)), None).to(device, dtype).train()
        with torch.no_grad():
            for adapter in self.stack.adapters.values():
                for table in adapter.rel_pos_table_list:
                    table.weight.normal_()
        self.valid = {
            name: torch.arange(max(row), device=device) < torch.tensor(row, device=device)[:, None]
            for name, row in shape.lengths.items()
        }
        self.inputs, self.gradients = ([self._random() for _ in range(sets)] for _ in range(2))
        self.plan = self.stack.plan(self._tokens(self.inputs[0]))
        self.used = [p is not None for p in self._gradients(self.stack, "reference", 0)[1][len(shape.lengths) :]]

    def _random(self) -> dict[str, Tensor]:
        width = self.sizes.width
        return {n: torch.randn(*valid.shape, width).to(self.device, self.dtype) for n, valid in self.valid.items()}

    def _tokens(self, inputs: dict[str, Tensor]) -> dict[str, PaddedTokens]:
        rows = self.shape.lengths
        return {n: PaddedTokens(x, self.valid[n], list(rows[n]), None, max(rows[n])) for n, x in inputs.items()}

    def _encode(
        self, stack: Stack, backend: str | None, index: int, dtype: torch.dtype
    ) -> tuple[list[Tensor], Encoded]:
        inputs = {n: x.detach().to(dtype).requires_grad_() for n, x in self.inputs[index % self.sets].items()}
        stack.backend = backend
        (encoded,) = stack([self._tokens(inputs)])
        return list(inputs.values()), encoded

    def _gradients(
        self, stack: Stack, backend: str | None, index: int, dtype: torch.dtype | None = None
    ) -> tuple[Encoded, tuple[Tensor | None, ...]]:
        """A step: what comes out, and the gradients of the tokens and of every parameter."""
        inputs, encoded = self._encode(stack, backend, index, dtype or self.dtype)
        given = {
            n: g.to(dtype or self.dtype).masked_fill(~self.valid[n][..., None], 0)
            for n, g in self.gradients[index % self.sets].items()
        }
        if encoded.padded is None:
            outputs, given_rows = encoded.tensors(), self.plan.pack(given).split(self.plan.row_counts)
        else:
            outputs, given_rows = list(encoded.padded.values()), [given[name] for name in encoded.padded]
        wanted = [*inputs, *stack.parameters()]
        return encoded, torch.autograd.grad(outputs, wanted, given_rows, allow_unused=True)

    def rows(self, encoded: Encoded) -> Tensor:
        """What a step encodes, as packed rows."""
        return torch.cat(encoded.tensors()) if encoded.padded is None else self.plan.pack(encoded.padded)

    def variant(self, backend: str | None, stack: Stack | None = None, note: str = "") -> Variant:
        """A step of a stack with the same numbers as the case's."""
        stack = self.stack if stack is None else stack
        count = len(self.shape.lengths)

        def used(found: Sequence[Any]) -> list[Tensor]:
            return [gradient for gradient, is_used in zip(found, self.used, strict=True) if is_used]

        def exact() -> tuple[Encoded, tuple[Tensor | None, ...]]:
            wide = wide_dtype(self.device)
            return self._gradients(copy.deepcopy(self.stack).to(wide), "reference", 0, wide)

        return Variant(
            lambda index: self._encode(stack, backend, index, self.dtype)[1],
            lambda index: self._gradients(stack, backend, index)[1],
            rows=self.rows, gradient_rows=lambda gradient: gradient, parameter_gradients=used, exact=exact,
            inputs=count, gradients_compared=count, sets=self.sets, note=note,
        )  # fmt: skip

    def compiled(self, **how: Any) -> Variant:
        """The reference whose layers torch.compile compiles."""
        stack = copy.deepcopy(self.stack)
        for layer in stack.fusion_model.layers:
            layer.compile(**how)
        return self.variant("reference", stack)

    def boolean_mask(self) -> Variant:
        """The reference whose tokens choose FFN and final norm by masks."""
        stack = copy.deepcopy(self.stack)
        route_by_masks(stack, self.shape, self.device)
        return self.variant("reference", stack)

    def products(self) -> Variant:
        """The bare products of every layer's packed rows."""
        linears = products.projections(self.shape, self.sizes) + products.feed_forward(self.shape, self.sizes)
        groups = products.attention(self.shape, self.sizes)
        bare = products.BareProducts(linears, groups, self.device, self.dtype, max(self.sets, self.sizes.layers))
        return Variant(
            lambda index: [bare.forward(index + i) for i in range(self.sizes.layers)],
            lambda index: [bare.forward_backward(index + i) for i in range(self.sizes.layers)],
            sets=self.sets,
        )

    def factories(self) -> dict[str, Factory]:
        """Everything that is measured of a step."""
        return {
            "products": self.products,
            "reference": lambda: self.variant("reference"),
            "reference_compiled": compiled(lambda: self.compiled(mode="default")),
            "reference_max_autotune": compiled(lambda: self.compiled(mode=MAX_AUTOTUNE)),
            "boolean_mask": self.boolean_mask,
            OURS: lambda: self.variant("fused", note=HOW_FUSED_RUNS),
            "automatic": lambda: self.variant(None, note="the backend that the library chooses itself"),
        }
