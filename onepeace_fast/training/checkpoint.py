"""Checkpoint folders: written whole or not at all, checked when read, never touched by a run that cannot use them.

``output/step-00000100`` appears in one rename, after everything in it has reached the disk. What a killed process left
half-written is called ``step-00000100.draft`` and is cleared at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from onepeace_fast.checks import require
from onepeace_fast.models.upstream import CONFIG_FILE, WEIGHTS_FILE
from onepeace_fast.nested import flat
from onepeace_fast.pretrained import pickles

TOKENIZER_FILE, TRAINING_FILE, CHECKSUMS_FILE = "tokenizer.json", "training.pt", "SHA256SUMS"
FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, TRAINING_FILE)
_NAME = re.compile(r"step-(\d{8,})")
_DRAFT, _DAMAGED = ".draft", ".damaged"


class NotWritten(Exception):
    """A checkpoint could not be written; nothing of it is left."""


class Found(NamedTuple):
    """The newest usable checkpoint, None where there is none yet, and newer damaged ones: {folder: what is wrong}."""

    folder: Path | None
    damaged: dict[Path, str]


def folder_of(output: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return output / f"step-{step:08d}"


def all_in(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(match, path) for path in output.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]))]


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Keep every other run out of an output folder, and clear what a killed one left there.

    Raises:
        ValueError: another run is writing there, the folder cannot be made, or the system has no POSIX locks.
    """
    try:
        import fcntl
    except ImportError:
        raise ValueError(
            f"output: expected a system with POSIX locks, got {platform.system()}; train on Linux, macOS or in WSL"
        ) from None
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((output / "lock").open("w"))
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held by a killed run's workers
            for path in output.glob(f"step-*{_DRAFT}"):
                shutil.rmtree(path)
        except OSError as error:
            taken = error.errno in (errno.EACCES, errno.EAGAIN) and not error.filename
            expected, reason = ("no other run is writing", "") if taken else ("can be written", f" ({error.strerror})")
            raise ValueError(f"output: expected a folder that {expected}, got {output}{reason}") from None
        yield


def write(output: Path, step: int, writers: Mapping[str, Callable[[Path], None]]) -> Path:
    """Write a checkpoint; returns its folder.

    Args:
        output: the run's folder.
        step: optimizer steps done.
        writers: {file name: function that writes it}.

    Raises:
        NotWritten: a file could not be written, on a full disk for instance.
    """
    final = folder_of(output, step)
    draft = final.with_name(final.name + _DRAFT)
    try:
        draft.mkdir()
        for name, writer in writers.items():
            writer(draft / name)
        sums = "".join(f"{digest(draft / name)}  {name}\n" for name in writers)
        (draft / CHECKSUMS_FILE).write_text(sums, encoding="utf-8")
        for path in (*draft.iterdir(), draft):
            _flush(path)
        draft.rename(final)
        _flush(output)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            raise NotWritten(_reason(error)) from error
        raise
    return final


def remove_old(output: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``."""
    for folder in all_in(output)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def newest(output: Path) -> Found:
    """Find the newest checkpoint whose files are all there and unchanged.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(all_in(output)):
        if (reason := damage(folder)) is None:
            return Found(folder, damaged)
        damaged[folder] = reason
    if damaged:
        found = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ValueError(f"output: expected a folder with a whole checkpoint or none, got {output} ({found})")
    return Found(None, {})


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint another name, so that its step can be written again; returns that name."""
    target, count = path.with_name(path.name + _DAMAGED), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}{_DAMAGED}-{count}")
    return path.rename(target)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        lines = (folder / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
        sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
        if missing := [name for name in FILES if name not in sums]:
            return f"{CHECKSUMS_FILE} lacks {', '.join(missing)}"
        changed = [name for name, value in sums.items() if digest(folder / name) != value]
        return f"{', '.join(changed)} changed since it was written" if changed else None
    except (OSError, UnicodeDecodeError) as error:
        return f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) else "not readable"


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors, numbers, texts and containers of them."""
    with path.open("wb") as file:  # torch's own file reports a full disk as something else
        torch.save(dict(state), file)


def load_state(folder: Path) -> dict[str, Any]:
    """What a training wrote by ``save_state``, on the CPU; large tensors stay on the disk until they are read.

    Raises:
        ValueError: a file that is broken, or holds something else; one line that names it.
    """
    path = folder / TRAINING_FILE
    state = pickles.read(path)
    fits = isinstance(state, dict) and isinstance(state.get("settings"), dict)
    fits = fits and isinstance(state.get("trained", []), list)
    require(fits, f"{path}: expected what a training wrote, with its settings, got another file")
    return state


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two nested settings, a text for each: "model.encoder.layers: 2 there, 3 here"."""
    before, now = flat(saved), flat(current)
    absent = object()
    pairs = {name: (before.get(name, absent), now.get(name, absent)) for name in sorted({*before, *now})}

    def show(value: object) -> str:
        return "absent" if value is absent else f"{value}"

    return [f"{name}: {show(old)} there, {show(new)} here" for name, (old, new) in pairs.items() if old != new]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The cause in one line: the text of the OSError behind it, if there is one."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.strerror:
            return behind.strerror
        behind = behind.__context__
    return " ".join(str(error).split())
