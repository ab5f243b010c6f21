"""Ctrl-C while the command ``onepeace-fast`` still imports: one line and exit code 130, as later on.

This package is imported before the command's first line runs, so it looks here, before anything slow, whether it is
imported for the command. In any other program nothing happens.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def _stop(*_: object) -> None:
    # Not an exception: what is being imported may catch it, or turn it into another one.
    line = b"\nInterrupted.\n" if os.environ.get("RANK", "0") == "0" else b""
    try:
        os.write(2, line)
    finally:
        os._exit(130)


def end() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _for_the_command() -> bool:
    # By the program, not by its arguments: in sys.argv it stands first, in sys.orig_argv behind Python's own options.
    place = len(sys.orig_argv) - len(sys.argv)
    if not sys.argv or place < 1 or sys.orig_argv[place + 1 :] != sys.argv[1:]:
        return False  # a program that changed them, or a child of multiprocessing, which gets its parent's
    program = sys.orig_argv[place]
    if sys.argv[0] == "-m":  # stands there for a module while its package is imported
        return program.removeprefix("-m") == "onepeace_fast.cli"
    name = os.path.basename(program).removesuffix(".exe")
    return program == sys.argv[0] and name == "onepeace-fast" and os.path.isfile(program)


if (
    _for_the_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _stop)
