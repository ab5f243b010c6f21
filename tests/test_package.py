"""What is built and installed from this checkout: the right packages, outside the source tree, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import onepeace_fast
import onepeace_fast.kernels

pytest.importorskip("build")

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
IMPORT_ELSEWHERE = """
import sys
target, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))  # importing one of these now fails
sys.path.insert(0, target)
import onepeace_fast, onepeace_fast.kernels
print(onepeace_fast.__file__)
print(onepeace_fast.kernels.__file__)
print(onepeace_fast.__version__)
"""


def quietly(*command: str | Path, folder: Path) -> str:
    """Run a command in a folder, show its output only if it fails, and return it."""
    result = subprocess.run([str(part) for part in command], cwd=folder, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist of this checkout's files and from it a wheel; return their folder."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCE)
    quietly(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", "checkout", folder=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    """The wheel, opened."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_holds_the_library_with_its_kernels_inside_and_no_other_top_level_package(wheel):
    names = set(wheel.namelist())
    information = f"onepeace_fast-{onepeace_fast.__version__}.dist-info"
    assert {"onepeace_fast/__init__.py", "onepeace_fast/kernels/__init__.py", "onepeace_fast/py.typed"} <= names
    assert {f"{information}/licenses/LICENSE", f"{information}/licenses/NOTICE"} <= names
    assert {name.partition("/")[0] for name in names} == {"onepeace_fast", information}


def test_wheel_holds_every_file_of_the_library_and_its_kernels(wheel):
    files = [*(ROOT / "onepeace_fast").rglob("*"), *(ROOT / "kernels").rglob("*")]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.is_file() and path.suffix != ".pyc"}
    expected = {f"onepeace_fast/{name}" if name.startswith("kernels/") else name for name in names}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_sdist_holds_what_the_library_and_its_tests_are_built_from(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "NOTICE", "README.md", "bootstrap.py", "Makefile"} <= names
    assert {"csrc/README.md", "kernels/__init__.py", "onepeace_fast/py.typed", "tests/conftest.py"} <= names


def test_metadata_carries_the_version_of_the_code_the_licence_and_the_command(wheel):
    information = f"onepeace_fast-{onepeace_fast.__version__}.dist-info"
    metadata = HeaderParser().parsestr(wheel.read(f"{information}/METADATA").decode())
    assert metadata["Version"] == onepeace_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"demo", "train", "bench", "peers", "dev"}
    assert b"onepeace-fast = onepeace_fast.cli:main" in wheel.read(f"{information}/entry_points.txt")


def test_the_gpl_synthesiser_is_needed_by_the_demo_alone_and_is_in_no_wheel(wheel):
    information = f"onepeace_fast-{onepeace_fast.__version__}.dist-info"
    metadata = HeaderParser().parsestr(wheel.read(f"{information}/METADATA").decode())
    needs = [need for need in metadata.get_all("Requires-Dist") if "espeak" in need or "[demo]" in need]
    assert [need.replace(" ", "") for need in needs] == ['espeakng-loader;extra=="demo"']
    # Our own driver, which calls the engine where it is installed.
    assert [name for name in wheel.namelist() if "espeak" in name.lower()] == ["onepeace_fast/demo/espeak.py"]
    suffixes = {Path(name).suffix for name in wheel.namelist() if "dist-info" not in name}
    assert suffixes == {".py", ".typed", ".html", ".json"}


def test_installed_wheel_imports_outside_the_source_tree_without_demo_or_test_packages(built, tmp_path):
    (path,) = built.glob("*.whl")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, path]
    quietly(*pip, folder=tmp_path)
    absent = ["sklearn", "scipy", "tqdm", "yaml", "PIL", "soundfile", "pytest", "hypothesis", "setuptools"]
    output = quietly(sys.executable, "-I", "-c", IMPORT_ELSEWHERE, target, *absent, folder=tmp_path)
    library, kernels, version = output.splitlines()
    assert Path(library) == target / "onepeace_fast" / "__init__.py"
    assert Path(kernels) == target / "onepeace_fast" / "kernels" / "__init__.py"
    assert version == onepeace_fast.__version__


def test_missing_triton_is_reported_in_one_line_and_not_raised(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = onepeace_fast.kernels.unavailable_reason.__wrapped__()
    assert reason.startswith("Triton is not installed") and "\n" not in reason


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.3.1", "Triton 3.3.1 is too old (3.4 or later is needed)"), ("3.4.0", None), ("3.10.0", None)],
)
def test_triton_is_usable_from_3_4_on(monkeypatch, version, reason):
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setattr(sys.modules["triton"], "__version__", version, raising=False)
    assert onepeace_fast.kernels.unavailable_reason.__wrapped__() == reason


def test_damaged_triton_is_reported_in_one_line_and_not_raised(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so:\\n cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    reason = onepeace_fast.kernels.unavailable_reason.__wrapped__()
    assert reason == "Triton cannot be imported: OSError: libtriton.so: cannot open"
