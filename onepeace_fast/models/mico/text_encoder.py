"""BERT with cross attention (arXiv 1810.04805), which reads texts alone or with a context, or writes them.

    x <- LN(x + Wo Attention(x)),   x <- LN(x + Wo' Attention(x, context)),   x <- LN(x + W2 gelu(W1 x))

Names are those of Hugging Face's BertForMaskedLM. Texts see all of themselves, or what comes before alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.backend import check_backend, resolve_backend
from onepeace_fast.layers.parameters import init_as_bert
from onepeace_fast.layers.plain import embedding_table
from onepeace_fast.models.mico import state
from onepeace_fast.models.mico.config import TextConfig
from onepeace_fast.models.mico.context import PackedContext
from onepeace_fast.models.mico.inputs import read_texts
from onepeace_fast.models.mico.layers import activated, add, add_and_norm
from onepeace_fast.models.mico.texts import PackedTexts, PaddedTexts, check_samples

BERT_EPS = 1e-12
Texts: TypeAlias = PackedTexts | PaddedTexts


class Read(NamedTuple):
    """What the text encoder makes of texts."""

    x: Tensor  # packed [rows, width], or padded [texts, length, width]
    texts: Texts

    @property
    def first(self) -> Tensor:
        """The first token of each text, [texts, width]."""
        return self.texts.first(self.x)


class BertEmbeddings(nn.Module):
    """Words, positions and the first of the token types, normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, 0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.type_rows, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, BERT_EPS)

    def forward(self, texts: Texts) -> Tensor:
        """[rows, width], or [texts, length, width]."""
        types = embedding_table(self.token_type_embeddings, self.token_type_embeddings.num_embeddings)
        x = self.word_embeddings(texts.ids) + types[0]
        return texts.norm(x + self.position_embeddings(texts.places), self.LayerNorm)


class Projections(nn.Module):
    """Queries, keys and values."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value = (nn.Linear(config.width, config.width) for _ in range(3))

    def forward(self, x: Tensor, keys: Tensor) -> list[Tensor]:
        """Each [..., heads, head_dim]."""
        parts = (self.query(x), self.key(keys), self.value(keys))
        return [part.unflatten(-1, (self.heads, -1)) for part in parts]


class Output(nn.Module):
    """LN(x + W y)."""

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, config.width), nn.LayerNorm(config.width, BERT_EPS)

    def forward(self, x: Tensor, y: Tensor, texts: Texts) -> Tensor:
        """[..., width]."""
        y = self.dense(y)
        if x.dtype == y.dtype:
            return add_and_norm(x, y, self.LayerNorm, texts.packed)[1]
        # Under autocast the stream, which a norm makes here, stays as wide as the parameters.
        return texts.norm(add(x, y, texts.packed), self.LayerNorm)


class BertAttention(nn.Module):
    """Attention to the texts' own tokens, or to those of their context."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.add_module("self", Projections(config))
        self.output = Output(config, config.width)

    def forward(self, x: Tensor, texts: Texts, context: Tensor | None = None) -> Tensor:
        """[..., width]."""
        q, k, v = self.get_submodule("self")(x, x if context is None else context)
        attended = texts.attend(q, k, v) if context is None else texts.attend_context(q, k, v)
        return self.output(x, attended, texts)


class Intermediate(nn.Module):
    """The first matrix of the FFN."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.ffn_dim)

    def forward(self, x: Tensor, packed: bool) -> Tensor:
        """gelu(W1 x)."""
        return activated(self.dense(x), None, None, "gelu", packed)


class BertLayer(nn.Module):
    """Attention, attention to the context where there is one, and the FFN."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention, self.crossattention = BertAttention(config), BertAttention(config)
        self.intermediate, self.output = Intermediate(config), Output(config, config.ffn_dim)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        """[..., width]."""
        x = self.attention(x, texts)
        if texts.context is not None:
            x = self.crossattention(x, texts, texts.context)
        return self.output(x, self.intermediate(x, texts.packed), texts)


class BertStack(nn.Module):
    """The layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        """[..., width]."""
        for layer in self.layer:
            x = layer(x, texts)
        return x


class Bert(nn.Module):
    """Embeddings and layers; Hugging Face's BertModel without a pooler."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings, self.encoder = BertEmbeddings(config), BertStack(config)

    def forward(self, texts: Texts) -> Tensor:
        """[..., width]."""
        return self.encoder(self.embeddings(texts), texts)

    def carried(self) -> dict[str, Tensor | str]:
        """The buffer of older releases of transformers."""
        rows = self.embeddings.position_embeddings.num_embeddings
        return {"embeddings.position_ids": torch.arange(rows, device="cpu")[None]}


class Transform(nn.Module):
    """LN(gelu(W x)), what stands before the scores of words."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(config.width, config.width), nn.LayerNorm(config.width, BERT_EPS)

    def forward(self, x: Tensor, packed: bool) -> Tensor:
        """[tokens, width]."""
        return activated(self.dense(x), None, self.LayerNorm, "gelu", packed)


class TextEncoder(nn.Module):
    """BERT with cross attention and its head of words, whose matrix is that of the embeddings.

    Args:
        config: sizes.
        backend: "reference" (padded), "fused" (packed), or None: automatic, by device.
    """

    def __init__(self, config: TextConfig, backend: str | None = None) -> None:
        super().__init__()
        if backend is not None:
            check_backend(backend)
        self.config, self.backend = config, backend
        self.bert = Bert(config)
        self.cls = nn.ModuleDict({"predictions": nn.ModuleDict({"transform": Transform(config)})})
        predictions = self.cls["predictions"]
        predictions.register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size)))
        with torch.no_grad():
            self.apply(init_as_bert)

    def forward(
        self, ids: Tensor, context: PackedContext | None = None, *, samples: Sequence[int] | None = None,
        causal: bool = False,
    ) -> Read:  # fmt: skip
        """What becomes of the tokens of texts.

        Args:
            ids: integers [texts, length], 0 behind each text.
            context: what they see beside themselves.
            samples: whose context each text sees, ascending; by default text i sees sample i's.
            causal: whether a token sees itself and what comes before it alone.

        Raises:
            ValueError: ids or samples that do not fit.
        """
        valid = read_texts("text", ids, self.config)
        samples = check_samples(len(ids), context, samples)
        packed = resolve_backend(self.backend, ids.device) == "fused"
        texts = (PackedTexts if packed else PaddedTexts)(ids, valid, causal, context, samples)
        return Read(self.bert(texts), texts)

    def scores(self, x: Tensor, packed: bool) -> Tensor:
        """Of each word at tokens [tokens, width]: [tokens, vocab_size]."""
        predictions = self.cls.get_submodule("predictions")
        x = predictions.get_submodule("transform")(x, packed)
        return F.linear(x, self.bert.embeddings.word_embeddings.weight, predictions.get_parameter("bias"))

    def carried(self) -> dict[str, Tensor | str]:
        """The tied weights of Hugging Face's state dict."""
        words = "bert.embeddings.word_embeddings.weight"
        return {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": "cls.predictions.bias"}

    def load_upstream_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the state dict of a BertForMaskedLM; strict, and nothing is changed unless everything fits.

        Raises:
            ValueError: missing, unexpected or misshaped keys, all of them listed, or a buffer with other values.
        """
        state.load(self, state_dict)

    def to_upstream_state_dict(self, grads: bool = False) -> dict[str, Tensor | None]:
        """Parameters, or with ``grads`` their gradients (None where there is none), under Hugging Face's names.

        The tied weights are there too, as BertForMaskedLM has them.
        """
        return state.state_dict(self, grads)
