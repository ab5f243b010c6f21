"""The CUDA kernels on a CPU: built once a session against csrc/host_shim by g++, and run in processes of their own."""

import functools
import shutil
from pathlib import Path

import pytest
from support import host_shim
from support.built_once import built_once, digest, version


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quick tests run the same kernels through the op; here they are built once more, under sanitizers."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def build(builds):
    """Build the program under a sanitizer when a test first asks for it."""

    @functools.cache
    def program(sanitizer: str) -> Path:
        if shutil.which(host_shim.COMPILER) is None:
            pytest.skip(f"no C++ compiler is found (set CXX, or install {host_shim.COMPILER})")
        files = [path for path in host_shim.CSRC.rglob("*") if path.is_file()]
        key = digest([*files, Path(host_shim.__file__)], version(host_shim.COMPILER))
        folder = built_once(builds, sanitizer, key, lambda folder: host_shim.build(folder, sanitizer))
        return folder / f"run_{sanitizer}"

    return program


@pytest.fixture
def attend(build, tmp_path):
    """Run both kernels under AddressSanitizer: the results and the gradients of each run."""
    return lambda qkv, grad, **arguments: host_shim.attend(build("address"), tmp_path, qkv, grad, **arguments)
