"""The code of README and docs/ runs and prints what it shows; what documents link to and name is there."""

import json
import re
import runpy
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.known_names import is_known

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "csrc", "benchmarks", "examples", "tools") for path in (ROOT / folder).rglob("*.md")),
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_the_code_of_a_page_runs_and_prints_what_is_shown(page, capsys):
    if "transformers" in page.name:
        pytest.importorskip("transformers")
    names: dict = {}
    printed = []
    for code, shown in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, named(page), "exec"), names)
        printed.append(capsys.readouterr().out)
        assert not shown or printed[-1] == shown
    assert "".join(printed), "expected an example that prints something"
    values = [value for value in names.values() if isinstance(value, torch.Tensor)]
    assert all(value.isfinite().all() for value in values)


def test_pages_with_code_are_found():
    assert {"README.md", "operations.md", "using_the_model.md"} <= {page.name for page in WITH_CODE}


def commands(page: Path) -> list[str]:
    """The indented lines of a page, without their comments."""
    lines = re.findall(r"^    (\S.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_commands_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:onepeace_fast|tests|benchmarks|kernels|csrc|tools|examples)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [
        *re.findall(r"`make ([a-z-]+)", text),
        *(command.split()[1] for command in commands(page) if command.startswith("make ")),
    ]:
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE), target


def test_tests_modules_and_faults_that_commands_of_the_proof_name_are_there():
    from tools.mutants.fault import read_faults

    faults = {fault.name for fault in read_faults()}
    found = [shlex.split(command) for command in commands(ROOT / "docs" / "proof.md")]
    for words in found:
        files = [word.partition("::") for word in words if word.startswith("tests/")]
        for path, _, test in files:
            text, (name, _, case) = (ROOT / path).read_text(encoding="utf-8"), test.partition("[")
            assert not name or f"def {name}(" in text, test
            assert not case or f'"{case[:-1]}"' in text, test
        module = words[words.index("-m") + 1]
        assert find_spec(module) is not None, module
        if module == "tools.mutants":
            assert set(words[words.index(module) + 1 :]) <= faults
    assert len(found) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
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


def test_every_page_can_be_reached_from_the_readme():
    waiting, reached = [ROOT / "README.md"], set()
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / link).resolve() for link in links if ":" not in link]
    assert [named(page) for page in PAGES if page not in reached] == []


def test_pages_that_code_names_are_there():
    for path in (ROOT / "onepeace_fast").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for page in re.findall(r"\b(?:docs|examples|benchmarks|csrc)/[\w/]+\.(?:md|yaml|py)\b", text):
            assert (ROOT / page).exists(), f"{path}: {page}"


# What training.md and installation.md name are keys, curves and files more than names of the code.
ABOUT_CODE = [page for page in PAGES[1:] if page.stem not in ("training", "installation")] + [ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", ABOUT_CODE, ids=named)
def test_names_of_the_code_on_a_page_about_it_are_there(page):
    text = re.sub(r"^```(?!mermaid).*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    names = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    names += [word for label in re.findall(r'"([^"\n]+)"\]', text) for word in re.findall(r"\w+_\w+|\w+\.\w+", label)]
    code = " ".join(code for code, _ in BLOCK.findall(page.read_text(encoding="utf-8")))  # has names of its own
    assert [name for name in names if not is_known(name) and not re.search(rf"\b{re.escape(name)}\b", code)] == []


def test_the_fault_that_contributing_shows_is_one_of_the_planted_ones():
    from tools.mutants.fault import read_faults

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```json\n(.*?)^```", text, re.M | re.S)
    shown = json.loads(block)
    (planted,) = [fault for fault in read_faults() if fault.name == shown["name"]]
    assert {**shown, "tests": tuple(shown["tests"])} == {key: getattr(planted, key) for key in shown}
    assert f"\"'{shown['name']}'\"" in text, "the command that replays it"


@pytest.mark.parametrize(
    "name, parts, cells", [("packed_rows", "padded|packed", 84), ("bias_vector", "vector|pair", 67)]
)
def test_a_picture_is_of_what_the_code_computes(tmp_path, name, parts, cells):
    pytest.importorskip("matplotlib")
    picture, committed = tmp_path / f"{name}.svg", ROOT / "docs" / f"{name}.svg"
    runpy.run_path(str(ROOT / "docs" / "pictures.py"))["main"](picture)

    def look(path: Path) -> list[tuple[str, str, list[str]]]:
        """Each token's cell, how it is filled, and the number in it."""
        _, *found = re.split(rf'<g id="(?=(?:{parts})-)', path.read_text())
        fills = [re.search(r'style="fill: ([^;"]+)', cell)[1] for cell in found]
        hatched = ["hatch" if fill.startswith("url") else fill for fill in fills]
        return [
            (cell.partition('"')[0], fill, re.findall(r"<!-- (\d+) -->", cell)[:1])
            for cell, fill in zip(found, hatched, strict=True)
        ]

    assert look(picture) == look(committed)
    assert len(look(committed)) == cells
