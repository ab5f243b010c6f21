"""What keeps the demo from running."""

from __future__ import annotations


class DemoError(Exception):
    """Something that whoever runs the demo can put right; its text is one line."""
