"""What holds of an operation's reference and of its kernels: the files of ``tests/ops`` marked ``by_kernels``."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

OPS = Path(__file__).resolve().parent.parent / "ops"


def marked() -> Iterator[tuple[str, Callable]]:
    """Each test of the marked files, by the name of its file and its own."""
    for file in sorted(OPS.glob("test_*.py")):
        if "\npytestmark = pytest.mark.by_kernels\n" in file.read_text():
            for name, value in vars(import_module(f"ops.{file.stem}")).items():
                if name.startswith("test_"):
                    yield f"{file.stem}__{name.removeprefix('test_')}", value


globals().update(marked())
