"""What training adds to a layer: dropout (Srivastava et al., 2014) and DropPath (Huang et al., arXiv 1603.09382).

    x + keep * dropout(branch)

keep is 0 or 1 / (1 - p) for a whole sample, drawn for each branch; p grows linearly from 0 to the configured rate over
the layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Noise(NamedTuple):
    """Of one layer; without arguments there is none."""

    dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: Tensor | None = None  # float32 [branches, samples], factors
    sample: Tensor | None = None  # int32 [rows], of packed rows; None where rows are samples
    seeds: Tensor | None = None  # int64 [branches], of dropout in an op

    def of_op(self, branch: int) -> dict[str, Any]:
        """The keyword arguments of ``residual``."""
        found: dict[str, Any] = {}
        if self.drop_path is not None:
            found = {"drop_path": self.drop_path[branch], "sample": self.sample}
        if self.dropout and self.seeds is not None:
            found |= {"dropout": self.dropout, "seed": self.seeds[branch]}
        return found

    def on(self, y: Tensor, branch: int) -> Tensor:
        """keep * dropout(y), [rows, dim] or [samples, length, dim]."""
        y = F.dropout(y, self.dropout) if self.dropout else y
        if self.drop_path is None:
            return y
        factor = self.drop_path[branch].to(y.dtype)
        return y * (factor[:, None, None] if self.sample is None else factor[self.sample.long(), None])


def draw(
    dropout: float, activation_dropout: float, drop_path_rate: float, layers: int, branches: int, samples: int,
    sample: Tensor | None, device: torch.device,
) -> list[Noise]:  # fmt: skip
    """The noise of each layer.

    Args:
        dropout, activation_dropout: probabilities.
        drop_path_rate: the last layer's.
        layers, branches, samples: how many there are.
        sample: int32 [rows], the sample of each packed row; None where rows are samples.
        device: of the tokens.
    """
    factors: list[Any] = [None] * layers
    if drop_path_rate:
        keep = 1 - torch.linspace(0, drop_path_rate, layers, dtype=torch.float32, device=device)[:, None, None]
        drawn = torch.rand(layers, branches, samples, dtype=torch.float32, device=device)
        factors = [*((drawn < keep) / keep)]
    seeds: list[Any] = [None] * layers
    if dropout and sample is not None:
        seeds = [*torch.randint(2**62, (layers, branches), device=device)]
    return [Noise(dropout, activation_dropout, *own) for own in zip(factors, [sample] * layers, seeds, strict=True)]
