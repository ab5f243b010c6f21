"""Which names a text in plain English may mention: those that the code defines, and files that are there."""

import ast
import builtins
import keyword
import re
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_FILE = re.compile(r"[\w./*-]+(/|\.(json|safetensors|yaml|toml|md|py|cuh|cu|h|cpp|bpe|txt))")
_NAME = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)(\(.*\))?")
# What the library saves, and where commands are: no file of the checkout.
_ELSEWHERE = {"config.json", "model.safetensors", "tokenizer.json", "encoder.json", "vocab.bpe", "dict.txt"}


def _stored(tree: ast.AST) -> set[str]:
    """Names that code defines or assigns: functions, classes, parameters, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@cache
def _sources() -> tuple[set[str], dict[str, set[str]]]:
    """What the library's sources define: all names, and what each class defines or inherits."""
    names, members, bases = set(), {}, {}
    folders = ("onepeace_fast", "kernels", "tools", "tests/support")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {*_stored(tree), path.stem, path.parent.name}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                members.setdefault(node.name, set()).update(_stored(node))
                bases[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    for path in (ROOT / "csrc").iterdir():
        if path.is_file():
            names.update(re.findall(r"\w+", path.read_text(encoding="utf-8")))

    def inherited(name: str) -> set[str]:
        foreign = dir(torch.nn.Module) if name in ("Module", "ModuleDict", "Sequential") else ()
        return members.get(name, set()).union(foreign, *(inherited(base) for base in bases.get(name, ())))

    return names, {name: inherited(name) for name in members}


def is_known(text: str) -> bool:
    """Whether a text in backticks is a file that exists or a name that the code has; what is neither passes."""
    if _FILE.fullmatch(text):
        return text in _ELSEWHERE or any(ROOT.glob(text)) or ("/" not in text and any(ROOT.glob(f"*/**/{text}")))
    if not (match := _NAME.fullmatch(text)):
        return True
    names, classes = _sources()
    first, *rest = match[1].split(".")
    if first in ("torch", "nn", "F", "triton", "tl"):
        return True
    if first in classes and rest:
        return rest[0] in classes[first] and all(part in names for part in rest[1:])
    if first.endswith("_") and any(name.startswith(first) for name in names):
        return True  # a prefix
    if any(name.endswith(text) for name in classes):
        return True  # what several classes end in
    known = names | set(keyword.kwlist) | set(dir(builtins)) | set(dir(torch))
    return all(part in known for part in (first, *rest))
