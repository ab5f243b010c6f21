"""Names that the changelog says were changed: the new one is there, and nothing answers to the old one."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from support.known_names import is_known

CHANGELOG = (Path(__file__).resolve().parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.*`.*) \| (.*`.*) \| (.*`.*) \|$", CHANGELOG, re.MULTILINE)


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def found(path: str) -> object:
    """A module, or what an attribute of one is."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(found(owner), name)


def has(where: str, name: str) -> bool:
    """Whether a function has a parameter, a class a field, either or a module an attribute, or a package a module."""
    owner = found(where)
    if hasattr(owner, name) or (callable(owner) and name in inspect.signature(owner).parameters):
        return True
    try:
        return hasattr(owner, "__path__") and importlib.util.find_spec(f"{where}.{name}") is not None
    except ModuleNotFoundError:
        return False


def test_there_are_names_that_changed():
    assert len(ROWS) > 30


@pytest.mark.parametrize("within, was, new", ROWS, ids=lambda text: "-".join(quoted(text)))
def test_a_changed_name_is_there_and_the_old_one_is_gone(within, was, new):
    if "kernels" in within:
        pytest.importorskip("triton")
    if "these and" in within:
        within = f"{ROWS[0][0]}, {within}"
    for where in quoted(within):
        assert [name for name in quoted(was) if has(where, name)] == []
        assert [name for name in quoted(new) if not has(where, name)] == []


def test_names_of_what_changed_otherwise_are_there():
    text = re.sub(r"^\|.*$", "", CHANGELOG, flags=re.MULTILINE)
    gone = {"entries.cuh", "spectral_norm"}
    assert [name for name in quoted(text) if name not in gone and not is_known(name)] == []
