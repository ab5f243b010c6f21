"""What a user is told to type where a package is missing works where the user is."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from onepeace_fast import info, installation

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("extra", ["demo", "train"])
def test_in_a_checkout_it_is_installed_from_there(extra, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert installation.install_command(extra) == f"pip install -e '.[{extra}]'"
    monkeypatch.chdir(tmp_path)
    assert installation.install_command(extra) == f"pip install -e '{ROOT}[{extra}]'"
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_elsewhere_the_extra_s_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    for marker in ("extra == 'train'", 'extra == "train"'):
        monkeypatch.setattr(metadata, "requires", lambda name, marker=marker: ["torch>=2.8", f"pyyaml; {marker}"])
        assert installation.install_command("train") == "pip install pyyaml"
    monkeypatch.undo()
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    names = installation.install_command("train").removeprefix("pip install ").split()
    assert set(info.TRAINING_PACKAGES) <= set(names)


def test_no_hint_takes_the_library_from_an_index():
    for path in [*(ROOT / "onepeace_fast").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"pip install '?onepeace_fast", path.read_text(encoding="utf-8")), path
