"""What a comparison leaves as it was: buffers, random states, graphs; and that both models begin alike."""

import copy

import pytest
import torch
from support.contract import message_of
from torch import Tensor, nn

from onepeace_fast.comparison import compare

QUICK = {"rounds": 1}


class Remembering(nn.Module):
    """Writes into a buffer, replaces another, and a table of its own that its other attributes tell of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("mask", torch.ones(1).expand(3))
        self.register_buffer("table", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of x [n, 3]."""
        self.calls += 1
        self.centre = self.centre + x.detach().mean(0)
        if len(self.table) < len(x):
            self.table = torch.ones(len(x))
        return (x - self.centre) * self.weight * self.mask + self.calls


def batch() -> Tensor:
    return torch.arange(12.0).view(4, 3).sin()


def held(model: nn.Module) -> dict[str, tuple[int, list[float]]]:
    """Which tensor each buffer is, and what it holds."""
    return {name: (id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()}


def normalising() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 3))


def test_equal_models_draw_equal_dropout_and_keep_buffers_and_random_state():
    model = normalising()
    same = copy.deepcopy(model)
    before, state = [held(model), held(same)], torch.get_rng_state()
    found = compare(model, same, batch(), rounds=2)
    assert {one.absolute for one in (*found.outputs.values(), *found.gradients.values())} == {0}
    assert len(found.gradients) == 6 and found.outputs["output"].magnitude > 0
    assert [held(model), held(same)] == before and torch.equal(torch.get_rng_state(), state)


def test_models_that_share_buffers_begin_alike_and_what_a_state_dict_has_comes_back():
    model = Remembering()
    before = held(model)
    found = compare(model, model.forward, batch(), **QUICK)
    assert found.outputs["output"].absolute == 0 and found.gradients["weight"].absolute == 0
    after = held(model)
    assert after.pop("table")[1] == [1] * 4 and before.pop("table") and after == before


def test_a_model_that_fails_leaves_nothing_behind_either():
    model, state = normalising(), torch.get_rng_state()
    before, expected = held(model), "output: expected one shape and device"
    with pytest.raises(ValueError, match=expected) as refusal:
        compare(model, lambda x: torch.rand(2), batch(), **QUICK)
    assert str(refusal.value).startswith(expected)
    assert held(model) == before and torch.equal(torch.get_rng_state(), state)


def test_a_graph_over_the_model_s_buffers_still_has_its_backward_pass():
    model = normalising().eval()
    loss = model(batch()).sum()
    versions = [buffer._version for buffer in model.buffers()]
    compare(model, copy.deepcopy(model), batch(), **QUICK)
    assert [buffer._version for buffer in model.buffers()] == versions
    loss.backward()


def test_lazy_modules_are_compared():
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    assert compare(lazy, lazy, batch(), **QUICK).outputs["output"].absolute == 0


def test_the_random_states_of_cuda_devices_in_use_come_back(monkeypatch):
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))

    def drawing(x):
        for device, state in states.items():
            states[device] = state + 1
        return x * states[0] + states[1]

    found = compare(drawing, drawing, batch(), backward=False, **QUICK)
    assert found.outputs["output"].absolute == 0
    assert {device: state.item() for device, state in states.items()} == {0: 1, 1: 2}


@pytest.mark.gpu
def test_on_a_gpu_equal_models_draw_equal_dropout():
    model = normalising()
    twin = copy.deepcopy(model).cuda()
    state = torch.cuda.get_rng_state()
    found = compare(model.cuda(), twin, batch().cuda(), **QUICK)
    assert found.outputs["output"].relative < 1e-5 and torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize(
    "output, name", [(lambda x: {"a.b": x, "a": {"b": 2 * x}}, "a.b"), (lambda x: {1: x, "1": 2 * x}, "1")]
)
def test_two_tensors_of_one_name_are_refused(output, name):
    said = f"{name}: expected one tensor of this name, which is its keys joined by dots, got two; rename a key"
    assert message_of(compare, output, output, batch(), backward=False, **QUICK) == said
    assert message_of(compare, nn.Identity(), nn.Identity(), output(batch()), **QUICK) == said
    nested, flat = (lambda x: {"a": {"b": x}}), (lambda x: {"a.b": x})
    assert compare(nested, flat, batch(), backward=False, **QUICK).outputs.keys() == {"a.b"}
