"""The README's code runs as it stands, and documents link to files and name things of the code that are there."""

import json
import re
from pathlib import Path

import pytest
from support.known_names import is_known

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["training loop", "operations"])
def test_an_example_runs_and_gives_finite_numbers(block):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    result = names.get("loss", names.get("out"))
    assert result.isfinite().all()


def test_files_and_commands_that_it_names_exist():
    for path in re.findall(r"`((?:onepeace_fast|tests|benchmarks|kernels|csrc)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE), target


DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "csrc", "benchmarks", "examples", "tools") for path in (ROOT / folder).rglob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_links_to_files_and_sections_that_are_there(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, section = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}, target


def test_documents_with_links_are_found():
    assert {"README.md", "training.md", "new_modality.md"} <= {path.name for path in DOCUMENTS}
    assert {ROOT / "csrc" / "README.md", ROOT / "benchmarks" / "README.md"} <= set(DOCUMENTS)


def test_pages_that_code_names_are_there():
    for path in (ROOT / "onepeace_fast").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for page in re.findall(r"\b(?:docs|examples|benchmarks|csrc)/[\w/]+\.(?:md|yaml|py)\b", text):
            assert (ROOT / page).exists(), f"{path}: {page}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md"])
def test_names_of_the_code_on_a_page_about_it_are_there(page):
    text = re.sub(r"^```(?!mermaid).*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    names = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    names += [word for label in re.findall(r'"([^"\n]+)"\]', text) for word in re.findall(r"\w+_\w+|\w+\.\w+", label)]
    assert [name for name in names if not is_known(name)] == []
    assert len(names) > 20


def test_the_fault_that_contributing_shows_can_be_planted():
    pytest.importorskip("triton")
    from tools.mutants.fault import KEYS, Fault

    (block,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
    shown = json.loads(block)
    assert set(shown) <= KEYS and Fault(**shown).problem() is None
