"""Tiny batches and a runner that the tests of the benchmarks measure with."""

from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.timing import DeviceLost, HostClock
from benchmarks.support.variants import Budget, Runner

SIZES = Sizes(width=32, hidden=48, heads=2, layers=2)


def tiny_shape() -> Shape:
    """Ragged text beside images of 2 x 2 patches."""
    return Shape("text+image", {"text": [3, 7, 5], "image": [5, 5, 5]})


class MadeUpClock:
    """Takes what a call returns for its time."""

    recovered = 0

    def time(self, call, index, lead):
        """The call's own word, in seconds."""
        return call(index), 0.0

    def recover(self):
        """Count."""
        self.recovered += 1


class LostClock(HostClock):
    """The clock of a device that does not come back."""

    def recover(self):
        """It does not."""
        raise DeviceLost("", "illegal")


def tiny_runner(seconds: float = 60.0, no_compile: str | None = None) -> Runner:
    """Three rounds by the host's clock."""
    return Runner(HostClock(), Budget(seconds, no_compile), rounds=3, tolerance=1e-4)
