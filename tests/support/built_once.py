"""What g++ builds for the tests: once for all processes of a run, and kept from run to run by what it is made of."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

LAST_USED = 4  # builds of a name that stay


def digest(files: Iterable[Path], *options: str) -> str:
    """What a build depends on, in a few letters: the files, and the compiler and flags that ``options`` name."""
    parts = [part for path in sorted(files) for part in (path.name.encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join([*parts, *(option.encode() for option in options)])).hexdigest()[:16]


def version(compiler: str) -> str:
    """What a compiler says it is."""
    return subprocess.run([compiler, "--version"], text=True, capture_output=True, check=True).stdout


def built_once(root: Path, name: str, key: str, build: Callable[[Path], object]) -> Path:
    """The folder that ``build`` fills: the first process that asks builds it, all others wait and find it there.

    Builds that have not been asked for of late are removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{key}"
    with FileLock(root / f"{name}.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
        (folder / "complete").touch()
        kept = sorted(root.glob(f"{name}-*/complete"), key=lambda path: path.stat().st_mtime)
        for old in kept[:-LAST_USED]:
            shutil.rmtree(old.parent, ignore_errors=True)
    return folder
