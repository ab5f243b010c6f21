"""Signals of any rate: patches of equal duration, so that a token is the same span of time in every signal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onepeace_fast.checks import describe, require, require_tensor
from onepeace_fast.config import TransformerConfig, is_number
from onepeace_fast.layers.adapters.adapter import (
    SeriesAdapter,
    accepted_floats,
    padded_batch,
    require_items,
    require_size,
    valid_from_padding,
)
from onepeace_fast.layers.parameters import init_linear, init_truncated_normal
from onepeace_fast.relative_position import MAX_POSITIONS

ROUNDING = 1e-9  # of a reading: a remainder this short is no time


class SignalAdapter(SeriesAdapter):
    """A token for each patch of ``patch`` readings; learned positions. A patch lasts ``patch / rate`` seconds.

    Args:
        config: the model's ``config.encoder``.
        channels: numbers of a reading, in any unit; they train best with mean 0 and deviation 1.
        rate: of the readings that the model sees, in hertz; ``batch`` brings every signal to it.
        patch: readings of a patch.
        longest: patches of the longest signal.
        bucket_size: of the relative position bias; distances are in patches, exact up to half of it.
    """

    takes_padding = True

    def __init__(
        self, config: TransformerConfig, channels: int, rate: float, patch: int = 16, longest: int = 255,
        bucket_size: int = 64,
    ) -> None:  # fmt: skip
        super().__init__(config.embed_dim, config.attention_heads, config.bias_tables, bucket_size)
        require(is_number(rate) and rate > 0, f"rate: expected a positive number of hertz, got {describe(rate)}")
        require_size("channels", channels)
        require_size("patch", patch)
        require_size("longest", longest, most=MAX_POSITIONS - 1)
        self.channels, self.rate, self.patch, self.longest = channels, rate, patch, longest
        self.embed_patches = init_linear(nn.Linear(patch * channels, config.embed_dim))
        self.embed_positions = nn.Parameter(init_truncated_normal(torch.empty(1 + longest, config.embed_dim)))

    def batch(self, name: str, signals: Sequence[Tensor], rates: Sequence[float]) -> dict[str, Tensor]:
        """Signals as the model takes them: the modality ``name`` and its padding.

        Args:
            name: the modality's.
            signals: floating point [readings, channels] each, of any length; the first reading is at second 0.
            rates: readings a second of each, in hertz.

        Returns:
            {name: [rows, readings, channels] at ``rate``, zero behind a signal's end, and bool [rows, 1 + patches]}.

        Raises:
            ValueError: a signal or a rate that does not fit, by its place.
        """
        require_items(name, "signals", signals)
        count = len(rates) if isinstance(rates, Sequence) else describe(rates)
        require(count == len(signals), f"rates: expected one for each of {len(signals)} signals, got {count}")
        readings = []
        for place, (signal, rate) in enumerate(zip(signals, rates, strict=True)):
            where = f"{name}, signals[{place}]"
            require_tensor(where, signal, (torch.float32, torch.float64), f"[readings, {self.channels}]", 2)
            fits = signal.shape[1] == self.channels
            require(fits, f"{where}: expected [readings, {self.channels}], got {describe(signal)}")
            require(is_number(rate) and rate > 0, f"rates[{place}]: expected a positive number, got {describe(rate)}")
            require(bool(signal.isfinite().all()), f"{where}: expected finite readings, got others; cut them out")
            patches = self._patches(readings_at(len(signal), rate, self.rate))
            require(
                patches <= self.longest,
                f"{where}: expected up to {self.longest} patches of {self.patch / self.rate:g} seconds, got {patches}",
            )
            readings.append(resample(signal, rate, self.rate))
        return padded_batch(name, readings, [self._patches(len(signal)) for signal in readings], self.patch)

    def _patches(self, readings: int) -> int:
        return -(-readings // self.patch)

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        layout = f"[rows, readings, {self.channels}]"
        require_tensor(name, value, accepted_floats(self.cls_embedding), layout, 3)
        rows, readings, channels = value.shape
        require(
            channels == self.channels and readings % self.patch == 0,
            f"{name}: expected {layout} with readings a multiple of {self.patch}, got {describe(value)}",
        )
        patches = readings // self.patch
        require(patches <= self.longest, f"{name}: expected at most {self.longest} patches, got {patches}")
        return valid_from_padding(name, padding, rows, 1 + patches, value.device, tokens="patches")

    def tokens(self, value: Tensor) -> Tensor:
        """Embed [rows, readings, channels] to [rows, 1 + patches, embed_dim]."""
        rows, readings, channels = value.shape
        patches = self.embed_patches(value.reshape(rows, readings // self.patch, self.patch * channels))
        return torch.cat([self.cls_embedding.to(patches.dtype).expand(rows, -1, -1), patches], dim=1)

    def position_table(self, width: int) -> Tensor:
        return self.embed_positions[:width]


def readings_at(count: int, rate: float, new_rate: float) -> int:
    """How many readings a signal of ``count`` has at another rate."""
    return math.ceil(count / (rate / new_rate) - ROUNDING)


def resample(signal: Tensor, rate: float, new_rate: float) -> Tensor:
    """A signal [readings, channels] at another rate, from second 0: each new reading is the mean over its own time.

    An old reading lasts until the next. The last new one is the mean over what is left of the signal.
    """
    ratio, count = rate / new_rate, len(signal)
    if ratio == 1 or not count:
        return signal
    new_count = max(1, readings_at(count, rate, new_rate))
    edges = (torch.arange(new_count + 1, dtype=torch.float64, device=signal.device) * ratio).clamp(max=count)
    edges[-1] = count
    whole = edges.long()
    held = torch.cat([signal.double(), signal.new_zeros(1, signal.shape[1])])  # behind the end nothing is held
    before = torch.cat([held.new_zeros(1, held.shape[1]), held[:-1].cumsum(0)])
    integral = before[whole] + (edges - whole)[:, None] * held[whole]
    return (integral.diff(dim=0) / edges.diff()[:, None]).to(signal.dtype)
