"""What every refusal of a model owes its caller."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from data._refused import refused

from onepeace_fast.models.stack import Stack


def refuse(expected: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """The call raises one line that starts with or holds ``expected``, and embeds nothing before."""

    def work(*_):
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(Stack, "embed", work)
    monkeypatch.setattr(Stack, "tokens", work)
    return refused(call, "", expected)
