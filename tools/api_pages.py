"""Renders the docstrings of every public module into build/docs, or into the folder that is given."""

import html
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import get_type_hints

import pdoc

import onepeace_fast

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"cli", "demo", "hardware", "info", "training"}


def public_modules() -> list[str]:
    """The modules that a program imports: none of a command alone, and none whose name begins with an underscore."""
    found = [module.name for module in pkgutil.walk_packages(onepeace_fast.__path__, "onepeace_fast.")]
    return ["onepeace_fast", *(name for name in found if "._" not in name and name.split(".")[1] not in COMMANDS)]


def read(name: str) -> pdoc.doc.Module:
    """What pdoc finds in a module; the fields of a NamedTuple get their types here, since pdoc looks elsewhere."""
    module = importlib.import_module(name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            value.__new__.__annotations__ = get_type_hints(value)
    return pdoc.doc.Module(module)


def index(modules: dict[str, pdoc.doc.Module]) -> str:
    """A page that links every module, with the first line of its docstring; pdoc's own knows the top one alone."""
    lines = {name: module.docstring.partition("\n")[0] for name, module in modules.items()}
    links = (f'<li><a href="{path(name)}">{name}</a>: {html.escape(line)}</li>' for name, line in lines.items())
    return f"<!doctype html><meta charset='utf-8'><title>onepeace_fast</title><ul>{''.join(links)}</ul>"


def path(name: str) -> str:
    """Where the page of a module is."""
    return f"{name.replace('.', '/')}.html"


def render(folder: Path) -> None:
    """Write a page per module, index.html and the search into ``folder``; pdoc warns of what it cannot read."""
    pdoc.render.configure(docformat="google", show_source=False)
    modules = {name: read(name) for name in public_modules()}
    pages = {path(name): pdoc.render.html_module(module, modules) for name, module in modules.items()}
    pages |= {"index.html": index(modules), "search.js": pdoc.render.search_index(modules)}
    for name, page in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    render(folder)
    print(f"open {folder / 'index.html'}")
