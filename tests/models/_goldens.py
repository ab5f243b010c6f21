"""The recordings of upstream ONE-PEACE, and every check that a model is held to against them."""

from functools import cache
from pathlib import Path

from tools.parity.one_peace import KINDS, LOSS_MASKS, OnePeaceRecording, check_losses, compare, losses
from tools.parity.recording import read
from tools.parity.report import Report

__all__ = ["FOLDER", "KINDS", "LOSS_MASKS", "Report", "check_losses", "compare", "golden", "losses"]
FOLDER = Path(__file__).resolve().parent.parent / "goldens"


@cache
def golden(name: str) -> OnePeaceRecording:
    """Read a recording: ``tiny``, ``flags`` or ``perlayer``; gradients come back as float32. Do not write into it."""
    return OnePeaceRecording(**vars(read(FOLDER / f"onepeace_{name}.safetensors.xz")))
