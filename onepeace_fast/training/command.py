"""What ``onepeace-fast train CONFIG.yaml`` does: run, and turn everything that can go wrong into one line."""

from __future__ import annotations

import os
import sys

from onepeace_fast.info import TRAINING_INSTALL, TRAINING_PACKAGES, missing


def run(path: str) -> int:
    """Pretrain as a YAML file says; also under torchrun, as one of its processes.

    Returns:
        0: done. 1: stopped by a loss that is no number, or the last checkpoint could not be written. 2: something is
        missing or does not fit. 130: interrupted. Each but 0 comes with a line on the standard error.
    """
    if absent := missing(TRAINING_PACKAGES):
        return _stop(f"train needs {', '.join(absent)}; type: {TRAINING_INSTALL}", 2)
    from onepeace_fast.training.config import TrainingConfig
    from onepeace_fast.training.distributed import MainFailed, Processes
    from onepeace_fast.training.train import last_checkpoint, train
    from onepeace_fast.training.trainer import NotFinite

    try:
        config = TrainingConfig.load(path)
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
    except KeyboardInterrupt:
        return _stop(f"\nInterrupted: {last_checkpoint(output)}", 130)


def _stop(line: str, code: int, everywhere: bool = False) -> int:
    """Print a line in the main process; with ``everywhere`` in each, where only one of them may know it."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or everywhere:
        print(line if rank == 0 else f"process {rank}: {line}", file=sys.stderr)
    return code
