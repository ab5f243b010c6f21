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
    problems, rest, carried = [], {}, _carried(model)
    for name, value in state_dict.items():
        expected = carried.get(name)
        expected = state_dict.get(expected) if isinstance(expected, str) else expected
        if expected is None:
            rest[name] = value
        elif not _equal(value, expected):
            problems.append(f"{name} differs from the one that follows from the others")
    if problems:
        raise ValueError(f"state_dict: expected MiCo's own, got one whose {'; '.join(problems)}")
    return rest


def _carried(model: nn.Module) -> dict[str, Tensor | str]:
    """What a state dict may have that is no parameter here: its values, or the name of the weight that it is."""
    found: dict[str, Tensor | str] = {}
    for place, module in model.named_modules():
        prefix = f"{place}." if place else ""
        own: Mapping[str, Tensor | str] = module.carried() if hasattr(module, "carried") else {}
        found |= {prefix + name: prefix + x if isinstance(x, str) else x for name, x in own.items()}
    return found


def _equal(value: Tensor, expected: Tensor) -> bool:
    """To within what another order of float32's roundings changes."""
    same = isinstance(value, Tensor) and value.shape == expected.shape
    return same and torch.allclose(value.cpu().float(), expected.cpu().float(), rtol=0, atol=1e-6)


def state_dict(model: nn.Module, grads: bool) -> dict[str, Tensor | None]:
    """Parameters or their gradients under upstream's names, and the tied weights once more."""
    found = upstream.state_dict(model, grads)
    return {**found, **{name: found[x] for name, x in _carried(model).items() if isinstance(x, str)}}
