"""The API's pages are rendered from the docstrings, and what these mention is there."""

import ast
import re
import warnings

import pytest
from support.known_names import ROOT, is_known

import onepeace_fast


@pytest.mark.slow
def test_every_public_name_gets_its_page_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    from tools import api_pages

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api_pages.render(tmp_path)
    page = (tmp_path / "onepeace_fast.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in onepeace_fast.__all__)
    assert 'id="contrastive_loss"' in (tmp_path / "onepeace_fast/models/losses.html").read_text(encoding="utf-8")
    assert 'href="onepeace_fast/ops/residual.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_names_in_docstrings_are_there():
    unknown = []
    for path in (ROOT / "onepeace_fast").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        for name in re.findall(r"``([^`]+)``", " ".join(ast.get_docstring(node) or "" for node in documented)):
            if not is_known(name) and name not in strings:
                unknown.append(f"{path.relative_to(ROOT)}: {name}")
    assert not unknown
