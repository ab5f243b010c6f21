"""Who imports whom: nobody in a circle, no other package's private module, and models -> layers -> ops -> kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "onepeace_fast"
ORDER = ("kernels", "ops", "layers", "models")  # each may import itself and what stands before it


def _files() -> Iterator[tuple[str, Path]]:
    """Every module of the package by name; ``kernels/`` stands beside it in the source tree."""
    for folder, name in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([name, *(part for part in parts if part != "__init__")]), path


MODULES = dict(_files())


def _imported(source: str, module: str, names: frozenset[str]) -> set[str]:
    """The package's modules that a source names in its imports, those inside functions and for types alone included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: expected absolute imports, got a relative one in line {node.lineno}"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & names or {node.module}
    return {name for name in found if name in names and name != module}


@cache
def graph() -> dict[str, set[str]]:
    names = frozenset(MODULES)
    return {module: _imported(path.read_text(), module, names) for module, path in MODULES.items()}


def reach(edges: dict[str, set[str]], start: str) -> set[str]:
    """Every module that one imports, directly or through others."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        todo += edges[todo.pop()] - seen
        seen |= set(todo)
    return seen


def circles(edges: dict[str, set[str]]) -> set[str]:
    return {module for module in edges if module in reach(edges, module)}


def strangers(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports of a private module from outside the package that it is in."""
    pairs = {(module, other) for module, others in edges.items() for other in others}
    found = set()
    for module, other in pairs:
        parts = other.split(".")
        private = next((i for i, part in enumerate(parts) if part.startswith("_")), None)
        if private is not None and not f"{module}.".startswith(".".join(parts[:private]) + "."):
            found.add((module, other))
    return found


def upward(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """A module and what it reaches against the order, through the package's other modules too."""

    def rank(module: str) -> int | None:
        return next((i for i, name in enumerate(ORDER) if f"{module}.".startswith(f"{PACKAGE}.{name}.")), None)

    ranks = {module: rank(module) for module in edges}
    return {
        (module, other)
        for module in edges
        if ranks[module] is not None
        for other in reach(edges, module)
        if ranks[other] is not None and ranks[other] > ranks[module]
    }


def test_no_module_imports_itself_in_a_circle():
    assert len(graph()) > 50 and not circles(graph())


def test_no_package_imports_a_private_module_of_another():
    assert not strangers(graph())


def test_imports_point_from_models_to_layers_to_ops_to_kernels():
    assert not upward(graph())
    assert f"{PACKAGE}.ops.routed_ffn" in reach(graph(), f"{PACKAGE}.models.pretrain")


def test_what_is_looked_for_is_found():
    names = ("ops.a", "ops._b", "layers.c", "checks", "models.d", "training._e")
    edges: dict[str, set[str]] = {f"{PACKAGE}.{name}": set() for name in names}

    def add(one: str, other: str) -> None:
        edges[f"{PACKAGE}.{one}"].add(f"{PACKAGE}.{other}")

    add("ops.a", "ops._b"), add("layers.c", "ops.a"), add("layers.c", "checks"), add("models.d", "layers.c")
    assert not circles(edges) and not strangers(edges) and not upward(edges)
    add("checks", "models.d"), add("models.d", "training._e")
    assert circles(edges) == {f"{PACKAGE}.{name}" for name in ("checks", "layers.c", "models.d")}
    assert strangers(edges) == {(f"{PACKAGE}.models.d", f"{PACKAGE}.training._e")}
    assert upward(edges) == {(f"{PACKAGE}.layers.c", f"{PACKAGE}.models.d")}
    source = f"from {PACKAGE} import ops\nfrom {PACKAGE}.ops import a, other\ndef f():\n    import {PACKAGE}.checks\n"
    known = frozenset({PACKAGE, f"{PACKAGE}.ops", f"{PACKAGE}.ops.a", f"{PACKAGE}.checks"})
    assert _imported(source, "m", known) == {f"{PACKAGE}.ops", f"{PACKAGE}.ops.a", f"{PACKAGE}.checks"}


def test_what_an_editor_follows_from_an_op_to_its_kernel_is_no_string():
    for module, path in MODULES.items():
        if module.startswith(tuple(f"{PACKAGE}.{name}" for name in ORDER[1:])):
            assert "import_module" not in path.read_text() and "__import__" not in path.read_text(), module
