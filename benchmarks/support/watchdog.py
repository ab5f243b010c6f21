"""A limit on how long a process waits for its GPU: one in which a kernel hangs ends, and prints where it was.

A signal handler of Python's does not run inside a call that does not return. The system's alarm ends such a process;
before it does, faulthandler prints the stack of every thread.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from importlib.util import find_spec
from typing import Any

LIMIT = "GPU_RUN_MOST_SECONDS"  # without this variable there is no limit: a sanitizer's process is slow


class Watchdog:
    """Ends this process by SIGALRM once ``GPU_RUN_MOST_SECONDS`` have passed since ``restart``, and none since.

    A kernel that Triton has compiled restarts it too: a cold cache is no fault. ``file`` is where stacks go.
    """

    def __init__(self, file: int = 2) -> None:
        self.seconds = float(os.environ.get(LIMIT) or 0)
        if not self.seconds:
            return
        faulthandler.register(signal.SIGALRM, file, chain=True)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # a stage whose time is over says where it was, too
            faulthandler.register(signal.SIGTERM, file, chain=True)
        if find_spec("triton"):
            from triton import knobs

            knobs.compilation.listener = self._compiled

    def restart(self) -> None:
        """From now on the process has all of its seconds again."""
        if self.seconds:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def stop(self) -> None:
        """Nothing is waited for."""
        if self.seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _compiled(self, *_: Any, **__: Any) -> None:
        if signal.getitimer(signal.ITIMER_REAL)[0]:
            self.restart()


def ended_by_watchdog(code: int | None) -> bool:
    """Whether an exit code is that of a process in which nothing answered in time."""
    return code is not None and sys.platform != "win32" and code == -signal.SIGALRM
