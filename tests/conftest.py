"""What every test relies on: an editable install of this checkout, and skips that name what the machine lacks."""

import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from tools.scratch import use_scratch

ROOT = Path(__file__).resolve().parent.parent
LONGEST = {
    f"tests/{name}.py"
    for name in (
        "demo/test_command", "test_kernels", "csrc/test_races", "test_compile_cuda", "test_compile_kernels",
        "csrc/test_score_gradients", "hardware/test_selftest",
    )
}  # fmt: skip
PACKAGES = {"onepeace_fast": ROOT / "onepeace_fast", "onepeace_fast.kernels": ROOT / "kernels"}

use_scratch()  # before anything that asks for these folders is imported


def shadowed() -> str | None:
    """Say in one line how the packages that Python finds differ from those of this checkout, or return None."""
    for name, folder in PACKAGES.items():
        try:
            if parent := name.rpartition(".")[0]:
                import_module(parent)  # in a source tree it imports its kernels itself
            spec = find_spec(name)
        except ModuleNotFoundError as error:
            return f"onepeace_fast needs the module {error.name}, which is not installed"
        if spec is None or spec.origin is None:
            return f"{name} is not installed"
        if Path(spec.origin).resolve().parent != folder:
            return f"{name} comes from {Path(spec.origin).parent} instead of this checkout"
    return None


def pytest_configure(config: pytest.Config) -> None:
    """End the run in one line where it would test something else than this checkout."""
    if reason := shadowed():
        pytest.exit(f"{reason}: type `pip install -e .` in {ROOT}, or run `make test`.", returncode=4)
    os.environ["ONEPEACE_FAST_MEASURED"] = str(ROOT / "tests" / "unmeasured")  # no measurements of whoever runs them
    import torch

    torch.set_num_threads(1)  # matrices here are tiny: more threads would only wait for each other


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: one of them at the end keeps the other cores waiting."""
    items.sort(key=lambda item: item.path.relative_to(ROOT).as_posix() not in LONGEST)


def missing_compiler() -> bool:
    """Tell whether no C++ compiler is to be found, by torch.compile's own rule: CXX, else the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    return not any(shutil.which(name) for name in names)


def missing_gpu() -> bool:
    """Tell whether torch sees no CUDA device."""
    import torch

    return not torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, or has no time for, and say why."""
    if item.get_closest_marker("longest") and os.environ.get("ONEPEACE_FAST_SKIP_LONGEST"):
        pytest.skip("takes minutes, and ONEPEACE_FAST_SKIP_LONGEST is set; `make test-all` runs it")
    if item.get_closest_marker("gpu"):
        if missing_gpu():
            pytest.skip("torch sees no CUDA device")
        import torch

        torch.backends.cudnn.allow_tf32 = False  # coarser than parity's tolerance, and on by default
        torch.backends.cudnn.deterministic = True  # or convolutions of the front ends may differ from run to run
    if item.get_closest_marker("requires_compiler") and missing_compiler():
        pytest.skip("no C++ compiler is found (set CXX, or install g++)")


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what g++ builds for the tests stays: pytest's cache in this checkout."""
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("builds") if cache is None else cache.mkdir("builds")


@pytest.fixture(scope="session")
def host_extension(builds: Path) -> ModuleType:
    """The CUDA extension compiled for the CPU, once for all tests."""
    from support import host_extension

    return host_extension.build(builds)
