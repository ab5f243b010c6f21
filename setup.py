"""Packages and the CUDA extension of onepeace_fast; everything else stands in pyproject.toml.

The folder kernels/ installs as onepeace_fast.kernels: a top-level package kernels would collide with another one.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

from build_commands import commands, extensions
from cuda_toolkit import decide

KERNELS = "onepeace_fast.kernels"
decision = decide()

setup(
    packages=[
        *find_packages(include=["onepeace_fast", "onepeace_fast.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    ext_modules=extensions(decision),
    cmdclass=commands(decision),
)
