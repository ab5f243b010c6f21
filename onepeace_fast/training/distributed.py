"""The processes of a training run: one, or several under torchrun with the model sharded over them by FSDP2."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from onepeace_fast.checks import require
from onepeace_fast.layers.transformer import TransformerLayer
from onepeace_fast.models.parameter_names import full
from onepeace_fast.models.unival import layers as unival

Result = TypeVar("Result")


class MainFailed(Exception):
    """The main process failed and says why; this one only has to stop."""


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def start(cls, device: str | None) -> Iterator[Processes]:
        """Join the other processes that torchrun started, gloo on a CPU and NCCL on a GPU; or be the only one.

        ``with`` ends their communication where all went well: after a failure the others may never answer, and torchrun
        ends them.

        Args:
            device: "cpu" or "cuda"; None takes a GPU where torch sees one.

        Raises:
            ValueError: "cuda" where torch sees no GPU, or fewer than the processes of this machine need.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        rank, count, local = (int(os.environ.get(n, v)) for n, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if kind == "cuda":
            found = torch.cuda.device_count()
            require(
                found > local,
                f"device: expected a GPU for process {local + 1} of this machine, got {found} that torch sees",
            )
            torch.cuda.set_device(local)
            torch.backends.cudnn.deterministic = True  # a run that goes on ends in the bits of one that never stopped
        if count > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        yield cls(rank, count, torch.device(kind, local) if kind == "cuda" else torch.device(kind))
        if count > 1:
            dist.destroy_process_group()
            atexit.register(gc.collect)  # a thread of gloo that sharded modules keep would abort the ending interpreter

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and lines."""
        return self.rank == 0

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` in the main process; all processes get what it returns.

        Raises:
            MainFailed: in the other processes, where it raises an ``Exception`` in the main one.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [False, None]
        if self.is_main:
            try:
                outcome = [True, function()]
            except Exception:
                dist.broadcast_object_list(outcome, src=0)
                raise
        dist.broadcast_object_list(outcome, src=0)
        if not outcome[0]:
            raise MainFailed
        return outcome[1]

    def of_all(self, value: Result) -> list[Result]:
        """Every process's value, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def average(self, value: Tensor) -> Tensor:
        """The mean of every process's tensor."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value

    def place(self, model: nn.Module) -> None:
        """Move a model to its device, sharded over all processes where there are several.

        Each layer gathers its weights when it runs, all others belong to the root: so do MiCo's layers, since processes
        with unlike modalities run them unlike often, while gathering takes all processes. A scalar, such as
        ONE-PEACE's ``logit_scale``, cannot be sharded: every process has it whole.
        """
        if self.count == 1:
            model.to(self.device)
            return
        mesh = init_device_mesh(self.device.type, (self.count,))
        scalars = {parameter for parameter in model.parameters() if not parameter.dim()}
        for parameter in scalars:
            parameter.data = parameter.data.to(self.device)
        layers = [module for module in model.modules() if isinstance(module, TransformerLayer | unival.Layer)]
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, ignored_params=scalars)
            # gloo in older releases of torch sums where it is asked for an average.
            cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)

    def clip_gradients(self, parameters: Iterable[Tensor], maximum: float) -> Tensor:
        """Scale the gradients of all processes to a total norm of at most ``maximum``; returns the norm before that.

        FSDP2 has averaged the gradients of what it shards; those of whole parameters are averaged here.
        """
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.count > 1:
            for parameter in whole:
                self.average(cast(Tensor, parameter.grad))
        groups = [group for group in (sharded, whole) if group]
        norms = [full(nn.utils.get_total_norm([cast(Tensor, p.grad) for p in group])) for group in groups]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, maximum, norm)
        return norm
