"""What ``onepeace-fast demo`` does: run, and turn everything that can go wrong into one line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.info import DEMO_INSTALL, DEMO_PACKAGES, missing

DEFAULT_OUTPUT = Path("report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default 0)")
    parser.add_argument("--steps", type=at_least(2), help="training steps of both stages together (default 1200)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to train (default: the GPU if torch sees one)")
    parser.add_argument("--denoise", action="store_true", help="train by denoising contrast too, as the paper: slower")
    parser.add_argument("--output", type=path, help=f"folder for what it makes (default {DEFAULT_OUTPUT})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seeds", type=at_least(1), help="run this many seeds and print the spread, without a report")
    rank = "rank images for a digit that you say in English, a second or two"
    what.add_argument("--wav", type=os.path.expanduser, metavar="FILE", help=rank)


def run(arguments: argparse.Namespace) -> int:
    """Run as the options say.

    Returns:
        0: done. 1: the two backends disagree. 2: something is missing or does not fit. 130: interrupted. Each but 0
        comes with a line that says why.
    """
    if absent := missing(DEMO_PACKAGES):
        return stop(f"demo needs {', '.join(absent)}; type: {DEMO_INSTALL}")
    import torch

    from onepeace_fast.demo.experiment import Steps
    from onepeace_fast.demo.rank import rank
    from onepeace_fast.demo.run import Options, run, run_seeds
    from onepeace_fast.demo.training import one_thread

    gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not gpu:
        return stop("--device: expected cpu, got cuda, and torch sees no CUDA device here; leave the option out")
    half = (arguments.steps or 0) // 2
    steps = Steps(half, arguments.steps - half) if half else Steps()
    device = arguments.device or ("cuda" if gpu else "cpu")
    options = Options(arguments.seed, steps, arguments.denoise, device, arguments.output or DEFAULT_OUTPUT)
    try:
        with one_thread():
            if arguments.wav is not None:
                return rank(arguments.wav, options, anywhere=arguments.output is None)
            options.output.mkdir(parents=True, exist_ok=True)  # fail now, not after minutes of training
            return run_seeds(options, arguments.seeds) if arguments.seeds else run(options)
    except ValueError as error:
        return stop(str(error))
    except BrokenPipeError:  # the reader has gone
        raise
    except OSError as error:
        return stop(f"{error.filename or options.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        return stop("\nStopped.", 130)
