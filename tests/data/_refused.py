"""How a refusal looks."""

from collections.abc import Callable

import pytest


def refused(call: Callable[[], object], start: object, *parts: str) -> None:
    """See that the call raises one line in the common form that begins like this and holds every part."""
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(start)), line
    assert all(part in line for part in (": expected ", ", got ", *parts)), line
