"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., SC 2011), so that no mask is ever stored.

The number of an element depends on the seed and the element's index alone, so the backward pass draws it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for unsigned 32-bit values held in int64, without overflow."""
    low_product = (a & 0xFFFF) * b
    high_product = (a >> 16) * b + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """First output word of Philox-4x32-10 for key ``seed`` and counter (counter, 0, 0, 0): int64 in [0, 2**32)."""
    c0, c1 = counter & _MASK, counter >> 32 & _MASK
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIERS[0], c0)
        high_1, low_1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + _KEY_STEPS[0] & _MASK, k1 + _KEY_STEPS[1] & _MASK
    return c0


def dropout_factor(seed: Tensor, shape: torch.Size, probability: float) -> Tensor:
    """0 with ``probability``, else 1 / (1 - probability), for every element of a [rows, width] matrix: float32."""
    counter = torch.arange(shape.numel(), device=seed.device).view(shape)
    kept = philox(seed, counter) >= int(probability * 2**32)
    return kept.float() / (1.0 - probability)
