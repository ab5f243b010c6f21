"""The command `onepeace-fast`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import onepeace_fast
from onepeace_fast import info


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 1 a failed check, 2 something that is missing."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "info":
        print(info.describe())
        return 0
    if missing := info.missing_demo_packages():
        print(f"The demo needs {' and '.join(missing)}: {info.DEMO_INSTALL}", file=sys.stderr)
        return 2
    from onepeace_fast import demo

    try:
        return demo.run(seed=arguments.seed, steps=arguments.steps, device=arguments.device)
    except demo.NoSuchDevice as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onepeace-fast", description="Fused GPU operations for modality-routed transformers such as ONE-PEACE."
    )
    parser.add_argument("--version", action="version", version=f"onepeace_fast {onepeace_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small model on handwritten digits and captions, then compare both backends (a minute or two)",
        description="Trains a small ONE-PEACE to match scikit-learn's handwritten digits with written captions, names "
        "digits it has not seen, and runs the trained model through both backends. Downloads nothing.",
    )
    demo.add_argument("--seed", type=int, default=0, help="of the weights, the batches and DropPath (default 0)")
    demo.add_argument("--steps", type=_positive, help="training steps (default: enough for a good result)")
    demo.add_argument("--device", choices=("cpu", "cuda"), help="where to train (default: the GPU if torch sees one)")
    commands.add_parser(
        "info",
        help="show versions, the GPU, and what works on this machine and why the rest does not",
        description="Shows versions, the GPU, and what works on this machine and why the rest does not.",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
