"""What holds of an operation's reference and of its kernels: the tests of ``tests/ops`` marked ``by_kernels``."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

OPS = Path(__file__).resolve().parent.parent / "ops"


def is_marked(holder: object) -> bool:
    """Whether a test, or all tests of a module, are marked."""
    marks = getattr(holder, "pytestmark", [])
    return any(mark.name == "by_kernels" for mark in (marks if isinstance(marks, list) else [marks]))


def marked() -> Iterator[tuple[str, Callable]]:
    """Each marked test, by the name of its file and its own."""
    for file in sorted(OPS.glob("test_*.py")):
        if "mark.by_kernels" in file.read_text():
            module = import_module(f"ops.{file.stem}")
            for name, value in vars(module).items():
                if name.startswith("test_") and (is_marked(module) or is_marked(value)):
                    yield f"{file.stem}__{name.removeprefix('test_')}", value


globals().update(marked())
