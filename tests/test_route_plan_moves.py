"""Plans that go from a DataLoader's worker to a device."""

import dataclasses

import pytest
import torch

from onepeace_fast import RoutePlan


def plan_with_drop_path() -> RoutePlan:
    plan = RoutePlan.from_lengths({"text": [3, 1], "image": [2, 4]}, first_is_cls=True)
    return plan.with_drop_path(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]))


def fields_of(plan: RoutePlan) -> dict[str, object]:
    return {item.name: getattr(plan, item.name) for item in dataclasses.fields(plan)}


def test_a_plan_moves_to_a_device_with_all_its_tensors_and_nothing_else():
    plan, non_blocking = plan_with_drop_path(), []
    moved, to = plan.to("meta"), torch.Tensor.to
    for name, value in fields_of(plan).items():
        mine = getattr(moved, name)
        if isinstance(value, torch.Tensor):
            assert (mine.device.type, mine.dtype, mine.shape) == ("meta", value.dtype, value.shape), name
        else:
            assert mine == value, name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "to", lambda self, *given, **how: non_blocking.append(how["non_blocking"]) or to(self, *given)
        )
        plan.to(torch.device("meta")), plan.to("meta", non_blocking=True)
    assert non_blocking == [False] * 10 + [True] * 10
    with pytest.raises(TypeError):
        plan.to(torch.float16)


def test_a_dataloader_pins_every_tensor_of_a_plan(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self.clone())
    plan = plan_with_drop_path()
    other = torch.utils.data._utils.pin_memory.pin_memory({"plan": plan})["plan"]
    tensors = {name: value for name, value in fields_of(plan).items() if isinstance(value, torch.Tensor)}
    assert [id(x) for x in pinned] == [id(x) for x in tensors.values()] and len(tensors) == 10
    for name, value in fields_of(plan).items():
        mine = getattr(other, name)
        assert mine is not value and torch.equal(mine, value) if name in tensors else mine == value, name
