"""ONE-PEACE with a classification head: attention pooling, pooler and classifier, also of pairs of images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.config import ClassifyConfig
from onepeace_fast.layers.adapters import Adapter, ImageAdapter
from onepeace_fast.layers.parameters import init_linear, init_truncated_normal, with_unread
from onepeace_fast.models.base import OnePeaceEncoder
from onepeace_fast.models.inputs import Batch, read_batch
from onepeace_fast.models.passes import Tokens


class AttentionPooling(nn.Module):
    """One learned query for each head over the tokens of a sequence (no scale, as upstream's)."""

    def __init__(self, embed_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = init_linear(nn.Linear(embed_dim, embed_dim, bias=False))
        self.v_proj = init_linear(nn.Linear(embed_dim, embed_dim))
        self.out_proj = init_linear(nn.Linear(embed_dim, embed_dim))
        self.q = nn.Parameter(init_truncated_normal(torch.empty(1, 1, heads, embed_dim // heads)))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """[batch, length, dim] to [batch, dim]; ``valid`` bool [batch, length] is True at one token at least."""
        k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.k_proj, self.v_proj))
        scores = torch.einsum("hd,blhd->bhl", self.q[0, 0], k).masked_fill(~valid[:, None], float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(v.dtype)
        return self.out_proj(torch.einsum("bhl,blhd->bhd", weights, v).flatten(1))


class ClassifyHead(nn.Module):
    """Pools the tokens of each sequence and classifies what it pools, of a pair side by side."""

    def __init__(self, config: ClassifyConfig) -> None:
        super().__init__()
        dim, heads = config.encoder.embed_dim, config.encoder.attention_heads
        self.norm = nn.LayerNorm(dim)  # upstream has it without attention pooling too, and then does not read it
        self.attn_pooling_func = AttentionPooling(dim, heads) if config.attention_pooling else None
        dropout = config.pooler_dropout
        self.pooler = (
            nn.Sequential(nn.Dropout(dropout), init_linear(nn.Linear(dim, dim)), nn.Tanh(), nn.Dropout(dropout))
            if config.pooler
            else None
        )
        self.classifier = nn.Sequential(
            init_linear(nn.Linear(2 * dim if config.two_images else dim, config.head_width)),
            nn.LayerNorm(config.head_width),
            nn.GELU(),
            init_linear(nn.Linear(config.head_width, config.classes)),
        )

    def pool(self, features: Tensor, valid: Tensor) -> Tensor:
        """[batch, length, dim], CLS first, to [batch, dim]."""
        if self.attn_pooling_func is None:
            x = with_unread(features[:, 0], *self.norm.parameters())
        else:
            x = self.norm(self.attn_pooling_func(features[:, 1:], valid[:, 1:]))
        return x if self.pooler is None else self.pooler(x)

    def forward(self, features: list[Tensor], valid: Tensor) -> Tensor:
        """Logits [batch, classes] of one sequence, or of both of a pair."""
        return self.classifier(torch.cat([self.pool(one, valid) for one in features], dim=1))


class OnePeaceClassify(OnePeaceEncoder):
    """An encoder and a classification head; parameters carry upstream's names.

    Args:
        config: the encoder's sizes and variants, and the head's.
        backend, adapters: as those of ``OnePeaceEncoder``.
    """

    tasks = ("encode", "classify")
    config: ClassifyConfig
    config_class = ClassifyConfig

    def __init__(
        self, config: ClassifyConfig, backend: str | None = None, adapters: Mapping[str, Adapter] | None = None
    ) -> None:
        super().__init__(config, backend, adapters)
        self.classify_head = ClassifyHead(config)

    @property
    def pooled_modality(self) -> str:
        """Whose tokens the head pools: text, where the model has it and ``use_image_features`` is not set."""
        names = self.config.encoder.modalities
        return "image" if self.config.use_image_features else names[0]

    def classify(self, *, second_image: Tensor | None = None, **inputs: Tensor | None) -> Tensor:
        """Classify samples of all of the model's modalities: logits [rows, classes].

        Args:
            second_image: floating point [rows, 3, side, side], the other image of each pair; exactly for a model of
                ``two_images``.
            inputs: all modalities of the model, a row of each for every sample, as in ``encode``.

        Raises:
            ValueError: a modality or a second image that is missing or not the model's, a sample without a token to
                pool, or what ``encode`` refuses.
        """
        encoder, pooled, two = self.encoder, self.pooled_modality, self.config.two_images
        batch, _ = read_batch(encoder.adapters, inputs)
        names = self.config.encoder.modalities
        require(
            set(batch.inputs) == set(names),
            f"{', '.join(names)}: expected one of each, got {', '.join(batch.inputs)} alone",
        )
        require(
            (second_image is not None) == two,
            f"second_image: expected {'one' if two else 'none'}, got {'none' if two else 'one'}: the model "
            f"classifies {'pairs of images' if two else 'single samples'}",
        )
        lengths = batch.valid.lengths[pooled]
        require(
            not self.config.attention_pooling or min(lengths, default=2) > 1,
            f"{pooled}: expected a token beside CLS in every row, got a row without",
        )
        passes = [encoder.embed(batch)]
        if second_image is not None:
            other, _ = read_batch(encoder.adapters, {**inputs, "image": second_image})
            passes.append(self._second(other))
        features = [encoded.unpacked()[pooled] for encoded in self.encoder_wrapper(passes)]
        return self.classify_head(features, batch.valid.masks[pooled])

    def _second(self, batch: Batch) -> Tokens:
        """The tokens of the pairs' other images, which have a type of their own where the model has types."""
        tokens = dict(self.encoder.embed(batch))
        adapter = self.encoder.adapter("image")
        if isinstance(adapter, ImageAdapter) and adapter.type_embedding_2 is not None:
            image = tokens["image"]
            tokens["image"] = image._replace(x=image.x + adapter.type_embedding_2)
        return tokens
