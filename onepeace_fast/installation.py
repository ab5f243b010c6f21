"""How to install what is missing here: the library's name is on no package index."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def install_command(extra: str) -> str:
    """A command that installs the packages of an extra: of the checkout where this is one, else by their names."""
    if (ROOT / "pyproject.toml").is_file():
        return f"pip install -e '{'.' if Path.cwd() == ROOT else ROOT}[{extra}]'"
    try:
        requirements = metadata.requires("onepeace_fast") or []
    except metadata.PackageNotFoundError:
        requirements = []
    marked = (requirement.partition(";") for requirement in requirements)
    names = [name.strip() for name, _, marker in marked if f'extra == "{extra}"' in marker.replace("'", '"')]
    return f"pip install {' '.join(names)}" if names else f"pip install -e '.[{extra}]' in the checkout"
