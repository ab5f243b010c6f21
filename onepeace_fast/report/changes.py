"""What changed between two files of times, and which of it is more than noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from onepeace_fast.report.results import Ratio, Results, Row, Timed

LEAST = 0.02  # a smaller change is never flagged: the clock of one machine drifts as much between two runs


class Change(NamedTuple):
    """A figure of both files: what it is, both medians, and the noise of the two added up, as a share."""

    what: str
    before: float
    after: float
    noise: float
    unit: str

    @property
    def ratio(self) -> float:
        """After over before: above 1 is slower, or more memory."""
        return self.after / self.before

    @property
    def flagged(self) -> bool:
        """Whether the change is beyond the noise."""
        return abs(self.ratio - 1) > max(self.noise, LEAST)

    @property
    def worse(self) -> bool:
        """Whether it is beyond the noise and for the worse."""
        return self.flagged and self.ratio > 1


class Comparison(NamedTuple):
    """All figures that two files share, and the names of those that only one has."""

    changes: list[Change]
    gone: list[str]
    new: list[str]

    @property
    def flagged(self) -> list[Change]:
        """Changes beyond the noise, the worst first."""
        return sorted((one for one in self.changes if one.flagged), key=lambda one: -one.ratio)

    @property
    def noise(self) -> tuple[float, float]:
        """The median and the largest noise of all figures; zero where there is none."""
        found = [one.noise for one in self.changes]
        return (statistics.median(found), max(found)) if found else (0.0, 0.0)

    @property
    def drift(self) -> float:
        """The median change of all figures: what the whole machine did."""
        return statistics.median(one.ratio for one in self.changes) - 1 if self.changes else 0.0


def compare(before: Results, after: Results) -> Comparison:
    """Every time, ratio and count of bytes that both files have, by section, mode and variant."""
    old, new = dict(_figures(before)), dict(_figures(after))
    changes = [
        Change(what, old[what][0], figure, old[what][1] + noise, unit)
        for what, (figure, noise, unit) in new.items()
        if what in old and old[what][0] > 0 and figure > 0
    ]
    return Comparison(changes, [what for what in old if what not in new], [what for what in new if what not in old])


def _figures(results: Results) -> Iterator[tuple[str, tuple[float, float, str]]]:
    """Name, and figure, noise as a share of it, and unit."""
    for row in results.rows:
        yield from _of_row(row)


def _of_row(row: Row) -> Iterator[tuple[str, tuple[float, float, str]]]:
    for variant, time in row.times.items():
        yield f"{row.name}: {variant}", (time.median, spread(time), "ms")
    for name, ratio in row.ratios.items():
        yield f"{row.name}: {name}", (ratio.median, spread(ratio), "times")
    for variant, size in row.peaks.items():
        yield f"{row.name}: memory of {variant}", (size / 2**20, 0.0, "MiB")


def spread(figure: Timed | Ratio) -> float:
    """How far a figure's ends lie from its median, as a share of it.

    Of a time without quartiles that of the least alone: the most is what another program took once.
    """
    median = figure.median
    if median <= 0:
        return 0.0
    below, above = median - figure.low, figure.high - median
    return (below if isinstance(figure, Timed) and not figure.has_quartiles else max(below, above)) / median
