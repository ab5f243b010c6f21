"""Where tests and tools leave what they write: in ``build/`` of this checkout, not in the home folder or /tmp."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "TMPDIR": "tmp",
    "TRITON_HOME": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "cache",
}
# Bytes of a path whose Unix sockets still fit in 107 of them: Chromium's need 48 more, multiprocessing's 32.
LONGEST = 58


def use_scratch(root: Path = ROOT) -> None:
    """Point this process and those that it starts at folders in ``build/scratch``; what is set already stays.

    A path that is too long for sockets, or has a space, which torch.compile does not take, is replaced by a folder that
    is removed when this process ends.
    """
    folder = root / "build" / "scratch"
    wanted = {variable: name for variable, name in FOLDERS.items() if not os.environ.get(variable)}
    text = os.fspath(folder)
    if wanted and (len(os.fsencode(folder / "tmp")) > LONGEST or any(letter.isspace() for letter in text)):
        folder, process = Path(tempfile.mkdtemp(prefix="onepeace_fast_")), os.getpid()
        atexit.register(lambda: os.getpid() == process and shutil.rmtree(folder, ignore_errors=True))
    for variable, name in wanted.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(folder / name)
    tempfile.tempdir = None  # which was chosen before
