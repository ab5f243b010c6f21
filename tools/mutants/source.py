"""Find a fragment of code by the function that it is in and by its tokens, whatever its lines and comments are."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PYTHON_COMMENT, CPP_COMMENT = r"\#[^\n]*", r"//[^\n]*|/\*[\s\S]*?\*/"
TOKEN = r"""
    (?P<string>(?i:[rbfu]{0,2})(?:\"{3}(?:\\[\s\S]|[\s\S])*?\"{3}|"(?:\\[\s\S]|[^"\\\n])*"|'(?:\\[\s\S]|[^'\\\n])*'))
  | (?P<number>\.?\d(?:[eE][+-]\d|[\w.])*)
  | (?P<word>\w+)
  | (?P<operator>\*\*=|//=|<<=|>>=|->|::|:=|\+\+|--|\*\*|<<|>>|&&|\|\||[-+*/%&|^=!<>@]=|\S)
"""


class Token(NamedTuple):
    """A token and where it stands in the text."""

    text: str
    start: int
    end: int


class Span(NamedTuple):
    """A part of a text, from a start to before an end."""

    start: int
    end: int


@functools.lru_cache
def tokens(text: str, path: str) -> tuple[Token, ...]:
    """The tokens of a file's text without its comments and without commas that only a formatter sets."""
    comment = PYTHON_COMMENT if is_python(path) else CPP_COMMENT
    found = []
    for match in re.finditer(f"(?P<comment>{comment})|{TOKEN}", text, re.VERBOSE):
        if match["comment"] is None:
            if match[0] in (")", "]", "}") and found and found[-1].text == ",":
                found.pop()
            found.append(Token(match[0], *match.span()))
    return tuple(found)


def occurrences(text: str, path: str, inside: list[Span], fragment: str) -> list[Span]:
    """Where a fragment occurs in parts of a file's text, token by token."""
    wanted = [token.text for token in tokens(fragment, path)]
    if not wanted:
        return []
    found = []
    for part in inside:
        there = [token for token in tokens(text, path) if part.start <= token.start and token.end <= part.end]
        for i in range(len(there) - len(wanted) + 1):
            if all(there[i + j].text == word for j, word in enumerate(wanted)):
                found.append(Span(there[i].start, there[i + len(wanted) - 1].end))
    return found


def is_python(path: str) -> bool:
    """Tell by a file's name whether its language is Python; it is C++ else."""
    return Path(path).suffix == ".py"


@functools.lru_cache
def named_parts(text: str, path: str) -> dict[str, list[Span]]:
    """The functions, classes and constants of a file by their qualified names, which overloads share."""
    found: dict[str, list[Span]] = {}
    for name, part in _python_parts(text) if is_python(path) else _cpp_parts(text, path):
        found.setdefault(name, []).append(part)
    return found


def _python_parts(text: str) -> Iterator[tuple[str, Span]]:
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def position(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def visit(node: ast.AST, prefix: str, in_function: bool) -> Iterator[tuple[str, Span]]:
        for child in ast.iter_child_nodes(node):
            names, first, scope, in_child = [], child, prefix, in_function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names, scope = [child.name], f"{prefix}{child.name}."
                first = child.decorator_list[0] if child.decorator_list else child
                in_child = in_function or not isinstance(child, ast.ClassDef)
            elif isinstance(child, ast.Assign | ast.AnnAssign) and not in_function:
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                end = position(child.end_lineno, child.end_col_offset)
                yield prefix + name, Span(position(first.lineno, first.col_offset), end)
            yield from visit(child, scope, in_child)

    return visit(ast.parse(text), "", False)


CPP_TYPES = {"struct", "class", "union", "enum"}
CPP_NO_FUNCTIONS = {"alignas", "__launch_bounds__", "__attribute__", "decltype", "noexcept", "defined"}


def _cpp_parts(text: str, path: str) -> Iterator[tuple[str, Span]]:
    """By braces alone: namespaces have no names here, and what is within a function is that function."""
    directives = [Span(*match.span()) for match in re.finditer(r"^[ \t]*#(?:\\\n|[^\n])*", text, re.MULTILINE)]
    code = [token for token in tokens(text, path) if not any(d.start <= token.start < d.end for d in directives)]
    scopes: list[tuple[str, int]] = []  # of namespaces and types: the name, and where the declaration began
    begin = i = 0
    while i < len(code):
        word = code[i].text
        if word == "}":
            name, start = scopes.pop()
            if name:
                yield _qualified(scopes, name), Span(start, code[i].end)
            begin = i + 1
        elif word == "{":
            kind, name = _cpp_declared(code[begin:i])
            if kind == "scope":
                scopes.append((name, code[begin].start))
            else:
                i = _closing(code, i)
                if kind == "value":  # it goes on to its semicolon
                    i += 1
                    continue
                yield _qualified(scopes, name), Span(code[begin].start, code[i].end)
            begin = i + 1
        elif word == ";":
            if i > begin and (name := _cpp_declared(code[begin:i])[1]):
                yield _qualified(scopes, name), Span(code[begin].start, code[i].end)
            begin = i + 1
        i += 1


def _qualified(scopes: list[tuple[str, int]], name: str) -> str:
    return "::".join([*(scope for scope, _ in scopes if scope), name])


def _cpp_declared(header: list[Token]) -> tuple[str, str]:
    """What a declaration up to its brace or semicolon declares: a scope, a function or a value, and its name."""
    words = [token.text for token in header]
    while "template" in words:  # its parameters are no words of the declaration
        first = words.index("template")
        depth = 0
        for last in range(first + 1, len(words)):
            depth += {"<": 1, ">": -1, ">>": -2}.get(words[last], 0)
            if depth <= 0:
                break
        words = words[:first] + words[last + 1 :]
    if "namespace" in words:
        return "scope", ""
    depth = 0
    for i, word in enumerate(words):
        if depth == 0 and word == "=" and i:
            bracket = words.index("[") if "[" in words[:i] else i
            return "value", words[bracket - 1]
        if depth == 0 and word == "(" and i and words[i - 1] not in CPP_NO_FUNCTIONS:
            name = words[i - 1] if words[i - 1] != ">" else words[words.index("<") - 1]  # of a specialisation
            return "function", name
        depth += {"(": 1, ")": -1}.get(word, 0)
    if CPP_TYPES & set(words):
        plain = [word for word in words[: words.index(":")] if ":" in words] if ":" in words else words
        names = [word for word in plain if re.fullmatch(r"\w+", word) and word not in CPP_TYPES | CPP_NO_FUNCTIONS]
        return "scope", names[-1] if names else ""
    return "value", ""


def _closing(code: list[Token], opening: int) -> int:
    depth = 0
    for i in range(opening, len(code)):
        depth += {"{": 1, "}": -1}.get(code[i].text, 0)
        if depth == 0:
            return i
    raise ValueError("expected a closing brace, got the end of the file")
