"""Build the CUDA extension into this checkout, where Triton's kernels may be compiling at the same time.

    python3 -m tools.gpu_run.extension

Returns 4, after one line that says why, where this machine cannot build it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = 4  # exit code
PACKAGE = Path("onepeace_fast")


def main() -> int:
    """Build what the build backend would build, by its own rules."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "build_backend"))
    from compilation import MODULE, OBJECTS, compile_extension, record
    from cuda_toolkit import decide

    decision = decide()
    record(decision, PACKAGE)
    if decision.left_out is not None:
        return LEFT_OUT
    name = f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    built = (OBJECTS / name).resolve()
    compile_extension(decision, built)
    draft = PACKAGE / f"{name}.new"
    draft.write_bytes(built.read_bytes())
    draft.replace(PACKAGE / name)  # in one step: a process that imports it meanwhile gets all of it or nothing
    return 0


if __name__ == "__main__":
    sys.exit(main())
