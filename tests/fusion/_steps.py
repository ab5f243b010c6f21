"""The steps that one process and two processes train: the first part of a step is the first rank's batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.fusion.test_one_peace import batch

STEPS = 20
KINDS = (("vl", "audio"), ("image", "al"), ("al", "vl"))  # a rank lacks what the other has


def part(step: int, rank: int) -> dict[str, Any]:
    return batch(KINDS[step % len(KINDS)][rank], seed=2 * step + rank)


def loss_of(model: nn.Module, given: dict[str, Any]) -> Tensor:
    return model(**given)[0].square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
