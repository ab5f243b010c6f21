"""A small MiCo with every parameter randomised, and batches for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from models._small import randomise

from onepeace_fast import RoutePlan
from onepeace_fast.models.mico import EvaConfig, Mico, MicoConfig, TextConfig, TextEncoder
from onepeace_fast.models.mico.context import PackedContext

CONTEXT_WIDTH, VOCABULARY = 12, 23
TEXT = TextConfig(
    vocab_size=VOCABULARY, width=CONTEXT_WIDTH, ffn_dim=20, layers=2, heads=3, max_positions=9, mask_id=4, first_word=6
)  # fmt: skip
SIDE = 8
VISION = EvaConfig(image_size=SIDE, patch_size=4, width=16, layers=2, head_width=8, ffn_dim=20, output_dim=6)
CONFIG = MicoConfig(
    vision=VISION, text=TEXT, contra_dim=6, frames={"vision": 3, "audio": 2, "depth": 2, "normal": 2}
)  # fmt: skip
CAPTIONS = torch.tensor([[5, 9, 7, 3, 0], [6, 8, 11, 0, 0], [5, 4, 2, 9, 11], [3, 21, 0, 0, 0]])
SUBTITLES = torch.tensor([[7, 3, 14, 0], [9, 5, 0, 0]])
SAMPLES = {"vision": [2, 0], "audio": [1, 2], "normal": [1], "depth": [0], "subtitle": [2, 3]}


def mico(backend: str | None = "fused", dtype: torch.dtype = torch.float64, **changed: Any) -> Mico:
    """A model in evaluation mode; its temperature makes hard similarities."""
    model = Mico(dataclasses.replace(CONFIG, **changed), backend).to(dtype)
    randomise(model)  # type: ignore[arg-type]
    with torch.no_grad():
        model.contra_temp.fill_(0.3)
        model.vision_encoder.logit_scale.fill_(2.0)
    return model.eval()


def frames(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two videos, two spectrograms of one channel, an image of depth and one of normals: rows of ``SAMPLES``."""
    generator = torch.Generator().manual_seed(6)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "audio": [drawn(3), drawn(1)], "vision": [drawn(2, 3), drawn(4, 3)], "normal": drawn(1, 2, 3),
        "depth": drawn(1, 1, 3),
    }  # fmt: skip


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Four samples with unlike modalities."""
    return {"subtitle": SUBTITLES, "samples": SAMPLES, **frames(dtype)}


def alone(sample: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """One sample of the batch."""
    whole, found = batch(dtype), {}
    for name, samples in SAMPLES.items():
        if sample in samples:
            row = whole[name][samples.index(sample)]
            found[name] = row[row != 0][None] if name == "subtitle" else [row]
    return found


def refusal(call: Callable[[], object]) -> str:
    """The line by which a call is refused; nothing where it is not, so that a comparison fails."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


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


def naive_bert(
    state: Mapping[str, torch.Tensor], ids: torch.Tensor, context: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """BERT over one text [length] without padding, and the tokens that it sees, by Hugging Face's names."""
    import torch.nn.functional as F

    heads, prefix = TEXT.heads, "bert."

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{prefix}{name}.weight"].t() + state[f"{prefix}{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * state[f"{prefix}{name}.weight"] + state[f"{prefix}{name}.bias"]

    def attention(name: str, x: torch.Tensor, seen: torch.Tensor, hidden: bool) -> torch.Tensor:
        q = linear(f"{name}.self.query", x).view(len(x), heads, -1)
        k, v = (linear(f"{name}.self.{part}", seen).view(len(seen), heads, -1) for part in ("key", "value"))
        score = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        if hidden:
            score = score + torch.full_like(score[0], -torch.inf).triu(1)
        attended = torch.einsum("hqk,khd->qhd", score.softmax(-1), v).flatten(1)
        return norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", attended))

    tables = [state[f"bert.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
    x = norm("embeddings.LayerNorm", tables[0][ids] + tables[1][: len(ids)] + tables[2][0])
    for layer in range(TEXT.layers):
        place = f"encoder.layer.{layer}"
        x = attention(f"{place}.attention", x, x, causal)
        if context is not None:
            x = attention(f"{place}.crossattention", x, context, False)
        y = linear(f"{place}.output.dense", F.gelu(linear(f"{place}.intermediate.dense", x)))
        x = norm(f"{place}.output.LayerNorm", x + y)
    return x


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
