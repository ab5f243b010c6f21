"""One optimizer step of a run, and the state that makes the next one the same after a restart."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.models.parameter_names import full, shard_like, upstream_names
from onepeace_fast.training.config import RunConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.optimizer import adamw, learning_rate


class NotFinite(Exception):
    """The loss or the gradient is infinite or not a number; the weights are as before this step."""


class Trainer(ABC):
    """A model on its device, its optimizer and its generators; ``step_number`` counts the optimizer steps done.

    With several processes, all of them must call every method.
    """

    def __init__(self, model: nn.Module, config: Any, processes: Processes) -> None:
        self.model, self.config, self.processes = model.train(), config, processes
        processes.place(model)
        self.step_number = 0
        self.optimizer = self.make_optimizer()
        self.masks = torch.Generator()
        seed = torch.Generator().manual_seed(config.seed)
        seeds = torch.randint(2**62, (2, processes.count), generator=seed, device="cpu")[:, processes.rank].tolist()
        torch.manual_seed(seeds[0])
        self.masks.manual_seed(seeds[1])

    def step(self, batches: Iterator[Mapping[str, Any]]) -> dict[str, float]:
        """Take the next batches, update the weights once, and return the step's numbers, averaged over all processes.

        Raises:
            NotFinite: before anything is updated.
            ValueError: a batch that the model does not take.
        """
        config: RunConfig = self.config
        place, total = config.schedule(self.step_number)
        rate = learning_rate(
            place,
            peak=config.learning_rate,
            warm_up=config.warm_up,
            total=total,
            minimum=config.minimum_learning_rate,
        )
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for _ in range(config.accumulation):
            losses = self.losses(next(batches))
            (losses["loss"] / config.accumulation).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = self.processes.clip_gradients(parameters, config.clip)
        values = self.processes.average(torch.stack([value.float() for value in sums.values()]) / config.accumulation)
        *numbers, gradient = torch.cat([values, norm.float().view(1)]).tolist()  # the step's only wait for the device
        result = dict(zip(sums, numbers, strict=True)) | {"gradient_norm": gradient, "learning_rate": rate}
        if not (math.isfinite(result["loss"]) and math.isfinite(gradient)):
            found = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
            raise NotFinite(f"step {self.step_number + 1} is not finite ({found})")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step_number += 1
        return result

    @abstractmethod
    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The "loss" of a batch that lies on the CPU, and what else is logged."""

    def make_optimizer(self) -> torch.optim.AdamW:
        """The optimizer of the step that comes next."""
        return adamw(self.model, self.config.learning_rate, self.config.weight_decay)

    def pass_forward(self, task: str, inputs: Mapping[str, Any]) -> Any:
        """What the model's method returns, in the precision of the configuration; tensors are on the CPU before."""
        device = self.processes.device
        moved = _on(inputs, device)
        # Without the cache: in older torch a weight that was first cast without gradient loses its gradient.
        with torch.autocast(device.type, torch.bfloat16, self.config.precision == "bfloat16", cache_enabled=False):
            return self.model(task, **moved)

    def weights(self) -> dict[str, Tensor]:
        """All parameters whole, on the CPU, in the main process; empty in the others."""
        return self._gather({name: parameter.detach() for name, parameter in upstream_names(self.model).items()})

    def state(self) -> dict[str, Any]:
        """What the next step needs besides the weights; the optimizer's state is empty except in the main process."""
        generators = {"cpu": torch.get_rng_state(), "masks": self.masks.get_state()}
        if self.processes.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.processes.device)
        optimizer = {}
        for name, parameter in upstream_names(self.model).items():
            if state := self.optimizer.state.get(parameter):
                optimizer[name] = self._gather(state)
        return {"step": self.step_number, "optimizer": optimizer, "generators": self.processes.of_all(generators)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned in the main process."""
        self.step_number = state["step"]
        self.optimizer = self.make_optimizer()
        parameters = upstream_names(self.model)
        place = {id(p): i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        entries = {
            place[id(parameters[name])]: {key: shard_like(value, parameters[name]) for key, value in entry.items()}
            for name, entry in state["optimizer"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        generators = state["generators"][self.processes.rank]
        torch.set_rng_state(generators["cpu"])
        self.masks.set_state(generators["masks"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self.processes.device)

    def _gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, tensor in tensors.items():
            whole = full(tensor)
            if self.processes.is_main:
                result[name] = whole.cpu()
        return result


def _on(value: Any, device: torch.device) -> Any:
    """A tensor, or those in a mapping, a list or a NamedTuple, on a device."""
    if isinstance(value, Mapping):
        return {name: _on(one, device) for name, one in value.items()}
    if isinstance(value, list):
        return [_on(one, device) for one in value]
    if isinstance(value, tuple):
        return type(value)(*(_on(one, device) for one in value))
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
