"""The command `onepeace-fast`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import onepeace_fast
from onepeace_fast import _interrupt, bench_command, info
from onepeace_fast.demo import command as demo
from onepeace_fast.demo import paper_command
from onepeace_fast.embedding import embed_command, search_command
from onepeace_fast.estimate import command as estimate
from onepeace_fast.hardware import selftest, tune, warmup
from onepeace_fast.kernels.measured import ENVIRONMENT_VARIABLE
from onepeace_fast.merging import command as merging
from onepeace_fast.report import command as report
from onepeace_fast.training import command as training
from onepeace_fast.training import evaluate_command as evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: success. 1: a failed check. 2: something is missing, or the output could not be written. 130: interrupted.
    141: the reader of the output has gone.
    """
    _interrupt.end()
    _prepare_streams()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, because an error at exit would end with another code
    except BrokenPipeError:
        _silence()
        return 141
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        _silence()
        place = error.filename or "standard output"
        with contextlib.suppress(OSError):  # it may be the standard error itself
            print(f"{place}: cannot be read or written: {error.strerror or error}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.command in _COMMANDS:
        module, *_ = _COMMANDS[arguments.command]
        return module.run(arguments)
    print(info.describe())
    return 0


def _prepare_streams() -> None:
    """Open closed streams on the null device, so that no file gets their numbers; escape what cannot be printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # file names may hold undecodable bytes
        sys.stdout.reconfigure(errors="backslashreplace")


def _silence() -> None:
    """Send what is still in the standard output's buffer to the null device."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no real file
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


_COMMANDS: dict[str, tuple[Any, str, str]] = {
    "demo": (
        demo,
        "sounds find images they were never paired with: train, measure, report",
        "Trains a small ONE-PEACE on scikit-learn's handwritten digits with captions, then on synthetic spoken digits "
        "with captions, lets sounds and images that were never paired find each other, and writes a report with all "
        "of it to look at and listen to. Downloads nothing.",
    ),
    "demo-unival": (
        paper_command.UNIVAL,
        "three claims of UnIVAL's paper tried with a small model: train, merge, measure, report",
        "Trains small UnIVALs on scikit-learn's handwritten digits and on synthetic spoken digits, merges two of them, "
        "and writes a report of transfer, merging and several tasks at once: docs/demo_unival.md. Downloads nothing.",
    ),
    "demo-mico": (
        paper_command.MICO,
        "what more modalities are worth to MiCo, in a context and in pretraining: train, measure, report",
        "Trains small MiCos on handwritten digits, spoken digits, strokes of a pen and tables, and writes a "
        "report of what one to four of them are worth: docs/demo_mico.md. Downloads nothing.",
    ),
    "train": (
        training,
        "pretrain on your own images or audio clips with captions",
        "Pretrains as a YAML file says, alone or as one of torchrun's processes: docs/training.md.",
    ),
    "evaluate": (
        evaluation,
        "measure how well a checkpoint finds one side of held-out pairs by the other",
        "Embeds both sides of a manifest's pairs and prints recall at 1, 5 and 10 and the median rank, in both "
        "directions, beside what a random order gets: docs/training.md.",
    ),
    "embed": (
        embed_command,
        "embed the texts, images and sounds of a manifest into a file",
        "Embeds every different item of a manifest and writes a Parquet file that `search` reads. Started again after "
        "a kill it goes on where it was: docs/embedding.md.",
    ),
    "search": (
        search_command,
        "find the items of such a file that are nearest to a text, an image, a sound or several together",
        "Embeds what you look for, prints the items with the largest cosines, and shows them in a page: "
        "docs/embedding.md.",
    ),
    "merge": (
        merging,
        "average the weights of several checkpoints into one",
        "Averages checkpoints that have the same parts, such as fine-tunings of one model, and writes a checkpoint of "
        "their form: a folder, a .safetensors file, or a .pt file such as upstream's: docs/merging.md.",
    ),
    "selftest": (
        selftest,
        "hold every operation on this machine against its reference in float64",
        "Runs every operation, forward and backward, on the GPU, or on the CPU where there is none, and compares its "
        "results and every gradient with its reference in float64. Where all of them on a GPU keep within their "
        "tolerances, it times the strategies and writes the GPU's file of measurements, which makes the fused backend "
        f"automatic there: into the folder that {ENVIRONMENT_VARIABLE} names, else into your configuration.",
    ),
    "bench": (
        bench_command,
        "time a suite against every peer that is installed, and show it as it runs",
        "Checks what ours and every peer compute, then times them in turn, forward and backward: on a GPU at the "
        "model's sizes, on a CPU at small ones. Needs a checkout: benchmarks/README.md.",
    ),
    "tune": (
        tune,
        "measure the kernels' launch parameters on this GPU",
        "Times a few launch parameters of every kernel on this GPU and writes those that are faster than the rule's "
        "into the GPU's file of measurements, after each that it finds: in the folder that "
        f"{ENVIRONMENT_VARIABLE} names, else in your configuration. Takes minutes.",
    ),
    "warmup": (
        warmup,
        "compile the kernels of a model before its first step",
        "Compiles every Triton kernel that a training step of a model needs, by all cores, into Triton's cache, so "
        "that the first step finds them there.",
    ),
    "report": (
        report,
        "draw benchmark results, and flag what changed between two files",
        "Draws result files as pictures and a page, what was measured apart from what is modelled, and says what was "
        "not measured. With --before it flags what changed beyond the noise.",
    ),
    "estimate": (
        estimate,
        "say by a model whether one fits a GPU, how fast it trains on N of them, and what they send",
        "Works out FLOPs, bytes, memory, the time of a step by several ways as ranges, and what FSDP2 sends, of a "
        "model that need not be built, on GPUs that need not be here. Prints how far it is off where something was "
        "measured.",
    ),
}


def _parser() -> argparse.ArgumentParser:
    text = "PyTorch layers that compute no padding, for modality-routed transformers such as ONE-PEACE."
    parser = argparse.ArgumentParser(prog="onepeace-fast", description=text)
    parser.add_argument("--version", action="version", version=f"onepeace_fast {onepeace_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text, description) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=description)
        module.add_arguments(command)
    text = "show versions, the GPU, and what works on this machine and why the rest does not"
    commands.add_parser("info", help=text, description=f"Shows{text[4:]}.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
