"""What ``FusedModel.report`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from onepeace_fast.comparison import Comparison
from onepeace_fast.fusion.family import FusedCall, Fusion
from onepeace_fast.tables import table


class Refused(NamedTuple):
    """A module that resembles a family's, and why it was not taken."""

    path: str
    family: str
    reason: str


class PartReport(NamedTuple):
    """A fused part, and its calls so far.

    ``fused_calls`` were fused, None where nothing counts them; ``own_calls`` ran as the model's own code, by reason. Of
    the fused calls ``padded_tokens`` came, and ``computed_tokens`` were computed.
    """

    path: str
    family: str
    fused_calls: int | None
    own_calls: dict[str, int]
    padded_tokens: int
    computed_tokens: int

    @classmethod
    def of(cls, path: str, part: Fusion) -> PartReport:
        own = {reason: count for reason, count in part.calls.items() if reason}
        fused = part.calls[""] if isinstance(part, FusedCall) else None
        return cls(path, part.family, fused, own, part.padded_tokens, part.computed_tokens)


@dataclass(frozen=True)
class Report:
    """Fused parts, parts that were refused, and with a batch the comparison; printed, it is tables."""

    parts: tuple[PartReport, ...]
    refused: tuple[Refused, ...]
    gain: Comparison | None = None

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = [("fused", "family", "calls", "own code", "tokens", "computed")]
        for part in self.parts:
            counts = [part.fused_calls, sum(part.own_calls.values()), part.padded_tokens, part.computed_tokens]
            shown = ["-"] * 4 if part.fused_calls is None else counts
            rows.append((_named(part.path), part.family, *shown))
        lines = [table(rows)]
        for part in self.parts:
            lines += [
                f"{_named(part.path)}, {count} calls by its own code: {why}" for why, count in part.own_calls.items()
            ]
        lines += [f"{_named(path)} is not fused: like {family}, but {why}" for path, family, why in self.refused]
        return "\n".join(lines if self.gain is None else [*lines, "", str(self.gain)])


def _named(path: str) -> str:
    return path or "model"
