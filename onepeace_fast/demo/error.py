"""The demo's error."""

from __future__ import annotations


class DemoError(Exception):
    """A problem that the user can solve; its text is one line."""
