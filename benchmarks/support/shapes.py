"""Batches of ragged lengths, and the sizes of a layer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onepeace_fast.config import MODALITIES, ImageAdapterConfig, TransformerConfig


@dataclass(frozen=True)
class Sizes:
    """Width, hidden width and heads of a layer; ``layers`` of a stack; ``grid`` of its images' bias table."""

    width: int
    hidden: int
    heads: int
    layers: int = 1
    grid: int = 16

    def config(self, modalities: Sequence[str], layer_scale: float = 1.0) -> TransformerConfig:
        """The configuration of a stack that knows these modalities alone."""
        adapters: dict[str, ImageAdapterConfig | None] = {"image": ImageAdapterConfig(bias_grid=self.grid)}
        adapters |= {name: None for name in MODALITIES if name not in modalities}
        return TransformerConfig(
            embed_dim=self.width,
            ffn_embed_dim=self.hidden,
            attention_heads=self.heads,
            layers=self.layers,
            layer_scale=layer_scale,
            **adapters,
        )


@dataclass(frozen=True)
class Shape:
    """A batch: per modality, in the order of a sequence, the tokens of each sample, CLS included.

    Where it is ``subset_of`` another batch, its tokens are CLS and some others of that batch's longest sample, drawn at
    random for each of its own samples, ``in_order`` of their positions or not.
    """

    name: str
    lengths: Mapping[str, list[int]]
    subset_of: Shape | None = None
    in_order: bool = True

    @property
    def samples(self) -> int:
        """Samples of the batch; every modality has a row for each."""
        return len(next(iter(self.lengths.values())))

    @property
    def real_tokens(self) -> int:
        """Tokens of the packed layout."""
        return sum(map(sum, self.lengths.values()))

    @property
    def padded_tokens(self) -> int:
        """Tokens of the padded layout: every sample as long as the longest, for each modality."""
        return sum(len(row) * max(row) for row in self.lengths.values())

    @property
    def ratio(self) -> float:
        """Padded tokens for each real one."""
        return self.padded_tokens / self.real_tokens

    @property
    def sample_lengths(self) -> list[int]:
        """Real tokens of each sample, all modalities together."""
        return [sum(column) for column in zip(*self.lengths.values(), strict=True)]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key, in all samples."""
        return sum(length**2 for length in self.sample_lengths)

    @property
    def positions(self) -> dict[str, int]:
        """Each modality's positions before any was hidden, CLS included."""
        return {name: max(lengths) for name, lengths in (self.subset_of or self).lengths.items()}

    def position_ids(self, name: str) -> list[list[int]] | None:
        """The positions of each sample's tokens, CLS first, or None where none is hidden or out of order."""
        if self.subset_of is None:
            return None
        draw, rows = random.Random(3), []
        for length in self.lengths[name]:
            drawn = draw.sample(range(1, self.positions[name]), length - 1)
            rows.append([0, *(sorted(drawn) if self.in_order else drawn)])
        return rows


def spread(low: int, high: int, count: int, seed: int) -> list[int]:
    """``count`` lengths evenly spread from ``low`` to ``high``, both included, in an order drawn from the seed."""
    step = (high - low) / max(count - 1, 1)
    lengths = [round(low + i * step) for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def text(samples: int, low: int = 5, high: int = 70) -> list[int]:
    """Text tokens, EOS and CLS included."""
    return [length + 2 for length in spread(low, high, samples, seed=1)]


def image(samples: int, grid: int = 16) -> list[int]:
    """A square grid of patches, CLS included."""
    return [grid * grid + 1] * samples


def audio(samples: int, low: int = 149, high: int = 749, seed: int = 2) -> list[int]:
    """Audio frames, CLS included; 149 to 749 frames are 3 to 15 s. Seed 1 orders them as texts are ordered."""
    return [length + 1 for length in spread(low, high, samples, seed)]


def subset_of(whole: Shape, name: str, share: float = 1.0, samples: int = 0, in_order: bool = True) -> Shape:
    """That share of a batch's tokens, CLS apart, in as many samples, all of one length."""
    lengths = {
        modality: [1 + round(share * (max(row) - 1))] * (samples or whole.samples)
        for modality, row in whole.lengths.items()
    }
    return Shape(name, lengths, whole, in_order)
