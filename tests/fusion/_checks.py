"""What every family of ``fuse`` must pass, on a stand-in of its own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast import FusedModel, fuse, use_backend
from onepeace_fast.differences import named_tensors
from onepeace_fast.tolerance import assert_within_rule

Batch = Mapping[str, Any]
STEPS = 20


@dataclass(frozen=True)
class Case:
    """A stand-in of a family's models.

    Attributes:
        make: a float32 model with random parameters that hide nothing (no zeros, no ones), in evaluation mode.
        batch: keyword arguments of its call from a seed: ragged, with floating-point inputs in float32.
        parts: the paths of what is fused in it.
        loss: from its output to a number; without it each floating-point output times fixed random numbers.
        wide: whether values are compared in float64, where a fault cannot hide in rounding: the rule of float32 is luck
            for gradients of few numbers that sum many.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    parts: tuple[str, ...]
    loss: Callable[[Any], Tensor] | None = None
    wide: bool = False


def run(case: Case, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
    """Outputs and gradients by name; those of inputs that require a gradient too."""
    model.zero_grad()
    inputs = {
        name: value.detach().clone().requires_grad_() if is_float(value) else value for name, value in batch.items()
    }
    output = model(**inputs)
    loss_of(case, output).backward()
    found: dict[str, Tensor | None] = {f"output {name}": value for name, value in floats(output).items()}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"gradient of input {name}": value.grad for name, value in inputs.items() if is_float(value)}
    return {name: None if value is None else value.detach().clone() for name, value in found.items()}


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def floats(output: Any) -> dict[str, Tensor]:
    return {name: value for name, value in named_tensors(output, strict=False).items() if is_float(value)}


def loss_of(case: Case, output: Any) -> Tensor:
    if case.loss is not None:
        return case.loss(output)
    generator = torch.Generator().manual_seed(0)
    terms = []
    for value in floats(output).values():
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        terms.append((value * weights).sum() if value.requires_grad else value.new_zeros(()))
    return torch.stack(terms).sum()


def exact(case: Case, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
    """What a model that is not fused computes in float64."""
    return run(case, copy.deepcopy(model).double(), widened(batch))


def widened(batch: Batch) -> Batch:
    return {name: value.double() if is_float(value) else value for name, value in batch.items()}


def assert_near(name: str, value: Tensor, expected: Tensor, part: float = 1e-10) -> None:
    """Fail where a number differs by more than a part of the largest, or of 1."""
    apart = (value - expected).abs().max().item()
    assert apart <= part * max(1.0, expected.abs().max().item()), f"{name}: {apart} apart"


def check_values_and_undo(case: Case) -> None:
    """Outputs and every gradient by the tolerance rule, the same ones absent; after ``undo`` every bit as before."""
    for seed in range(3):
        model, batch = case.make(), case.batch(seed)
        if case.wide:
            model, batch = model.double(), widened(batch)
        truth, plain = exact(case, model, batch), run(case, model, batch)
        before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
        handle = fuse(model)
        assert tuple(handle.parts) == case.parts
        with use_backend("fused"):
            fused = run(case, model, batch)
        assert all(part.fused_calls > 0 for part in handle.report().parts), str(handle.report())
        assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
        assert fused.keys() == plain.keys()
        for name, value in fused.items():
            expected = plain[name]
            assert (value is None) == (expected is None), f"{name}: one of fused and plain has none"
            if value is not None:
                if case.wide:
                    assert_near(name, value, expected)
                else:
                    assert_within_rule(name, value, expected, truth[name])
        handle.undo()
        assert not any("forward" in module.__dict__ for module in model.modules())
        again = run(case, model, batch)
        assert all(same_bits(value, plain[name]) for name, value in again.items())


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def check_copies(case: Case) -> None:
    """A deep copy and a pickle compute with their own parameters, and have a way back."""
    batch, model = case.batch(0), case.make()
    fuse(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with use_backend("fused"):
        unchanged = run(case, model, batch)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(1.1)
            mine = run(case, other, batch)
            assert all(same_bits(value, unchanged[name]) for name, value in run(case, model, batch).items())
            FusedModel(other).undo()
            own = run(case, other, batch)
            for name, value in mine.items():
                if value is not None:
                    torch.testing.assert_close(value, own[name], rtol=1e-3, atol=1e-4, msg=name)
            assert any(not same_bits(value, unchanged[name]) for name, value in mine.items())


def losses(case: Case, model: nn.Module, steps: int = STEPS) -> list[float]:
    """Of training in float32: two batches a step, clipped, AdamW; random numbers from one seed."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for part in range(2):
            loss = loss_of(case, model(**case.batch(2 * step + part))) / 100
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(total)
    return found


def check_training(case: Case) -> None:
    """Twenty steps fused and not: the same losses, which change by more than they differ."""
    plain = losses(case, case.make().train())
    model = case.make().train()
    fuse(model)
    with use_backend("fused"):
        fused = losses(case, model)
    apart = max(abs(a - b) for a, b in zip(plain, fused, strict=True))
    assert apart < 1e-3 * max(map(abs, plain)), f"{apart} apart: {plain} {fused}"
    assert max(plain) - min(plain) > 10 * apart


def check_changed_part(case: Case, path: str) -> None:
    """A hook on a module that is read past its call runs, as does the model's own code, and the report says so."""
    model, batch, seen = case.make(), case.batch(0), []
    plain = run(case, model, batch)
    handle = fuse(model)
    hook = model.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    with use_backend("fused"):
        hooked = run(case, model, batch)
        assert seen and all(same_bits(value, plain[name]) for name, value in hooked.items())
        assert any("hooks" in reason for part in handle.report().parts for reason in part.own_calls)
        hook.remove()
        run(case, model, batch)
    assert any(part.fused_calls for part in handle.report().parts)
