"""setuptools' commands and extension modules of this package; compilation.py and cuda_toolkit.py do their work."""

from __future__ import annotations

from pathlib import Path

from compilation import MODULE, compile_extension, record, sources
from cuda_toolkit import Decision
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "onepeace_fast"


def extensions(decision: Decision) -> list[Extension]:
    """The extension, or none where it is left out: a wheel without it serves every platform."""
    return [] if decision.left_out else [Extension(f"{PACKAGE}.{MODULE}", sorted(map(str, sources())))]


def commands(decision: Decision) -> dict[str, type]:
    """setuptools' commands for this decision."""

    class BuildExtension(build_ext):
        """Compiles by ninja and nvcc instead of by setuptools' compiler."""

        def build_extension(self, extension: Extension) -> None:
            compile_extension(decision, Path(self.get_ext_fullpath(extension.name)).resolve())

    class BuildPython(build_py):
        """Copies the Python files and leaves a record beside them."""

        def run(self) -> None:
            super().run()
            record(decision, Path(PACKAGE) if self.editable_mode else Path(self.build_lib) / PACKAGE)

    return {"build_ext": BuildExtension, "build_py": BuildPython}
