"""Package layout of onepeace_fast; everything else stands in pyproject.toml.

The folder kernels/ installs as onepeace_fast.kernels: a top-level package kernels would collide with another one.
"""

from setuptools import find_packages, setup

KERNELS = "onepeace_fast.kernels"

setup(
    packages=[
        *find_packages(include=["onepeace_fast", "onepeace_fast.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
)
