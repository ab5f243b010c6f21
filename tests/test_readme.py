"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=["training loop", "operations"])
def test_an_example_runs_and_gives_finite_numbers(block):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    result = names.get("loss", names.get("out"))
    assert result.isfinite().all()


def test_files_and_commands_that_it_names_exist():
    root = Path(__file__).resolve().parent.parent
    for path in re.findall(r"`((?:onepeace_fast|tests|benchmarks|kernels|csrc)/[\w/.]*)`", README):
        assert (root / path).exists(), path
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE), target
