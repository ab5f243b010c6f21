"""Attention with a relative position bias alone, at one batch, in every way that users can write it.

Every way gets q, k and v in the layout that it reads best, so that no copy counts but its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.support import shapes
from benchmarks.support.attention_goals import GOALS, GOALS_SHAPE
from benchmarks.support.layer import MODEL_LAYERS, LayerCase
from benchmarks.support.pointwise import Operation
from benchmarks.support.shapes import Shape, Sizes, subset_of
from benchmarks.support.variants import MAX_AUTOTUNE, MODES, Factory, LeftOut, Variant, compiled, trained
from onepeace_fast import cuda_extension, relative_bias_attention
from onepeace_fast.relative_position import CLS_ENTRIES

FLASH = {  # where each version's package has its function
    "flash_attention": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
ALIGNMENT = 8  # elements; a dense bias whose rows begin elsewhere than at multiples is copied first
FOR_SUBSETS = (  # of a batch: a dense bias costs the same whatever the codes
    "reference",
    "reference_no_bias",
    "flex_attention",
    "fused_no_bias",
    "fused_frozen_tables",
    "fused",
)


def full_shapes() -> list[Shape]:
    """The model's sequences; where there are two modalities, the longest samples of both belong together.

    Then subsets of them: visible patches, whose codes run on for one to four tokens, tokens whose codes never do, and
    samples so few that their keys must be split to fill a GPU.
    """
    image = Shape(GOALS_SHAPE, {"image": shapes.image(64)})
    long_image = Shape("16 x 1025", {"image": shapes.image(16, grid=32)})
    return [
        image,
        Shape("64 x up to 72", {"text": shapes.text(64)}),
        Shape("32 x up to 329", {"text": shapes.text(32), "image": shapes.image(32)}),
        Shape("16 x up to 750", {"audio": shapes.audio(16)}),
        Shape("16 x up to 822", {"text": shapes.text(16), "audio": shapes.audio(16, seed=1)}),
        long_image,
        subset_of(image, "64 x 193, 75% visible", 0.75),
        subset_of(image, "64 x 129, 50% visible", 0.5),
        subset_of(image, "64 x 65, 25% visible", 0.25),
        subset_of(image, "64 x 257, shuffled", in_order=False),
        subset_of(long_image, "2 x 1025", samples=2),
    ]


def tiny_shapes() -> list[Shape]:
    """The same kinds of sequences, small enough for a test."""
    image = Shape("3 x 17", {"image": shapes.image(3, grid=4)})
    return [
        image,
        Shape("3 x up to 29", {"text": shapes.text(3, 2, 6), "audio": shapes.audio(3, 5, 20, seed=1)}),
        subset_of(image, "3 x 9, 50% visible", 0.5),
        subset_of(image, "2 x 17, shuffled", samples=2, in_order=False),
    ]


class AttentionCase:
    """q, k and v of a batch in both layouts, gradients of the output, and the bias in both forms."""

    def __init__(
        self, shape: Shape, sizes: Sizes, device: torch.device, dtype: torch.dtype, sets: int,
        layers: int = MODEL_LAYERS,
    ) -> None:  # fmt: skip
        side = math.isqrt(shape.positions.get("image", 1) - 1)
        sizes = replace(sizes, hidden=sizes.width, grid=max(sizes.grid, side))
        self.shape, self.device, self.heads, self.layers = shape, device, sizes.heads, layers
        self.layer = LayerCase(shape, sizes, device, dtype, sets=1)
        self.plan = self.layer.plan
        self.tables = [t.weight for a in self.layer.stack.adapters.values() for t in a.rel_pos_table_list]
        self.vectors = [vector.detach() for vector in self.layer.bias_vectors()]
        size = (shape.real_tokens, sizes.heads, sizes.width // sizes.heads)
        self.qkv = [torch.randn(size[0], 3, *size[1:], device=device).to(dtype) for _ in range(sets)]
        self.gradients = [torch.randn(size, device=device).to(dtype) for _ in range(sets)]

    def operation(self) -> Operation:
        """All variants, and what must move: q, k, v and the output forward; these and all their gradients backward."""
        matrix = self.qkv[0].nbytes // 3
        operation = Operation(self.factories(), forward_bytes=4 * matrix, backward_bytes=8 * matrix)
        operation.goal = round(1 / GOALS["backward"]["over_floor"], 3)
        return operation

    def factories(self) -> dict[str, Factory]:
        """The reference first: it is what outputs and gradients are compared with."""
        factories = {
            "reference": lambda: self.reference(bias=True),
            "reference_no_bias": lambda: self.reference(bias=False),
            "reference_compiled": compiled(lambda: self.reference(bias=True, mode="default")),
            "reference_max_autotune": compiled(lambda: self.reference(bias=True, mode=MAX_AUTOTUNE)),
            "bias_built_sdpa_memory_efficient": lambda: self.sdpa(SDPBackend.EFFICIENT_ATTENTION, build=True),
            "sdpa_memory_efficient": lambda: self.sdpa(SDPBackend.EFFICIENT_ATTENTION),
            "sdpa_cudnn": lambda: self.sdpa(SDPBackend.CUDNN_ATTENTION, frozen=True),
            "xformers": self.xformers,
            "flex_attention": compiled(lambda: self.flex_attention()),
            **{f"{name}_no_bias": functools.partial(self.flash_attention, module) for name, module in FLASH.items()},
            "all_layers_sdpa_memory_efficient": self.all_layers_sdpa,
            "fused_no_bias": lambda: self.fused(bias=False),
            "fused_frozen_tables": lambda: self.fused(bias=True, frozen=True),
            "fused": lambda: self.fused(bias=True),
            "all_layers_fused": self.all_layers_fused,
        }
        return {name: factories[name] for name in FOR_SUBSETS} if self.shape.subset_of else factories

    def fused(self, bias: bool, frozen: bool = False) -> Variant:
        """The library's operation on packed rows; the note counts what it launched of the CUDA extension."""
        variant = self._operation(bias, frozen)
        launches = [cuda_extension.launched()]
        for mode in MODES:
            getattr(variant, mode)(0)
            launches.append(cuda_extension.launched())
        forward, both = (after - before for before, after in pairwise(launches))
        variant.note = f"launches of the CUDA extension: {forward} forward, {both} forward and backward"
        return variant

    def reference(self, bias: bool, **compile_how: Any) -> Variant:
        """Upstream's way in plain PyTorch: products, softmax in float32 and a dense bias that is given."""

        def run(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)) + given
            wide = torch.promote_types(torch.float32, scores.dtype)
            return torch.matmul(F.softmax(scores, dim=-1, dtype=wide).type_as(v), v).transpose(1, 2)

        dense = self.layer.dense_bias().detach()
        if not bias:
            dense = torch.zeros_like(dense).masked_fill(dense == -torch.inf, -torch.inf)
        function = torch.compile(run, dynamic=False, **compile_how) if compile_how else run
        variant = self._padded(function, (self.aligned(dense).requires_grad_(bias),))
        variant.against = "reference" if bias else "reference_no_bias"
        heads = [(slice(None), h) for h in range(self.heads)]
        variant.slices = [*self.layer.row_ranges, *heads]
        return variant

    def _operation(self, bias: bool, frozen: bool = False) -> Variant:
        vectors = [vector.clone().requires_grad_(not frozen) for vector in self.vectors if bias]
        sets = [(qkv.clone().requires_grad_(), *vectors) for qkv in self.qkv]
        return self._packed(trained(self._attend, sets, self.gradients, []), bias)

    def _attend(self, qkv: Tensor, *vectors: Tensor) -> Tensor:
        plan = self.plan
        return relative_bias_attention(
            qkv, cu_seqlens=plan.cu_seqlens, modality=plan.modality, code=plan.code, is_cls=plan.is_cls, bias=vectors,
            code_offsets=plan.code_offsets if vectors else (), max_length=max(self.shape.sample_lengths),
        )  # fmt: skip

    def all_layers_fused(self) -> Variant:
        """The attention of a step's layers over vectors that are expanded from the tables once."""
        sets = [(qkv,) for qkv in self.qkv]
        variant = self._all_layers(self._attend, self.layer.bias_vectors, sets, self.gradients)
        self._packed(variant, bias=True).rows = lambda outputs: outputs[0]
        return variant

    def all_layers_sdpa(self) -> Variant:
        """Upstream's way: a dense bias built once, PyTorch's attention in every layer, dense gradients added up."""

        def build() -> list[Tensor]:
            return [self.aligned(self.layer.dense_bias())]

        sets = [tuple(self._pad(x) for x in qkv.unbind(1)) for qkv in self.qkv]
        gradients = [self._pad(gradient) for gradient in self.gradients]
        attend = functools.partial(self._sdpa, SDPBackend.EFFICIENT_ATTENTION)
        variant = self._all_layers(attend, build, sets, gradients)
        self._unpadded(variant).rows = lambda outputs: self._rows(outputs[0])
        return variant

    def _all_layers(
        self, attend: Callable[..., Tensor], build: Callable[[], Sequence[Tensor]], sets: Sequence[tuple[Tensor, ...]],
        gradients: Sequence[Tensor],
    ) -> Variant:  # fmt: skip
        """The attention of every layer over one bias, whose gradients are added up and go to the tables once."""

        def run(index: int) -> tuple[list[Tensor], list[Tensor]]:
            layers = [sets[i % len(sets)] for i in range(index, index + self.layers)]
            inputs = [[x.detach().requires_grad_() for x in layer] for layer in layers]  # a gradient for each layer
            bias = build()
            return [x for layer in inputs for x in layer], [attend(*layer, *bias) for layer in inputs]

        def forward_backward(index: int) -> tuple[Tensor, ...]:
            inputs, outputs = run(index)
            given = [gradients[i % len(sets)] for i in range(index, index + self.layers)]
            return torch.autograd.grad(outputs, [*inputs, *self.tables], given)

        note = f"{self.layers} layers over one bias from its tables, with the sum of its gradients; times are of one"
        return Variant(lambda index: run(index)[1], forward_backward, repeats=self.layers, note=note)

    def sdpa(self, backend: SDPBackend, build: bool = False, frozen: bool = False) -> Variant:
        """PyTorch's attention with a dense bias, which is given or ``build`` as upstream does from its tables."""
        cuda = self.device.type == "cuda"
        if backend is SDPBackend.CUDNN_ATTENTION and not cuda:
            raise LeftOut("cuDNN needs a CUDA device")

        def run(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
            (bias,) = given or [self.layer.dense_bias()]
            return self._sdpa(backend, q, k, v, bias)

        given = () if build else (self.aligned(self.layer.dense_bias().detach()).requires_grad_(not frozen),)
        variant = self._padded(run, given, self.tables if build else ())
        variant.note = "the bias is frozen: cuDNN has no gradient of it" if frozen else ""
        if not cuda:
            variant.note = "by the backend that PyTorch takes on a CPU"
        return variant

    def _sdpa(self, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend) if self.device.type == "cuda" else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    def xformers(self) -> Variant:
        """xformers' attention, which upstream takes where it is installed, with a dense bias that is given."""
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
        bias = self.aligned(self.layer.dense_bias().detach()).requires_grad_()
        return self._padded(lambda q, k, v, bias: attention(q, k, v, attn_bias=bias), (bias,))

    def flex_attention(self, compile_it: bool = True) -> Variant:
        """FlexAttention over the padded batch; its score function reads the bias vectors by the tokens' codes."""
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        code, is_cls, equal, cls, modality, valid = self._padded_tokens()
        samples, length = code.shape
        block_mask = None
        if not valid.all():
            size = (samples, None, length, length)
            block_mask = flex.create_block_mask(lambda b, h, i, j: valid[b, j], *size, device=code.device)

        def run(q: Tensor, k: Tensor, v: Tensor, *vectors: Tensor) -> Tensor:
            entries = torch.cat([*vectors, vectors[0].new_zeros(self.heads, 1)], dim=1)

            def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                entry = code[b, i] - code[b, j] + equal[b, i]
                entry = torch.where(is_cls[b, j], cls[b, i] + 1, entry)
                entry = torch.where(is_cls[b, i], torch.where(is_cls[b, j], cls[b, i] + 2, cls[b, i]), entry)
                entry = torch.where(modality[b, i] == modality[b, j], entry, entries.shape[1] - 1)
                return score + entries[h, entry]

            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return flex.flex_attention(q, k, v, score_mod=score, block_mask=block_mask).transpose(1, 2)

        vectors = tuple(vector.clone().requires_grad_() for vector in self.vectors)
        variant = self._padded(torch.compile(run, dynamic=False) if compile_it else run, vectors)
        if compile_it and self.device.type == "cpu":  # torch has no backward pass of it there
            variant.forward, variant.forward_backward = torch.no_grad()(variant.forward), None
            variant.note = "forward alone, which keeps nothing for a backward pass: torch has none on a CPU"
        return variant

    def flash_attention(self, module: str) -> Variant:
        """flash-attn over packed samples: it takes no such bias, so it shows what attention alone costs."""
        attention = importlib.import_module(module).flash_attn_varlen_func
        order = torch.argsort(self.plan.sample, stable=True)
        back = torch.argsort(order)
        lengths = torch.tensor([0, *self.shape.sample_lengths])
        bounds = lengths.cumsum(0).to(device=self.device, dtype=torch.int32)
        longest = max(self.shape.sample_lengths)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attention(
                q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest
            )
            return out[0] if isinstance(out, tuple) else out  # later ones may return the row sums' logarithms too

        sets = [tuple(x[order].requires_grad_() for x in qkv.unbind(1)) for qkv in self.qkv]
        gradients = [gradient[order] for gradient in self.gradients]
        variant = trained(run, sets, gradients, [])
        variant.rows = variant.gradient_rows = lambda rows: rows[back]
        variant.gradients_compared = 3
        return self._described(variant, bias=False)

    @staticmethod
    def aligned(bias: Tensor) -> Tensor:
        """A dense bias as a view of wider rows, for what would otherwise copy it on every call."""
        length = bias.shape[-1]
        return F.pad(bias, (0, -length % ALIGNMENT))[..., :length]

    def _padded(self, function: Callable[..., Tensor], bias: tuple[Tensor, ...], parameters: Any = ()) -> Variant:
        """A variant of a function of q, k, v [batch, length, heads, head_dim] and a bias in whatever form."""
        sets = [(*(self._pad(x).requires_grad_() for x in qkv.unbind(1)), *bias) for qkv in self.qkv]
        gradients = [self._pad(gradient) for gradient in self.gradients]
        return self._unpadded(trained(function, sets, gradients, list(parameters)))

    def _unpadded(self, variant: Variant) -> Variant:
        """Of padded q, k and v: how its output and gradients are brought into packed order."""
        variant.rows = variant.gradient_rows = self._rows
        variant.gradients_compared = 3
        return self._described(variant, bias=True)

    def _packed(self, variant: Variant, bias: bool) -> Variant:
        """Of packed qkv: the same."""
        variant.rows = lambda out: out
        variant.gradient_rows = lambda gradient: gradient.unbind(1)
        return self._described(variant, bias)

    def _pad(self, rows: Tensor) -> Tensor:
        return self.layer.padded(rows.flatten(1)).unflatten(-1, rows.shape[1:])

    def _rows(self, padded: Tensor) -> Tensor:
        return self.layer.to_rows(padded.flatten(2).transpose(0, 1)).unflatten(-1, padded.shape[2:])

    def _padded_tokens(self) -> tuple[Tensor, ...]:
        """Of each padded place: code, CLS, entries of equal codes and of CLS, modality (-1: none), if it is real."""
        plan, starts = self.plan, [0]
        for vector in self.vectors:
            starts.append(starts[-1] + vector.shape[1])
        equal = torch.tensor([start + offset for start, offset in zip(starts[:-1], plan.code_offsets, strict=True)])
        cls = torch.tensor([stop - CLS_ENTRIES for stop in starts[1:]])
        m = plan.modality.long()
        columns = (plan.code, plan.is_cls, equal.to(self.device)[m], cls.to(self.device)[m], m + 1)
        padded = (self._pad(column.long()[:, None, None])[..., 0, 0].int() for column in columns)
        code, is_cls, equal, cls, after = padded
        return code, is_cls.bool(), equal, cls, after - 1, after > 0

    def _described(self, variant: Variant, bias: bool) -> Variant:
        variant.against = "reference" if bias else "reference_no_bias"
        variant.parameter_gradients = None  # the bias has another form in each way
        return variant
