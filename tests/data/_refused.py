"""How a refusal looks, and how one that should not be fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


def refused(call: Callable[[], object], start: object, *parts: str) -> str:
    """See that the call raises one line in the common form that begins like this and holds every part; return it."""
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(start)), line
    assert all(part in line for part in (": expected ", ", got ", *parts)), line
    return line


@contextmanager
def taken() -> Iterator[None]:
    """What is refused in the block is a failed assertion."""
    try:
        yield
    except ValueError as error:
        raise AssertionError(f"refused: {error}") from error
