"""Hold both backends to recordings of public implementations: python -m tools.parity [--device cuda] FILE...

A FILE is a recording as .safetensors, or one of tests/goldens as .safetensors.xz; its metadata says of what. There is a
line for each tensor that differs and for each file that is refused, and at last how many checks passed and failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from onepeace_fast.backend import BACKENDS
from tools.parity import mico, mixture_of_transformers, one_peace, torchscale, unival
from tools.parity.recording import Recording, RecordingError, read_whole
from tools.parity.report import Report

COMPARED = ("out.", "mid.", "loss.", "dinput.", "dlogits.", "grad.", "right.", "left.", "whole.", "buffer.")


class Kind(NamedTuple):
    """What runs the recordings of one implementation, and through which backends."""

    compare: Callable[[Recording, str], Report]
    backends: Sequence[str] = BACKENDS


KINDS = {
    "OFA-Sys/ONE-PEACE": Kind(one_peace.compare),
    "microsoft/torchscale": Kind(torchscale.compare),
    "facebookresearch/Mixture-of-Transformers": Kind(mixture_of_transformers.compare),
    "mshukor/UnIVAL": Kind(unival.compare),
    "invictus717/MiCo": Kind(mico.compare),
}


def kind_of(recording: Recording) -> Kind:
    """By the metadata's upstream; that of ONE-PEACE has the sections of its model's YAML instead."""
    if {"encoder", "decoder", "vocab"} <= recording.metadata.keys():
        return KINDS["OFA-Sys/ONE-PEACE"]
    upstream = recording.metadata.get("upstream")
    if upstream not in KINDS:
        raise RecordingError(f"expected a recording of one of {', '.join(KINDS)}, got {upstream or 'no upstream'}")
    return KINDS[upstream]


def run(path: Path, device: str) -> tuple[int, int]:
    """Compare a file by every backend and print what differs: how many checks passed and failed."""
    passed = failed = 0
    try:
        recording = read_whole(path).to(device)
        kind = kind_of(recording)
        for backend in kind.backends:
            recording.looked_at.clear()
            report = kind.compare(recording, backend)
            for name in sorted({name for name in recording.tensors if name.startswith(COMPARED)} - recording.looked_at):
                report.count += 1
                report.failures.append(f"{name}: recorded, and compared with nothing")
            for failure in report.failures:
                print(f"FAIL {path}, {backend}: {failure}")
            passed, failed = passed + report.count - len(report.failures), failed + len(report.failures)
        if not passed + failed:
            raise RecordingError("expected tensors to compare, got none")
    except (ValueError, RuntimeError, LookupError) as error:  # one line, whatever a file makes torch say
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        print(f"FAIL {path}: {' '.join(text.split())}")
        failed += 1
    return passed, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.parity", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .safetensors or .safetensors.xz")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run, by default cpu")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU that torch sees for cuda, got none")
    torch.set_num_threads(1)  # the sums of float32 are in the order of the recordings
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    counts = [run(path, given.device) for path in given.files]
    passed, failed = (sum(column) for column in zip(*counts, strict=True))
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
