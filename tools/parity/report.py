"""How many tensors were compared, and what differs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tools.parity.recording import Recording

# Of the largest magnitude of what float32 recordings hold: two orders of summation differ by less.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5
PROJECTIONS = ("whole", "right", "left")
QUANTISED = 1.6e-5  # how far an int16 with a scale is off


@dataclass
class Report:
    """How many checks ran, and a line for each that failed."""

    count: int = 0
    failures: list[str] = field(default_factory=list)

    def check(
        self, name: str, got: Tensor | None, want: Tensor, tolerance: float, rows: Tensor | slice = slice(None),
        floor: float = 0.0,
    ) -> None:  # fmt: skip
        """Compare to within ``tolerance`` of the wanted tensor's largest magnitude, and ``floor``.

        What is zero throughout, as the gradient of an expert without tokens, so has to be zero, or below ``floor``.
        """
        self.count += 1
        if got is None:
            self.failures.append(f"{name}: no value")
            return
        got, want = got.detach().float(), want.float()
        if got.shape != want.shape:
            self.failures.append(f"{name}: shape {list(got.shape)} instead of {list(want.shape)}")
            return
        if want.dim():
            got, want = got[rows], want[rows]
        error, scale = (got - want).abs().max().item(), want.abs().max().item()
        if not error <= tolerance * scale + floor:  # a NaN fails too
            self.failures.append(f"{name}: off by {error:.3e} where the largest magnitude is {scale:.3e}")

    def check_bits(self, name: str, got: Tensor | None, want: Tensor) -> None:
        """Compare exactly; NaN equals NaN."""
        self.count += 1
        if got is None or got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
            self.failures.append(f"{name}: lost, misshaped or NaN elsewhere")
        elif not torch.equal(got.nan_to_num(), want.nan_to_num()):
            self.failures.append(f"{name}: changed")

    def check_gradient(
        self, recording: Recording, name: str, got: Tensor | None, tolerance: float = GRADIENT_TOLERANCE
    ) -> None:
        """A gradient, or another tensor, against the recorded one, or against what ``projections`` left of it."""
        kinds = [kind for kind in PROJECTIONS if f"{kind}.{name}" in recording.tensors]
        if not kinds:
            tolerance += QUANTISED if name in recording.quantised else 0
            self.check(name, got, recording[name], tolerance)
            return
        parts = {} if got is None else projections(got)
        for kind in parts or kinds:
            self.check(f"{kind} of {name}", parts.get(kind), recording[f"{kind}.{name}"], tolerance)


def projections(tensor: Tensor) -> dict[str, Tensor]:
    """G r and l G of a matrix G, with r and l = cos(1), cos(2), ...: an error changes both; a vector itself.

    What has more dimensions is the matrix of them that is the nearest to a square.
    """
    if tensor.dim() == 1:
        return {"whole": tensor}
    sizes = [(tensor.shape[:i].numel() + tensor.shape[i:].numel(), i) for i in range(1, tensor.dim())]
    wide = tensor.double().reshape(tensor.shape[: min(sizes)[1]].numel(), -1)
    left, right = (torch.arange(1, size + 1, dtype=torch.float64, device=wide.device).cos() for size in wide.shape)
    return {"right": (wide @ right).float(), "left": (left @ wide).float()}
