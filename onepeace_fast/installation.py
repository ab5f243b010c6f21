"""How to install what is missing here: the library's name is on no package index."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def install_command(extra: str) -> str:
    """A command that installs the packages of an extra: of the checkout where this is one, else by their names."""
    if (ROOT / "pyproject.toml").is_file():
        place = "." if Path.cwd() == ROOT else ROOT
        return f"{_pip()} -e {shlex.quote(f'{place}[{extra}]')}"
    try:
        requirements = metadata.requires("onepeace_fast") or []
    except metadata.PackageNotFoundError:
        requirements = []
    marked = (requirement.partition(";") for requirement in requirements)
    names = [name.strip() for name, _, marker in marked if f'extra == "{extra}"' in marker.replace("'", '"')]
    return f"{_pip()} {shlex.join(names)}" if names else f"{_pip()} -e '.[{extra}]' in the checkout"


def optional(module: str, extra: str) -> ModuleType:
    """Import a module of an extra.

    Raises:
        ImportError: it is missing or damaged; one line that says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # soundfile raises OSError where its C library is missing
        reason = " ".join(str(error).split())
        raise ImportError(
            f"{module}: cannot be imported ({reason}); type: {install_command(extra)}", name=module
        ) from None


def program_command(arguments: str) -> str:
    """How to type ``onepeace-fast`` here: with its folder where the PATH does not lead to it."""
    program = Path(sys.executable).parent / "onepeace-fast"
    if not program.exists():
        found = shutil.which("onepeace-fast")
        return f"onepeace-fast {arguments}" if found else f"{_python()} -m onepeace_fast.cli {arguments}"
    return f"{_shown(program)} {arguments}"


def _pip() -> str:
    """The pip of this interpreter, whatever the PATH says; uv where it has none, as in environments that uv made."""
    if not _has_pip() and shutil.which("uv"):
        return f"uv pip install --python {_python()}"
    return f"{_python()} -m pip install"


def _has_pip() -> bool:
    """Ask the metadata: before Python 3.12, to look for the module makes setuptools and torch.compile fail later."""
    try:
        metadata.distribution("pip")
    except metadata.PackageNotFoundError:
        return False
    return True


def _python() -> str:
    return _shown(Path(sys.executable))


def _shown(program: Path) -> str:
    """The shortest way to type a program: its name, from the current folder, or whole."""
    found = shutil.which(program.name)
    if found and os.path.abspath(found) == os.path.abspath(program):
        return program.name
    inside = program.is_relative_to(Path.cwd())
    return shlex.quote(str(program.relative_to(Path.cwd()) if inside else program))
