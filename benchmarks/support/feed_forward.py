"""The routed FFN alone, without the norm before it and the residual after it, in every way that users write it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support import feed_forward_peers, products
from benchmarks.support.layer import LayerCase, strategies
from benchmarks.support.routed_rows import RoutedRows
from benchmarks.support.variants import HOW_FUSED_RUNS, MAX_AUTOTUNE, Factory, LeftOut, Variant, compiled, trained

ALIGNMENT = 16
Function = Callable[[Tensor], Tensor]


def _compiled(function: Function, how: Mapping[str, Any]) -> Function:
    return torch.compile(function, dynamic=False, **how) if how else function


class FeedForwardCase:
    """The FFNs of a layer's modalities over the packed tokens of its batch."""

    def __init__(self, case: LayerCase | RoutedRows) -> None:
        self.case, self.layer, self.plan = case, case.layer, case.plan
        self.names, self.counts = list(case.shape.lengths), list(self.plan.row_counts)
        self.experts = [self.layer.ffn(name) for name in self.names]
        self.parameters = [parameter for expert in self.experts for parameter in expert.parameters()]

    def _variant(self, function: Function, order: Tensor | None = None) -> Variant:
        """A variant over the packed rows, or over the rows in another order."""
        sets = self.case.packed if order is None else [x[order] for x in self.case.packed]
        gradients = self.case.gradients if order is None else [x[order] for x in self.case.gradients]
        back = None if order is None else order.argsort()
        variant = trained(
            function,
            [(x.clone().requires_grad_(),) for x in sets],
            gradients,
            self.parameters,
        )
        variant.rows = variant.gradient_rows = (lambda rows: rows) if back is None else (lambda rows: rows[back])
        ends = [*accumulate(self.counts)]
        variant.slices = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
        return variant

    def sliced(self, **compile_how: Any) -> Variant:
        """Contiguous slices by modality, each through its own modules, and a concatenation."""
        experts, counts = self.experts, self.counts

        def run(z: Tensor) -> Tensor:
            return torch.cat([expert(rows) for expert, rows in zip(experts, z.split(counts), strict=True)])

        return self._variant(_compiled(run, compile_how))

    def padded(self) -> Variant:
        """Upstream's way: every modality's rows padded to its longest sample, each span through its own modules."""
        if not isinstance(self.case, LayerCase):
            raise LeftOut("one sample has no padding")
        case, experts = self.case, self.experts

        def run(z: Tensor) -> Tensor:
            parts = (z[:, start:stop] for _, start, stop in case.spans)
            return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)], dim=1)

        def rows(padded: Tensor) -> Tensor:
            return case.to_rows(padded.transpose(0, 1))

        sets = [(case.padded(x).requires_grad_(),) for x in case.packed]
        variant = trained(run, sets, [case.padded(x) for x in case.gradients], self.parameters)
        variant.rows = variant.gradient_rows = rows
        return variant

    def boolean_mask(self, **compile_how: Any) -> Variant:
        """Tokens sample by sample, chosen by one boolean mask for each modality and written back by it."""
        order = torch.argsort(self.plan.sample, stable=True)
        masks = [self.plan.modality[order] == group for group in range(len(self.names))]
        experts = self.experts

        def run(z: Tensor) -> Tensor:
            y = torch.empty_like(z)
            for expert, mask in zip(experts, masks, strict=True):
                y[mask] = expert(z[mask])
            return y

        return self._variant(_compiled(run, compile_how), order)

    def grouped(self, **compile_how: Any) -> Variant:
        """PyTorch's grouped product over stacked weights.

        Its rows are padded to a multiple of 16 for each modality, which every version of the operation takes.
        """
        grouped_product = getattr(F, "grouped_mm", None) or torch._grouped_mm
        device = self.case.device
        padded = [-(-count // ALIGNMENT) * ALIGNMENT for count in self.counts]
        ends = torch.tensor(padded, device=device).cumsum(0).to(torch.int32)
        starts = [0, *ends.tolist()[:-1]]
        places = [torch.arange(s, s + n, device=device) for s, n in zip(starts, self.counts, strict=True)]
        rows = torch.cat(places)
        w0, w1, norm_weight, norm_bias, w2, b2 = (
            torch.stack([parameter.detach() for parameter in group]).requires_grad_()
            for group in zip(*(expert.parameters() for expert in self.experts), strict=True)
        )
        hidden, eps = w0.shape[1], self.experts[0][2].eps

        def run(z: Tensor) -> Tensor:
            u, v = (grouped_product(z, w.transpose(-2, -1), offs=ends) for w in (w0, w1))
            h = (F.gelu(u) * v).split(padded)
            n = [F.layer_norm(rows, (hidden,), norm_weight[m], norm_bias[m], eps) for m, rows in enumerate(h)]
            y = grouped_product(torch.cat(n), w2.transpose(-2, -1), offs=ends).split(padded)
            return torch.cat([rows + b2[m] for m, rows in enumerate(y)])

        def spaced(x: Tensor) -> Tensor:
            return x.new_zeros(sum(padded), x.shape[1]).index_copy(0, rows, x)

        return trained(
            _compiled(run, compile_how),
            [(spaced(x).requires_grad_(),) for x in self.case.packed],
            [spaced(x) for x in self.case.gradients],
            [w0, w1, norm_weight, norm_bias, w2, b2],
            parameter_gradients=lambda found: [stacked[m] for m in range(len(self.experts)) for stacked in found],
            rows=lambda y: y[rows],
            gradient_rows=lambda gradient: gradient[rows],
            note=f"weights stacked once beforehand, rows padded to multiples of {ALIGNMENT} for each modality",
        )

    def fused(self, strategy: str | None = None) -> Variant:
        """The library's op, by the strategy that it takes itself or by another."""
        variant = self._variant(lambda z: self.layer.packed_ffn(z, self.plan, strategy=strategy))
        variant.note = HOW_FUSED_RUNS if strategy is None else ""
        return variant

    def products(self, joined: bool = False) -> Variant:
        """The FFN's bare products."""
        linears = products.feed_forward(self.case.shape, self.case.sizes, joined)
        return products.BareProducts(linears, [], self.case.device, self.case.dtype, self.case.sets).variant()

    def factories(self) -> dict[str, Factory]:
        """Everything that is measured of the routed FFN."""
        eager = {"sliced": self.sliced, "boolean_mask": self.boolean_mask, "grouped_mm": self.grouped}
        return {
            "products": self.products,
            "products_joined": lambda: self.products(joined=True),
            **eager,
            **{f"{n}_compiled": compiled(functools.partial(make, mode="default")) for n, make in eager.items()},
            "sliced_max_autotune": compiled(lambda: self.sliced(mode=MAX_AUTOTUNE)),
            "padded": self.padded,
            **{name: functools.partial(make, self) for name, make in feed_forward_peers.PEERS.items()},
            "fused": self.fused,
            **{f"strategy_{name}": functools.partial(self.fused, name) for name in strategies(self.case.device)},
        }
