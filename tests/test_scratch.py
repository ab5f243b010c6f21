"""What tests and tools write besides their results stays in this checkout, or is removed."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tools import scratch

PRINT = "import os, sys; from pathlib import Path; from tools import scratch; scratch.use_scratch(Path(sys.argv[1])); "
PRINT += "print(*(os.environ[name] for name in scratch.FOLDERS), sep='\\n')"


def chosen(root: Path, **environment: str) -> list[Path]:
    """The folders that a new process takes for a checkout, as they are when it has ended."""
    inherited = {name: value for name, value in os.environ.items() if name not in scratch.FOLDERS}
    command = [sys.executable, "-c", PRINT, str(root)]
    done = subprocess.run(
        command, env=inherited | environment, cwd=scratch.ROOT, text=True, capture_output=True, check=True
    )
    return [Path(line) for line in done.stdout.splitlines()]


def test_every_library_takes_the_folder_that_it_is_given():
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from onepeace_fast.demo import speech

    found = {"TMPDIR": tempfile.gettempdir(), "TORCHINDUCTOR_CACHE_DIR": cache_dir()}
    found["XDG_CACHE_HOME"] = os.path.dirname(speech.cache_folder())
    assert found == {name: os.environ[name] for name in found}
    if "TRITON_CACHE_DIR" not in os.environ:
        triton = pytest.importorskip("triton")
        assert Path(triton.knobs.cache.dir).is_relative_to(os.environ["TRITON_HOME"])
    matplotlib = pytest.importorskip("matplotlib")
    assert {matplotlib.get_cachedir(), matplotlib.get_configdir()} == {os.environ["MPLCONFIGDIR"]}


def test_a_plain_path_is_used_and_what_is_set_already_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "LONGEST", 4096)
    for name in scratch.FOLDERS:
        monkeypatch.setenv(name, os.environ[name])  # which is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_HOME", "elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", None)
    scratch.use_scratch(tmp_path / "ü")
    assert os.environ["TRITON_HOME"] == "elsewhere"
    assert tempfile.gettempdir() == str(tmp_path / "ü" / "build" / "scratch" / "tmp")
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "ü" / "build" / "scratch" / "matplotlib")


@pytest.mark.parametrize("name", ["a b", "x" * 40])
def test_a_path_with_a_space_or_too_long_for_sockets_leaves_nothing_behind(tmp_path, name):
    folders = chosen(tmp_path / name)
    assert len({folder.parent for folder in folders}) == 1
    assert not folders[0].parent.exists()
    assert not (tmp_path / name).exists()


def test_sockets_of_the_longest_path_can_be_made():
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "ü".ljust(scratch.LONGEST - len(os.fsencode(short)) - 2, "x"))
        folder.mkdir()
        assert len(os.fsencode(folder)) == scratch.LONGEST
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(folder / ("x" * 48)))
