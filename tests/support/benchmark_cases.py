"""Tiny batches and a runner that the tests of the benchmarks measure with."""

from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import Budget, Runner
from onepeace_fast.timing import DeviceLost, HostClock

SIZES = Sizes(width=32, hidden=48, heads=2, layers=2)


def tiny_shape() -> Shape:
    """Ragged text beside images of 2 x 2 patches."""
    return Shape("text+image", {"text": [3, 7, 5], "image": [5, 5, 5]})


class LostClock(HostClock):
    """The clock of a device that does not come back."""

    def recover(self):
        """It does not."""
        raise DeviceLost("", "illegal")


def tiny_runner(seconds: float = 60.0, no_compile: str | None = None) -> Runner:
    """Three rounds by the host's clock."""
    return Runner(HostClock(), Budget(seconds, no_compile), rounds=3, memory=False)
