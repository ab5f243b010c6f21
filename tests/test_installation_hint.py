"""What a user is told to type where a package is missing works where the user is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from onepeace_fast import info, installation

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def python(monkeypatch, tmp_path):
    """An interpreter in ``env ü/bin`` with its commands and pip, in no folder of the PATH."""
    folder = tmp_path / "env ü" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "onepeace-fast"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(metadata, "distribution", lambda name: name)
    return folder / "python"


def _not_installed(name):
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("extra", ["demo", "train"])
def test_in_a_checkout_it_is_installed_from_there(extra, python, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.chdir(ROOT)
    assert installation.install_command(extra) == f"python -m pip install -e '.[{extra}]'"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(installation.install_command(extra))[-1] == f"{ROOT}[{extra}]"
    monkeypatch.setattr(installation, "ROOT", tmp_path / "it's here")
    installation.ROOT.mkdir()
    (installation.ROOT / "pyproject.toml").touch()
    assert shlex.split(installation.install_command(extra))[-1] == f"{installation.ROOT}[{extra}]"
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_it_is_installed_into_the_python_that_lacks_it(python, monkeypatch, tmp_path):
    monkeypatch.chdir(python.parents[1])
    assert installation.install_command("demo").startswith("bin/python -m pip install -e ")
    monkeypatch.chdir(ROOT / "docs")
    assert shlex.split(installation.install_command("demo"))[:4] == [str(python), "-m", "pip", "install"]
    monkeypatch.setattr(metadata, "distribution", _not_installed)
    (tmp_path / "uv").touch(mode=0o755)
    assert shlex.split(installation.install_command("demo"))[:5] == ["uv", "pip", "install", "--python", str(python)]


@pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools is not installed")
def test_setuptools_is_imported_after_the_hint_as_torch_compile_does():
    code = "from onepeace_fast import installation; installation.install_command('demo'); import setuptools"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_elsewhere_the_extra_s_packages_are_named(python, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    for marker in ("extra == 'train'", 'extra == "train"'):
        monkeypatch.setattr(metadata, "requires", lambda name, marker=marker: ["torch>=2.8", f"pyyaml>=6; {marker}"])
        assert installation.install_command("train") == "python -m pip install 'pyyaml>=6'"
    monkeypatch.undo()
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    assert set(info.TRAINING_PACKAGES) <= set(installation.install_command("train").split())


def test_the_command_is_named_so_that_it_is_found(python, monkeypatch, tmp_path):
    monkeypatch.chdir(python.parents[1])
    assert installation.program_command("demo") == "bin/onepeace-fast demo"
    shutil.copy(python.parent / "onepeace-fast", tmp_path)  # another environment's, which the PATH leads to
    assert installation.program_command("demo") == "bin/onepeace-fast demo"
    monkeypatch.setenv("PATH", os.pathsep.join([str(python.parent), str(tmp_path)]))
    assert installation.program_command("demo") == "onepeace-fast demo"
    (python.parent / "onepeace-fast").unlink()
    (tmp_path / "onepeace-fast").unlink()
    assert installation.program_command("demo") == "python -m onepeace_fast.cli demo"


def test_no_hint_takes_the_library_from_an_index():
    for path in [*(ROOT / "onepeace_fast").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"pip install '?onepeace_fast", path.read_text(encoding="utf-8")), path
