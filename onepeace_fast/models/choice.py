"""Which backend a batch runs on a CPU where none was asked for: the faster one, by lengths that the host knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from onepeace_fast.models.passes import Samples, Tokens, sample_count

# Measured by benchmarks/bench_cpu.py: a packed batch of so many rows takes as long as a padded one of
# LEAST_GAIN times as many, and every further pass of the reference as long as FURTHER_PASS rows.
LEAST_GAIN = 1.05
FURTHER_PASS = 16


class Choice(NamedTuple):
    """A backend, and the tokens that each of them would compute: padded by the reference, packed by the fused one."""

    backend: str
    padded_tokens: int
    packed_tokens: int


def choose(passes: Sequence[Tokens], samples: Samples | None) -> Choice:
    """The faster backend for these passes of a step on a CPU."""
    padded = packed = 0
    for tokens in passes:
        padded += sample_count(tokens, samples) * sum(one.valid.shape[1] for one in tokens.values())
        packed += sum(sum(one.lengths) for one in tokens.values())
    gains = padded + FURTHER_PASS * (len(passes) - 1) >= LEAST_GAIN * packed
    return Choice("fused" if gains else "reference", padded, packed)
