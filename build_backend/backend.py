"""The build backend (PEP 517): setuptools', which also asks for what the CUDA extension is compiled with."""

from cuda_toolkit import build_requirements
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks are setuptools' own


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """What pip installs before it builds an editable wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements()
