"""What is built and installed from this checkout: the right packages, outside the source tree, and nothing else."""

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import torch

import onepeace_fast
import onepeace_fast.kernels
from onepeace_fast import cuda_extension

pytest.importorskip("build")

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "results")
LEFT_OUT = "onepeace_fast/cuda_left_out.txt"
INFORMATION = f"onepeace_fast-{onepeace_fast.__version__}.dist-info"
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
CALL_ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from onepeace_fast import RoutePlan, _cuda, cuda_extension, relative_bias_attention
print(_cuda.__file__)
print(_cuda.ARCHITECTURES)
plan = RoutePlan.from_lengths({"text": [5, 3]}, first_is_cls=True)
qkv = torch.randn(8, 3, 2, 32).bfloat16()
places = {name: getattr(plan, name) for name in ("cu_seqlens", "modality", "code", "is_cls")}
expected = relative_bias_attention(qkv, **places, max_length=5)
if torch.cuda.is_available():
    places = {name: value.cuda() for name, value in places.items()}
    actual = relative_bias_attention(qkv.cuda(), **places, max_length=5).cpu()
    assert (actual.float() - expected.float()).abs().max() < 0.03
    print("launched")
else:
    tokens = {**dict.fromkeys("qkv", (0, 0, 0)), **dict.fromkeys(("queries", "keys"), (0,) * 7)}
    sizes = {**dict.fromkeys(("device", "samples", "heads"), 0), "head_dim": 32, "value_dim": 32}
    kinds = {"scale": 1.0, "type": "bfloat16", "head_scale": 0, "head_scale_type": "float32"}
    try:
        attention = _cuda.RelativeBiasAttention(**tokens, **sizes, **kinds, bias=[])
        attention.forward(out=0, log_sum_exp=0, stream=0)
    except RuntimeError as error:
        print(error)
"""


def quietly(*command: str | Path, folder: Path, **environment: str) -> str:
    """Run a command in a folder, show its output only if it fails, and return it."""
    options = {"text": True, "capture_output": True, "env": {**os.environ, **environment}}
    result = subprocess.run([str(part) for part in command], cwd=folder, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist of this checkout's files and from it a wheel without the extension; return their folder."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCE)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", "checkout"]
    quietly(*build, folder=folder, ONEPEACE_FAST_CUDA_ARCHITECTURES="none")
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    """The wheel, opened."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_holds_the_library_with_its_kernels_inside_and_no_other_top_level_package(wheel):
    names = set(wheel.namelist())
    assert {"onepeace_fast/__init__.py", "onepeace_fast/kernels/__init__.py", "onepeace_fast/py.typed"} <= names
    assert {f"{INFORMATION}/licenses/LICENSE", f"{INFORMATION}/licenses/NOTICE"} <= names
    assert {name.partition("/")[0] for name in names} == {"onepeace_fast", INFORMATION}


def test_wheel_holds_every_file_of_the_library_and_its_kernels(wheel):
    files = [*(ROOT / "onepeace_fast").rglob("*"), *(ROOT / "kernels").rglob("*")]
    names = {
        path.relative_to(ROOT).as_posix() for path in files if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    expected = {f"onepeace_fast/{name}" if name.startswith("kernels/") else name for name in names} | {LEFT_OUT}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_sdist_holds_what_the_library_and_its_tests_are_built_from(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "NOTICE", "README.md", "bootstrap.py", "Makefile"} <= names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/relative_bias_attention_forward.cu", "csrc/host_shim/ptx.cuh"} <= sources <= names
    backend = ("backend", "build_commands", "compilation", "cuda_toolkit")
    assert {f"build_backend/{name}.py" for name in backend} <= names
    assert {"csrc/README.md", "kernels/__init__.py", "onepeace_fast/py.typed", "tests/conftest.py"} <= names


@pytest.fixture
def metadata(wheel):
    """The wheel's metadata."""
    return HeaderParser().parsestr(wheel.read(f"{INFORMATION}/METADATA").decode())


def test_metadata_carries_the_version_of_the_code_the_licence_and_the_command(wheel, metadata):
    assert metadata["Version"] == onepeace_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"demo", "train", "hub", "resample", "search", "report", "docs", "bench", "peers", "transformers", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert b"onepeace-fast = onepeace_fast.cli:main" in wheel.read(f"{INFORMATION}/entry_points.txt")


def test_the_gpl_synthesiser_is_needed_by_the_demo_alone_and_is_in_no_wheel(wheel, metadata):
    needs = [need for need in metadata.get_all("Requires-Dist") if "espeak" in need or "[demo]" in need]
    assert [need.replace(" ", "") for need in needs] == ['espeakng-loader;extra=="demo"']
    # Our own driver, which calls the engine where it is installed.
    assert [name for name in wheel.namelist() if "espeak" in name.lower()] == ["onepeace_fast/demo/espeak.py"]
    suffixes = {Path(name).suffix for name in wheel.namelist() if "dist-info" not in name}
    assert suffixes - {".json"} == {".py", ".typed", ".html", ".md", ".txt"}


def test_a_wheel_without_the_extension_serves_every_platform_and_says_why_it_is_without(built, wheel):
    assert [path.name for path in built.glob("*.whl")] == [
        f"onepeace_fast-{onepeace_fast.__version__}-py3-none-any.whl"
    ]
    assert wheel.read(LEFT_OUT) == b"ONEPEACE_FAST_CUDA_ARCHITECTURES=none asked for that\n"


def test_this_installation_has_the_extension_or_the_reason_why_not():
    reason = cuda_extension.unavailable_reason()
    if cuda_extension.extension() is None:
        assert reason.endswith((ROOT / LEFT_OUT).read_text().strip()) and "\n" not in reason
    else:
        assert not (ROOT / LEFT_OUT).exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_a_wheel_with_the_extension_is_built_without_torch_and_called_beside_it(tmp_path):
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_SOURCE)
    environment = tmp_path / "environment"
    quietly(sys.executable, "-m", "venv", environment, folder=tmp_path)
    python = environment / "bin" / "python"
    quietly(python, "-c", "import importlib.util as u; assert u.find_spec('torch') is None", folder=tmp_path)
    pip = [python, "-m", "pip"]
    wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "checkout"]
    names = "compute_80"  # not assembled, which takes long and other tests do
    quietly(*wheel, folder=tmp_path, ONEPEACE_FAST_CUDA_ARCHITECTURES=names)
    (path,) = tmp_path.glob("*.whl")
    quietly(*pip, "install", "--no-deps", "--target", tmp_path / "site", path, folder=tmp_path)
    output = quietly(sys.executable, "-I", "-c", CALL_ELSEWHERE, tmp_path / "site", folder=tmp_path)
    module, architectures, said = output.splitlines()
    assert Path(module).parent == tmp_path / "site" / "onepeace_fast" and architectures == names
    without = "relative_bias_attention: no NVIDIA driver is found"
    assert said == ("launched" if torch.cuda.is_available() else without)


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


def test_pre_commit_and_the_workflow_run_what_make_test_and_ci_run_do():
    yaml = pytest.importorskip("yaml")
    checks = runpy.run_path(str(ROOT / "bootstrap.py"))["CHECKS"]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in local["hooks"]]
    assert entries == [
        " ".join([".venv/bin/python", "-m", *(word for word in check if word != ".")]) for check in checks
    ]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (parts,) = re.findall(r"set -- (.*)", (ROOT / ".ci" / "run").read_text())
    assert workflow["jobs"]["cpu"]["strategy"]["matrix"]["part"] == parts.split()


FORMS = {
    "a command": "import runpy; sys.argv[1:] = ['--version']; runpy.run_module('onepeace_fast.cli', None, '__main__')",
    "an import": "from onepeace_fast import RoutePlan",
    "a submodule first": "import onepeace_fast.kernels.measured",
}


@pytest.mark.parametrize(
    "form, from_checkout",
    [
        pytest.param(*case, marks=[] if case in (("a command", True), ("an import", False)) else [pytest.mark.slow])
        for case in itertools.product(FORMS, (False, True))
    ],
)
def test_a_checkout_that_is_not_installed_imports_its_own_kernels_beside_an_installed_wheel(
    form, from_checkout, built, tmp_path
):
    checkout, site = tmp_path / "check out", tmp_path / "site"
    for name in ("onepeace_fast", "kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=NOT_SOURCE)
    (path,) = built.glob("*.whl")
    zipfile.ZipFile(path).extractall(site)
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
try:
    {FORMS[form]}
except SystemExit as end:
    assert not end.code
print()
print(sys.modules["onepeace_fast.kernels"].__file__)
print(sys.modules["onepeace_fast"].kernels.__spec__.origin)
print(sys.modules["onepeace_fast"].__file__)
"""
    folder = checkout if from_checkout else tmp_path
    output = quietly(sys.executable, "-c", code, folder=folder, PYTHONPATH=str(site))
    *kernels, library = map(Path, output.splitlines()[-3:])
    owner = checkout if from_checkout else site
    assert library == owner / "onepeace_fast" / "__init__.py"
    beside = checkout if from_checkout else site / "onepeace_fast"
    assert kernels == [beside / "kernels" / "__init__.py"] * 2


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.3.1", "Triton 3.3.1 is too old (3.4 or later is needed)"), ("3.4.0", None), ("3.10.0", None)],
)
def test_triton_is_usable_from_3_4_on(monkeypatch, version, reason):
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setattr(sys.modules["triton"], "__version__", version, raising=False)
    assert onepeace_fast.kernels.unavailable_reason.__wrapped__() == reason


def test_missing_or_damaged_triton_is_reported_in_one_line_and_not_raised(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = onepeace_fast.kernels.unavailable_reason.__wrapped__()
    assert reason.startswith("Triton is not installed") and "\n" not in reason
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so:\\n cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    reason = onepeace_fast.kernels.unavailable_reason.__wrapped__()
    assert reason == "Triton cannot be imported: OSError: libtriton.so: cannot open"


IMPORT_ALL = """
import importlib, pkgutil, torch
torch.set_default_device("meta")
import onepeace_fast
for module in pkgutil.walk_packages(onepeace_fast.__path__, "onepeace_fast."):
    if ".demo" not in module.name and ".report" not in module.name:  # whose plots take seconds to import
        try:
            importlib.import_module(module.name)
        except ImportError:  # an extra is missing
            pass
"""


@pytest.mark.slow
def test_importing_any_module_computes_nothing_on_the_process_s_default_device():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
