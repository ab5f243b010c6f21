"""One layer of ONE-PEACE: the reference, the reference compiled, and the fused backend."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.support import layer_peers, products
from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import HOW_FUSED_RUNS, MAX_AUTOTUNE, Factory, Variant, compiled, trained
from onepeace_fast.drop_path import Branches, branches
from onepeace_fast.models.passes import PaddedTokens
from onepeace_fast.models.reference import dense_biases
from onepeace_fast.models.stack import Stack
from onepeace_fast.ops.strategies import STRATEGIES
from onepeace_fast.route_plan import RoutePlan

MODEL_LAYERS = 40
DROP_PATH = 0.4
REFERENCE = "reference"  # the only strategy on a CPU


def strategies(device: torch.device) -> list[str]:
    """The strategies of ``routed_ffn`` that a device runs."""
    return [name for name in STRATEGIES if (name == REFERENCE) == (device.type != "cuda")]


class LayerCase:
    """A layer, a batch in both layouts and its bias; the same numbers in every variant."""

    def __init__(self, shape: Shape, sizes: Sizes, device: torch.device, dtype: torch.dtype, sets: int) -> None:
        torch.manual_seed(0)
        self.shape, self.sizes, self.device, self.dtype, self.sets = shape, sizes, device, dtype, sets
        self.stack = Stack(sizes.config(list(shape.lengths)), None).to(device, dtype).train()
        self._fill_parameters()
        self.layer = self.stack.fusion_model.layers[0]
        self.widths = {name: max(lengths) for name, lengths in shape.lengths.items()}
        self.tokens = {}
        for name, lengths in shape.lengths.items():
            valid = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
            empty = torch.zeros(len(lengths), max(lengths), sizes.width, device=device, dtype=dtype)
            ids = shape.position_ids(name)
            ids = None if ids is None else torch.tensor(ids, device=device)
            self.tokens[name] = PaddedTokens(empty, valid, list(lengths), ids, shape.positions[name])
        self.plan = self.stack.plan(self.tokens)
        self.packed = [self._random() for _ in range(sets)]
        self.gradients = [self._random() for _ in range(sets)]
        self.parameters = list(self.layer.parameters())

    def _random(self) -> Tensor:
        return torch.randn(self.shape.real_tokens, self.sizes.width, device=self.device).to(self.dtype)

    def _fill_parameters(self) -> None:
        """Norms, biases and tables as after some training; projections keep their initial deviation."""
        with torch.no_grad():
            for name, parameter in self.stack.named_parameters():
                if "rel_pos_table" in name:
                    parameter.normal_()
                elif parameter.dim() == 1:
                    parameter.add_(0.02 * torch.randn_like(parameter))

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """Each modality's place in the padded sequence."""
        spans, start = [], 0
        for name, width in self.widths.items():
            spans.append((name, start, start + width))
            start += width
        return spans

    def padded(self, packed: Tensor) -> Tensor:
        """Packed rows as the reference's [batch, length, width], padding zero."""
        return torch.cat(list(self.plan.unpack(packed).values()), dim=1)

    def to_rows(self, output: Tensor) -> Tensor:
        """The reference's [length, batch, width] as packed rows."""
        return self.plan.pack({name: output[start:stop].transpose(0, 1) for name, start, stop in self.spans})

    def dense_bias(self) -> Tensor:
        """The reference's bias of the whole batch, minus infinity at padding."""
        padding = ~torch.cat([tokens.valid for tokens in self.tokens.values()], dim=1)
        x = torch.zeros(*padding.shape, self.sizes.width, device=self.device, dtype=self.dtype)
        has_padding = self.shape.padded_tokens > self.shape.real_tokens
        adapters, model = self.stack.adapters, self.stack.fusion_model
        return dense_biases(model, adapters, self.tokens, self.spans, padding if has_padding else None, x)[0]

    def bias_vectors(self) -> list[Tensor]:
        """The packed layout's bias, one vector for each modality."""
        return self.stack.bias(self.shape.positions)[0]

    @property
    def row_ranges(self) -> list[slice]:
        """Each modality's packed rows."""
        ends = [*accumulate(self.plan.row_counts)]
        return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]

    def reference(self, **compile_how: Any) -> Variant:
        """Upstream's layer over the padded batch with its materialised bias."""
        spans, layer = self.spans, self.layer

        def run(x: Tensor, bias: Tensor) -> Tensor:
            return layer(x.transpose(0, 1), spans, bias)

        bias = self.dense_bias().detach().requires_grad_()
        variant = self.padded_variant(torch.compile(run, dynamic=False, **compile_how) if compile_how else run, (bias,))
        variant.slices = self.row_ranges
        return variant

    def padded_variant(self, function: Callable[..., Tensor], bias: tuple[Tensor, ...]) -> Variant:
        """A variant of a function of the padded batch [batch, length, width] that returns [length, batch, width]."""
        sets = [(self.padded(packed).requires_grad_(), *bias) for packed in self.packed]
        gradients = [self.padded(gradient).transpose(0, 1) for gradient in self.gradients]
        variant = trained(function, sets, gradients, self.parameters)
        variant.rows = self.to_rows
        variant.gradient_rows = lambda gradient: self.to_rows(gradient.transpose(0, 1))
        return variant

    def fused(self, drop_path: float = 0.0, strategy: str | None = None) -> Variant:
        """The packed layer; with DropPath it skips that share of the samples.

        Its FFN is computed by the strategy that the library takes itself, or by another.
        """
        route: RoutePlan | Branches = self.plan
        if drop_path:
            dropped = torch.arange(self.plan.sample_count) < round(drop_path * self.plan.sample_count)
            factors = (~dropped).float().expand(1, 2, -1) / (1 - drop_path)
            (route,) = branches(self.plan.with_drop_path(factors))
        vectors = [vector.detach().requires_grad_() for vector in self.bias_vectors()]
        sets = [(packed.clone().requires_grad_(), *vectors) for packed in self.packed]

        layer = self.layer
        if strategy is not None:
            layer = copy.copy(layer)  # over the same parameters
            layer.packed_ffn = functools.partial(layer.packed_ffn, strategy=strategy)

        def run(x: Tensor, *bias: Tensor) -> Tensor:
            return layer(x, route, bias)

        note = HOW_FUSED_RUNS if strategy is None else f"routed_ffn by the strategy {strategy}"
        variant = trained(run, sets, self.gradients, self.parameters, note=note)
        if not drop_path:  # else it computes something else
            variant.rows = variant.gradient_rows = lambda rows: rows
        else:
            variant.parameter_gradients = None
        return variant

    def products(self, joined: bool = False) -> products.BareProducts:
        """The layer's bare products."""
        linears = products.projections(self.shape, self.sizes, joined)
        linears += products.feed_forward(self.shape, self.sizes, joined)
        groups = products.attention(self.shape, self.sizes)
        return products.BareProducts(linears, groups, self.device, self.dtype, self.sets)

    def factories(self) -> dict[str, Factory]:
        """Everything that is measured of a whole layer."""
        joined = "queries, keys and values as one product, gate and value projection as one: a stricter denominator"
        return {
            "products": lambda: self.products().variant(),
            "products_joined": lambda: self.products(joined=True).variant(joined),
            "reference": self.reference,
            "reference_compiled": compiled(lambda: self.reference(mode="default")),
            "reference_max_autotune": compiled(lambda: self.reference(mode=MAX_AUTOTUNE)),
            "boolean_mask": lambda: layer_peers.boolean_mask(self),
            "sliced": lambda: layer_peers.sliced(self),
            "fused": self.fused,
            **{f"strategy_{name}": functools.partial(self.fused, 0.0, name) for name in strategies(self.device)},
            f"fused_drop_path_{DROP_PATH}": lambda: self.fused(DROP_PATH),
        }

    def bias_factories(self) -> dict[str, Factory]:
        """Building the bias once for all layers, and the gradient of its tables, in both layouts."""
        tables = [table.weight for a in self.stack.adapters.values() for table in a.rel_pos_table_list]

        def built(build: Callable[[], Sequence[Tensor]]) -> Factory:
            def factory() -> Variant:
                gradients = [torch.randn_like(tensor) for tensor in build()]
                return Variant(lambda _: build(), lambda _: torch.autograd.grad(build(), tables, gradients))

            return factory

        def dense() -> Sequence[Tensor]:
            return [self.dense_bias()]

        return {"reference": built(dense), "fused": built(self.bias_vectors)}
