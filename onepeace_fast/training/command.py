"""What ``onepeace-fast train`` does: run, and turn everything that can go wrong into one line."""

from __future__ import annotations

import argparse
import os
import sys

from onepeace_fast.info import TRAINING_INSTALL, TRAINING_PACKAGES, missing
from onepeace_fast.installation import program_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration, or the first run, which makes its own."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("configuration", nargs="?", metavar="CONFIG.yaml", help="the run: examples/ has three")
    text = "draw a small data set into ./first_run and train on it: under a minute on a CPU"
    what.add_argument("--first-run", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Pretrain as the arguments say; returns what ``pretrain`` does."""
    return first_run() if arguments.first_run else pretrain(arguments.configuration)


def first_run() -> int:
    """Draw pictures with captions, train on them, and say what to type next; returns what ``pretrain`` does."""
    if absent := missing(TRAINING_PACKAGES | {"pillow": "PIL"}):
        return _stop(f"train needs {', '.join(absent)}; type: {TRAINING_INSTALL}", 2)
    import torch

    from onepeace_fast.training import checkpoint
    from onepeace_fast.training.config import TrainingConfig
    from onepeace_fast.training.first_run import HELD_OUT, prepare

    try:
        path = prepare()
    except ValueError as error:
        return _stop(str(error), 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small matrices gain nothing from a second, and lose much if other programs run
    try:
        code = pretrain(str(path))
    finally:
        torch.set_num_threads(threads)
    if code == 0:
        last = checkpoint.all_in(TrainingConfig.load(path).path("output"))[-1]
        held_out = path.with_name(HELD_OUT)
        print(
            f"Next, how well it finds pictures it was not trained on: {program_command(f'evaluate {last} {held_out}')}"
        )
        print(f"Then your own files: {path} is a configuration to start from, docs/training.md explains it")
    return code


def pretrain(path: str) -> int:
    """Pretrain as a YAML file says; also under torchrun, as one of its processes.

    Returns:
        0: done. 1: stopped by a loss that is no number or by too little memory, or the last checkpoint could not be
        written. 2: something is missing or does not fit. 130: interrupted. Each but 0 comes with a line on the standard
        error.
    """
    if absent := missing(TRAINING_PACKAGES):
        return _stop(f"train needs {', '.join(absent)}; type: {TRAINING_INSTALL}", 2)
    from onepeace_fast.training.distributed import MainFailed, Processes
    from onepeace_fast.training.start import read_run
    from onepeace_fast.training.train import last_checkpoint, train
    from onepeace_fast.training.trainer import NotFinite

    try:
        config = read_run(path)
    except ValueError as error:
        return _stop(str(error), 2)
    output = config.path("output")
    try:
        with Processes.start(config.device) as processes:
            return train(config, processes)
    except MainFailed:
        return 2
    except NotFinite as error:
        return _stop(f"Stopped: {error}; {last_checkpoint(output)}", 1)
    except (ValueError, ImportError) as error:
        return _stop(str(error), 2, everywhere=True)
    except BrokenPipeError:  # the reader has gone
        raise
    except OSError as error:
        return _stop(f"{error.filename or output}: {error.strerror or error}", 2, everywhere=True)
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        line = f"Stopped: expected memory for the model and a batch, got too little ({reason})"
        return _stop(f"{line}; {last_checkpoint(output)}", 1, everywhere=True)
    except KeyboardInterrupt:
        return _stop(f"\nInterrupted: {last_checkpoint(output)}", 130)


def _is_of_memory(error: Exception) -> bool:
    """Whether a GPU, or the host, has too little: torch's allocator of the host has no error of its own."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _stop(line: str, code: int, everywhere: bool = False) -> int:
    """Print a line in the main process; with ``everywhere`` in each, where only one of them may know it."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or everywhere:
        print(line if rank == 0 else f"process {rank}: {line}", file=sys.stderr)
    return code
