"""A machine on which bootstrap.py runs: processes that are recorded instead of started."""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

CHECKS = ("-m ruff check .", "-m ruff format --check .", "-m mypy")
SCRIPT = Path(__file__).resolve().parents[2] / "bootstrap.py"


class Machine:
    """Stands in for processes: records each command, fails those it is told to, and makes what `venv` would make."""

    def __init__(self, bootstrap) -> None:
        self.bootstrap = bootstrap
        self.commands: list[str] = []
        self.codes: dict[str, int] = {}
        self.interrupted_at = ""
        self.torches: dict[str, tuple] = {}
        self.environments: list[dict[str, str]] = []

    def run(self, command: list[str], **environment: str) -> int:
        line = " ".join(command).replace(str(self.bootstrap.PYTHON), "VENV").replace(sys.executable, "HOST")
        self.commands.append(line)
        self.environments.append(environment)
        if self.interrupted_at and self.interrupted_at in line:
            raise KeyboardInterrupt
        code = next((code for part, code in self.codes.items() if part in line), 0)
        if code == 0 and " -m venv " in line:
            library = "lib/python{}.{}".format(*sys.version_info) if os.name != "nt" else "Lib"
            (self.bootstrap.VENV / library / "site-packages").mkdir(parents=True)
            self.bootstrap.PYTHON.parent.mkdir()
            self.bootstrap.PYTHON.touch()
        return code

    def probe(self, python: Path | str):
        torch = self.torches.get(str(python))
        return self.bootstrap.Torch(*torch) if torch else None

    def started(self, *arguments: str, code: int = 0) -> list[str]:
        """Run bootstrap.py with arguments, check its exit code and return the commands that it started."""
        self.commands.clear()
        assert self.bootstrap.main(list(arguments)) == code
        return list(self.commands)


def offer(bootstrap, monkeypatch, *modules: str, programs: tuple[str, ...] = ()) -> None:
    """Let bootstrap.py find these modules and programs alone."""
    # Along sys.path alone: setuptools, where it is asked for pip, leaves distutils alone and cannot be imported later.
    find = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr(bootstrap, "find_spec", lambda name: find(name) if name in modules else 0)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: name if name in programs else None)


def one_line(text: str) -> str:
    """Return a text that must be one line."""
    assert len(text.strip().splitlines()) == 1, text
    return text.strip()
