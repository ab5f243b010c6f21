"""Upstream's state dicts of MiCo and its parts: strict, with the buffers and the tied weights that they carry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onepeace_fast.models import upstream


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy every parameter; raises ``ValueError`` listing all that does not fit, weights untouched."""
    upstream.load(model, checked(model, state_dict))


def checked(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a state dict has of parameters; raises where a buffer or a tied weight in it has other values."""
    problems, rest = [], {}
    for name, value in state_dict.items():
        expected = _follows(model, state_dict, name)
        if expected is None:
            rest[name] = value
        elif value.shape != expected.shape or not torch.allclose(value.float(), expected.float(), rtol=0, atol=1e-6):
            problems.append(f"{name} differs from the one that follows from the others")
    if problems:
        raise ValueError(f"state_dict: expected MiCo's own, got one whose {'; '.join(problems)}")
    return rest


def _follows(model: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> Tensor | None:
    """What an entry has to be that is no parameter here, on the CPU; None for any other name."""
    for place, module in model.named_modules():
        prefix = f"{place}." if place else ""
        if not name.startswith(prefix):
            continue
        found = getattr(module, "carried", dict)().get(name.removeprefix(prefix))
        if isinstance(found, str):  # a tied weight: the name of the one that it is
            return state_dict.get(prefix + found)
        if found is not None:
            return found
    return None


def state_dict(model: nn.Module, grads: bool) -> dict[str, Tensor | None]:
    """Parameters or their gradients under upstream's names."""
    return upstream.state_dict(model, grads)
