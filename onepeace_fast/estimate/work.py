"""What a training step of a stack of layers computes and keeps, by formulas; adapters, heads and losses are left out.

With W and H the widths, R the rows (real tokens packed, or padded ones) and pairs of tokens that attend, forward:

    products:   2 R (4 W^2 + 3 W H)     q, k, v, output; gate, value and output of the feed-forward network
    attention:  4 W pairs               q k^T and p v

Backward takes the products twice, and attention's four times over; the ops compute q k^T again, which is no FLOP that
the model needs. Tests hold these against ``torch.utils.flop_counter``, and bytes against what autograd saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from onepeace_fast.config import TransformerConfig

STATISTICS = 32  # bytes of a row: mean and 1 / deviation of four norms, float32
FLOAT32 = 4


class Flops(NamedTuple):
    """Of matrix products and of attention."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.attention


@dataclass(frozen=True)
class Batch:
    """What one GPU gets: per modality the real tokens of each sample, CLS included; every modality has each sample."""

    lengths: Mapping[str, Sequence[int]]

    @property
    def samples(self) -> int:
        """How many."""
        return len(next(iter(self.lengths.values())))

    @property
    def rows(self) -> int:
        """Real tokens: rows of the packed layout."""
        return sum(map(sum, self.lengths.values()))

    @property
    def padded_length(self) -> int:
        """Tokens of each sample in the padded layout."""
        return sum(map(max, self.lengths.values()))

    @property
    def padded(self) -> int:
        """Rows of the padded layout."""
        return self.samples * self.padded_length

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in all samples."""
        return sum(sum(column) ** 2 for column in zip(*self.lengths.values(), strict=True))

    @property
    def padded_pairs(self) -> int:
        """The same with padding."""
        return self.samples * self.padded_length**2


@dataclass(frozen=True)
class Work:
    """A stack over a batch.

    Args:
        config: of the stack.
        batch: of one GPU.
        packed: real tokens alone, by the ops; or padded, by plain PyTorch.
        autocast: float32 parameters and stream, bfloat16 products, as ``onepeace-fast train`` runs; or all float32.
    """

    config: TransformerConfig
    batch: Batch
    packed: bool
    autocast: bool = True

    @property
    def rows(self) -> int:
        """Of a layer's matrices."""
        return self.batch.rows if self.packed else self.batch.padded

    @property
    def pairs(self) -> int:
        """Of tokens that attend."""
        return self.batch.pairs if self.packed else self.batch.padded_pairs

    @property
    def element(self) -> int:
        """Bytes of a number that a product reads."""
        return 2 if self.autocast else FLOAT32

    @property
    def kept_share(self) -> float:
        """Of a layer's rows what DropPath leaves on average, which the packed layout alone makes use of.

        Its probability grows linearly from 0 in the first layer to the configured rate in the last.
        """
        last = 0.5 if self.config.layers > 1 else 0.0
        return 1 - last * self.config.drop_path_rate if self.packed else 1.0

    def forward(self) -> Flops:
        """Of all layers."""
        width, hidden = self.config.embed_dim, self.config.ffn_embed_dim
        layers = self.config.layers * self.kept_share
        return Flops(layers * 2 * self.rows * (4 * width**2 + 3 * width * hidden), layers * 4 * width * self.pairs)

    def step(self) -> Flops:
        """Forward and backward as they run, attention's scores made again by the ops; activations not computed again.

        With ``checkpoint_activations`` the forward pass runs twice.
        """
        once, again = self.forward(), 2 if self.config.checkpoint_activations else 1
        attention = (again + (2.5 if self.packed else 2)) * once.attention
        return Flops((again + 2) * once.products, attention)

    def needed(self) -> float:
        """FLOPs that a step of the model needs: three forward passes over real tokens. What utilisation counts."""
        return 3 * Work(self.config, self.batch, True, self.autocast).forward().total

    def saved_bytes_of_layer(self) -> float:
        """What one layer keeps for its backward pass, with every row computed.

        Packed: the stream twice, and of the branch's width eight: the norms' results (3), q, k, v, attention's result,
        and the FFN's; u and v of the hidden width. Padded, plain PyTorch keeps u, v, their activation and product
        and its norm, and the probabilities of all pairs, under autocast in both dtypes.
        """
        config, element = self.config, self.element
        width, hidden, heads = config.embed_dim, config.ffn_embed_dim, config.attention_heads
        modalities = len(self.batch.lengths)
        weights = 4 * width**2 + modalities * 3 * width * hidden
        if self.packed:
            kept = self.rows * (
                (2 * FLOAT32 + 8 * element) * width + 2 * element * hidden + STATISTICS + FLOAT32 * heads
            )
            rounded = weights + (modalities + 1) * width
        else:
            branches = 12 if self.autocast else 9
            kept = self.rows * ((2 * FLOAT32 + branches * element) * width + 5 * element * hidden + STATISTICS)
            kept += heads * self.pairs * (FLOAT32 + element if self.autocast else element)
            rounded = weights
        # Autocast rounds each weight anew, and the products keep what it made.
        return kept + (element * rounded if self.autocast else 0)

    def saved_bytes(self) -> float:
        """What all layers keep, and the final norm; with ``checkpoint_activations`` the streams and one layer."""
        config, stream = self.config, self.rows * self.config.embed_dim * FLOAT32
        ends = stream + 2 * FLOAT32 * self.rows
        if config.checkpoint_activations:
            return config.layers * stream + self.saved_bytes_of_layer() + ends
        layer = self.saved_bytes_of_layer()
        dropped = (1 - self.kept_share) * (layer - 2 * stream)
        return config.layers * (layer - dropped) + ends

    def transient_bytes(self) -> tuple[float, float]:
        """What a layer's backward pass holds beside, at least and at most: gradients of the hidden width and of rows.

        Plain PyTorch holds gradients of the probabilities too, and so do the ops on a CPU, in float32.
        """
        width, hidden, element = self.config.embed_dim, self.config.ffn_embed_dim, self.element
        least = self.rows * (3 * hidden * element + 2 * width * FLOAT32)
        scores = self.config.attention_heads * self.pairs * (element + FLOAT32)
        return least, 2 * least + 2 * (0 if self.packed and self.autocast else scores)
