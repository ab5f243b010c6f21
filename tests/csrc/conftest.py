"""The CUDA kernels on a CPU: built once a session against csrc/host_shim by g++, and run in processes of their own."""

import shutil
from pathlib import Path

import pytest
from support import host_shim


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Build the program under a sanitizer when a test first asks for it."""
    programs = {}

    def program(sanitizer: str) -> Path:
        if sanitizer not in programs:
            if shutil.which(host_shim.COMPILER) is None:
                pytest.skip(f"no C++ compiler is found (set CXX, or install {host_shim.COMPILER})")
            programs[sanitizer] = host_shim.build(tmp_path_factory.mktemp(sanitizer), sanitizer)
        return programs[sanitizer]

    return program


@pytest.fixture
def attend(build, tmp_path):
    """Run the forward kernel under AddressSanitizer: out and log-sum-exp of each run."""
    return lambda qkv, **arguments: host_shim.forward(build("address"), tmp_path, qkv, **arguments)


@pytest.fixture
def differentiate(build, tmp_path):
    """Run the forward and the backward kernels under AddressSanitizer: the gradients of each run."""
    return lambda qkv, grad, **arguments: host_shim.backward(build("address"), tmp_path, qkv, grad, **arguments)
