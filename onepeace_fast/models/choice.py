"""Which backend a batch runs on a CPU where none was asked for: the faster one, by lengths that the host knows.

Packing saves the rows of padding in every matrix product, and costs what a route plan and calls per modality take
however few rows there are. Both are counted in floating-point operations of one layer's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from onepeace_fast.config import TransformerConfig
from onepeace_fast.models.passes import Samples, Tokens, sample_count

# What one thread computes in the time that packing costs a layer, and each further pass a layer of the reference; and
# the share of the packed rows' time that must be saved beside. They were chosen so that on an AMD EPYC no shape of
# benchmarks/bench_encoder.py is slower for being packed, by one thread or two; the rare gain of less is left.
COST_OF_PACKING = 60e6
COST_OF_A_PASS = 20e6
LEAST_SHARE = 0.03
# With gradients the products take three times as long, and what packing costs twice as long.
COST_WITH_GRADIENTS = 2 / 3


class Choice(NamedTuple):
    """A backend, and the tokens that each would compute: padded by the reference, packed by the fused one."""

    backend: str
    padded_tokens: int
    packed_tokens: int


def choose(config: TransformerConfig, passes: Sequence[Tokens], samples: Samples | None) -> Choice:
    """The faster backend for these passes of a step through a stack on a CPU."""
    padded = packed = 0
    for tokens in passes:
        padded += sample_count(tokens, samples) * sum(one.valid.shape[1] for one in tokens.values())
        packed += sum(sum(one.lengths) for one in tokens.values())
    of_a_row = 2 * config.embed_dim * (4 * config.embed_dim + 3 * config.ffn_embed_dim)
    fused = packing_pays(padded, packed, of_a_row, len(passes))
    return Choice("fused" if fused else "reference", padded, packed)


def packing_pays(padded: int, packed: int, of_a_row: int, passes: int = 1) -> bool:
    """Whether a layer over packed rows is faster on a CPU than over padded ones.

    Args:
        padded, packed: rows of each.
        of_a_row: floating-point operations of the products of one row in one layer.
        passes: of padded rows, where packed rows need one alone.
    """
    # Both costs are of Python, which takes as long however many threads compute the products.
    cost = (COST_OF_PACKING - (passes - 1) * COST_OF_A_PASS) * torch.get_num_threads()
    if torch.is_grad_enabled():
        cost *= COST_WITH_GRADIENTS
    return (padded - packed) * of_a_row >= cost + LEAST_SHARE * packed * of_a_row
