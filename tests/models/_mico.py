"""A small MiCo with every parameter randomised, and batches for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from models._small import randomise

from onepeace_fast import RoutePlan
from onepeace_fast.models.mico import TextConfig, TextEncoder
from onepeace_fast.models.mico.context import PackedContext

CONTEXT_WIDTH, VOCABULARY = 12, 23
TEXT = TextConfig(vocab_size=VOCABULARY, width=CONTEXT_WIDTH, ffn_dim=20, layers=2, heads=3, max_positions=9)


def text_encoder(backend: str | None = "fused", dtype: torch.dtype = torch.float64) -> TextEncoder:
    """A text encoder in evaluation mode."""
    model = TextEncoder(TEXT, backend).to(dtype)
    randomise(model)  # type: ignore[arg-type]  # it goes by names
    return model.eval()


def bert(seed: int = 3) -> Any:
    """Hugging Face's BertForMaskedLM of the same sizes, randomised."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=CONTEXT_WIDTH, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=9, is_decoder=True, add_cross_attention=True,
        attn_implementation="eager",
    )  # fmt: skip
    model = BertForMaskedLM(config).double().eval()
    randomise(model, seed)  # type: ignore[arg-type]
    return model


def context_of(
    lengths: Mapping[str, Sequence[int]], samples: Mapping[str, Sequence[int]], only: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> PackedContext:  # fmt: skip
    """A context with random rows, or one sample of it."""
    generator = torch.Generator().manual_seed(4)
    parts, kept_lengths, kept_samples = [], {}, {}
    for name in lengths:
        for length, sample in zip(lengths[name], samples[name], strict=True):
            x = torch.randn(length, CONTEXT_WIDTH, generator=generator, dtype=torch.float64).to(dtype)
            if only in (None, sample):
                parts.append(x)
                kept_lengths.setdefault(name, []).append(length)
                kept_samples.setdefault(name, []).append(sample if only is None else 0)
    return PackedContext(torch.cat(parts).requires_grad_(), RoutePlan.from_lengths(kept_lengths, samples=kept_samples))
