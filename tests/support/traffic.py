"""Count what kernels read and write while Triton's interpreter runs them: elements of unmasked lanes, by tensor."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onepeace_fast.kernels.launch import Configuration


@dataclass
class Launch:
    """A kernel that ran: its tensors by name, and how often it loaded and stored each element of them.

    ``loads`` and ``stores`` have a row for each program: [programs, elements of the tensor's memory].
    """

    kernel: str
    programs: int
    tensors: dict[str, Tensor]
    loads: dict[str, np.ndarray] = field(default_factory=dict)
    stores: dict[str, np.ndarray] = field(default_factory=dict)
    strays: int = 0

    def times(self, kind: str, name: str) -> Tensor:
        """How often all programs together touched each element: as the tensor lies."""
        tensor, counts = self.tensors[name], getattr(self, kind)[name].sum(0)
        return torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride())

    def most_by_a_program(self, kind: str, name: str) -> int:
        """How often one program touched the element that it touched most."""
        return int(getattr(self, kind)[name].max(initial=0))

    def elements(self) -> Counter[tuple[str, str]]:
        """Elements loaded and stored, by (kind, tensor)."""
        kinds = (("loads", self.loads), ("stores", self.stores))
        return Counter({(kind, name): int(counts.sum()) for kind, by in kinds for name, counts in by.items()})

    def record(self, kind: str, program: int, addresses: np.ndarray, mask: np.ndarray) -> None:
        """Add the lanes that are not masked to the tensor that they point into."""
        live = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.int64).ravel()
        for name, tensor in self.tensors.items():
            first, size, span = tensor.data_ptr(), tensor.element_size(), _span(tensor)
            mine = (live >= first) & (live < first + span * size)
            counts = getattr(self, kind).setdefault(name, np.zeros((self.programs, span), dtype=np.int64))
            if mine.any():
                counts[program] += np.bincount((live[mine] - first) // size, minlength=span)
            live = live[~mine]
        self.strays += live.size


def _span(tensor: Tensor) -> int:
    """Elements of memory from the tensor's first to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))


def named_tensors(configuration: Configuration) -> dict[str, Tensor]:
    """The tensors that a kernel is launched with; those of a tuple by their place in it."""
    found = {}
    for name, value in configuration.arguments.items():
        several = value if isinstance(value, tuple) else [value]
        named = {f"{name} {i}" if isinstance(value, tuple) else name: one for i, one in enumerate(several)}
        found |= {of: one for of, one in named.items() if isinstance(one, Tensor)}
    return found


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """Collect the launches inside."""
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    launches: list[Launch] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch = Configuration.launch

    def program() -> int:
        place, extent = interpreter_builder.grid_idx, interpreter_builder.grid_dim
        return (place[0] * extent[1] + place[1]) * extent[2] + place[2]

    def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].record("loads", program(), pointers.data, mask.data)
        return load(builder, pointers, mask, *rest)

    def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].record("stores", program(), pointers.data, mask.data)
        return store(builder, pointers, value, mask, *rest)

    def counted_launch(configuration: Configuration, grid: tuple[int, ...]) -> None:
        tensors = named_tensors(configuration)
        launches.append(Launch(configuration.kernel.__name__, int(np.prod(grid)), tensors))
        launch(configuration, grid)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    Configuration.launch = counted_launch
    try:
        yield launches
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        Configuration.launch = launch
