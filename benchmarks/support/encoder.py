"""The transformer stack from embedded tokens, forward and backward, by both backends."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.support import shapes
from benchmarks.support.shapes import Shape, Sizes
from onepeace_fast.models.passes import Encoded, PaddedTokens
from onepeace_fast.models.stack import Stack
from onepeace_fast.tolerance import compare

SIZES = Sizes(width=512, hidden=2048, heads=8, layers=4)
SAMPLES = 8


def inputs(samples: int = SAMPLES) -> dict[str, Shape]:
    """The inputs of the CPU benchmarks."""
    text, image, audio = shapes.text(samples), shapes.image(samples), shapes.audio(samples)
    lengths = (
        {"text": text},
        {"image": image},
        {"audio": audio},
        {"text": text, "image": image},
        {"text": text, "audio": audio},
    )
    return {"+".join(item): Shape("+".join(item), item) for item in lengths}


class EncoderCase:
    """A stack and a batch of embedded tokens; the output's gradient is the same in both backends, zero at padding."""

    def __init__(self, shape: Shape, sizes: Sizes = SIZES) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.shape, self.sizes = shape, sizes
        self.stack = Stack(sizes.config(list(shape.lengths)), None).train()
        with torch.no_grad():
            for adapter in self.stack.adapters.values():
                for bias_table in adapter.rel_pos_table_list:
                    bias_table.weight.normal_(generator=generator)
        self.tokens, self.gradients = {}, {}
        for name, lengths in shape.lengths.items():
            size = (len(lengths), max(lengths), sizes.width)
            valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            x = torch.randn(size, generator=generator).requires_grad_()
            self.tokens[name] = PaddedTokens(x, valid, list(lengths), None, max(lengths))
            self.gradients[name] = torch.randn(size, generator=generator) * valid[..., None]
        self.plan = self.stack.plan(self.tokens)
        self.packed_gradients = self.plan.pack(self.gradients).split(self.plan.row_counts)

    def to(self, dtype: torch.dtype) -> EncoderCase:
        """Round parameters, tokens and gradients to a dtype; returns the case."""
        self.stack.to(dtype)
        self.tokens = {
            name: tokens._replace(x=tokens.x.detach().to(dtype).requires_grad_())
            for name, tokens in self.tokens.items()
        }
        self.gradients = {name: gradient.to(dtype) for name, gradient in self.gradients.items()}
        self.packed_gradients = [gradient.to(dtype) for gradient in self.packed_gradients]
        return self

    def forward(self, backend: str | None) -> Encoded:
        """Encode with a backend, None for the automatic choice; the fused one builds its route plan and packs."""
        self.stack.backend = backend
        (encoded,) = self.stack([self.tokens])
        return encoded

    def forward_alone(self, backend: str | None) -> None:
        """Encode without gradients."""
        with torch.no_grad():
            self.forward(backend)

    def step(self, backend: str | None) -> None:
        """Forward and backward to the tokens, the bias tables and all weights."""
        for tensor in (*self.stack.parameters(), *(tokens.x for tokens in self.tokens.values())):
            tensor.grad = None
        encoded = self.forward(backend)
        if encoded.padded is None:
            torch.autograd.backward(encoded.tensors(), self.packed_gradients)
        else:
            torch.autograd.backward(list(encoded.padded.values()), [self.gradients[name] for name in encoded.padded])

    def results(self, backend: str) -> dict[str, Tensor]:
        """Packed outputs and every gradient of a step, by name."""
        self.step(backend)
        with torch.no_grad():
            encoded = self.forward(backend)
            output = torch.cat(encoded.tensors()) if encoded.padded is None else self.plan.pack(encoded.padded)
        found = {f"gradient of {name} tokens": tokens.x.grad.clone() for name, tokens in self.tokens.items()}
        found |= {
            f"gradient of {name}": parameter.grad.clone()
            for name, parameter in self.stack.named_parameters()
            if parameter.grad is not None
        }
        return {"output": output, **found}

    def check(self, peer: EncoderCase | None = None) -> None:
        """Raise unless the fused backend computes the output and gradients of the reference, its own or a peer's."""
        for name, expected, found in self._beside((peer or self).results("reference")):
            error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
            if not error < 1e-4:
                raise AssertionError(f"the backends differ in the {name}: relative error {error.item():.1e}")

    def check_rounded(self, exact: EncoderCase) -> None:
        """Raise unless the fused backend keeps the tolerance rule; ``exact`` has the same numbers in float64.

        By the RMS error alone: which entry of thousands errs most after several layers is chance.
        """
        truth = exact.results("reference")
        for name, plain, found in self._beside(self.results("reference")):
            for one in compare(found, plain, truth[name]):
                if one.kind == "RMS" and not one.kept:
                    raise AssertionError(
                        f"the backends differ in the {name}: RMS error {one.error:.1e}, allowed {one.allowed:.1e}"
                    )

    def _beside(self, expected: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each name, what is expected and what the fused backend gives."""
        found = self.results("fused")
        if missing := sorted(set(expected) - set(found)):
            raise AssertionError(f"the fused backend gives no {', '.join(missing)}")
        return ((name, value, found[name]) for name, value in expected.items())
