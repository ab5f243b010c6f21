"""DropPath (stochastic depth: Huang et al., arXiv 1603.09382) as skipped work.

A sample that a branch drops contributes nothing to it, forward or backward. So the branch runs on the rows of the other
samples alone, side by side; a row index says where they stand, and all other rows of the residual stream stay as they
are, bit for bit. All factors of a step are drawn before the first layer, on the host, which then knows how many rows
every branch computes without asking the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.route_plan import RoutePlan


class Branch(NamedTuple):
    """What one branch of one layer computes: R rows, of the C rows of the residual stream.

    Attributes:
        plan: the route plan of the branch's rows; dropped samples have empty segments.
        row_index: int32 [R], the place of each in the stream; None where the branch takes every row.
        drop_path: float32 [samples], DropPath's factor of each sample; None where there is no DropPath.
        sample: int32 [C], the sample of each row of the stream; None without ``drop_path``.
    """

    plan: RoutePlan
    row_index: Tensor | None = None
    drop_path: Tensor | None = None
    sample: Tensor | None = None

    def arrival(self) -> dict[str, Any]:
        """How the branch's rows come back into the residual stream: the keyword arguments of ``residual``."""
        # Where rows are skipped, the branch's plan marks those behind its last as inert.
        offsets = None if self.row_index is None else self.plan.offsets
        return {"drop_path": self.drop_path, "sample": self.sample, "row_index": self.row_index, "offsets": offsets}


class Branches(NamedTuple):
    """The two branches of a layer."""

    attention: Branch
    feed_forward: Branch


def draw_drop_path(rates: Sequence[float], sample_count: int, generator: torch.Generator | None = None) -> Tensor:
    """DropPath's factors, 0 or 1 / (1 - p): float32 [layers, 2, S] on the CPU, drawn independently.

    Args:
        rates: the probability p of each layer, in [0, 1).
        sample_count: S.
        generator: of the random numbers, on the CPU; None: the default one.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    require(all(0.0 <= rate < 1.0 for rate in rates), f"rates: expected probabilities in [0, 1), got {list(rates)}")
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the process's defaults are
    share = 1.0 - torch.tensor(list(rates), **on_cpu)[:, None, None]
    return (torch.rand(len(rates), 2, sample_count, generator=generator, **on_cpu) < share).float() / share


def branches(plan: RoutePlan) -> list[Branches]:
    """Both branches of every layer of a plan that has DropPath's factors.

    Where the host knows a branch's rows, the branch holds just these. Otherwise it holds as many as the plan, its own
    first and the others inert, and nothing is read from the device.
    """
    assert plan.drop_path is not None
    flat, counts = plan.drop_path.flatten(0, 1), [count for layer in plan.branch_row_counts for count in layer]
    rows, restricted = _restrict(plan, flat != 0)
    found = []
    for b, drop_path in enumerate(flat):
        row_counts = counts[b] if counts else ()
        if counts and row_counts == plan.row_counts:
            found.append(Branch(plan, None, drop_path, plan.sample))
            continue
        size = sum(row_counts) if counts else plan.capacity
        whole: dict[str, Any] = {"offsets": restricted["offsets"][b], "cu_seqlens": restricted["cu_seqlens"][b]}
        by_row: dict[str, Any] = {name: value[b, :size] for name, value in restricted.items() if name not in whole}
        own = dataclasses.replace(
            plan, **whole, **by_row, row_counts=row_counts, segment_lengths=(), drop_path=None, branch_row_counts=()
        )
        found.append(Branch(own, rows[b, :size], drop_path, plan.sample))
    return [Branches(*pair) for pair in zip(found[::2], found[1::2], strict=True)]


def _restrict(plan: RoutePlan, computed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Row indices int32 [B, C], a branch's rows first, and the fields of their plans; ``computed`` is bool [B, S]."""
    real = plan.modality < len(plan.modalities)
    of_branch = computed[:, plan.sample.long()] & real
    row = torch.arange(plan.capacity, device=computed.device)
    before, total = of_branch.cumsum(1), of_branch.sum(1, keepdim=True)
    place = torch.where(of_branch, before - 1, total + row - before)
    # As one vector: the host waits for a scatter of several dimensions in deterministic mode, which no graph may hold.
    branch = plan.capacity * torch.arange(computed.shape[0], device=computed.device)[:, None]
    rows = place.new_empty(place.numel()).scatter_(0, (branch + place).flatten(), row.expand_as(place).flatten())
    rows = rows.view_as(place)

    lengths = plan.cu_seqlens.diff(dim=1) * computed[:, None, :]
    ends = lengths.flatten(1).cumsum(1).view_as(lengths)
    cu_seqlens = torch.cat([ends - lengths, ends[:, :, -1:]], dim=2).int()
    offsets = torch.cat([cu_seqlens[:, :, 0], cu_seqlens[:, -1:, -1]], dim=1)

    inert = {
        "modality": len(plan.modalities), "sample": 0, "position": 0, "code": 0, "order": 0, "is_cls": False,
        "source": plan.padded_rows,
    }  # fmt: skip
    live = row < total
    fields = {name: torch.where(live, getattr(plan, name)[rows], value) for name, value in inert.items()}
    return rows.int(), {**fields, "cu_seqlens": cu_seqlens, "offsets": offsets}
