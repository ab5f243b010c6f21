"""Two models compared: whose turn it is, what counts, and differences that were planted."""

import copy
import json
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from support.clocks import MadeUpClock
from torch import Tensor, nn

from onepeace_fast import comparison, timing
from onepeace_fast.comparison import BOTH, FORWARD, compare
from onepeace_fast.differences import Difference, largest
from onepeace_fast.timing import Taken

QUICK = {"rounds": 1}


class Weighted(nn.Module):
    """Multiplies by a weight and adds a bias, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Of x [n, 3]."""
        return x * self.weight + self.bias


def batch() -> Tensor:
    return torch.arange(6, dtype=torch.float64).view(2, 3)


class Day:
    """Stands for the module ``time``: it passes when a call says so. ``started`` is when the rounds begin."""

    def __init__(self, monkeypatch) -> None:
        self.wall = self.own = 0.0
        self.log: list[tuple[str, str]] = []
        self.started = 0
        fake = SimpleNamespace(perf_counter=lambda: self.wall, process_time=lambda: self.own)
        monkeypatch.setattr(timing, "time", fake)
        whole = comparison.interleaved

        def begun(*args, **kwargs):
            self.started = len(self.log)
            return whole(*args, **kwargs)

        monkeypatch.setattr(comparison, "interleaved", begun)

    def model(self, name, wall, own=None, weight=None):
        """A model whose n-th round in a mode takes ``wall(n)``, the first after the warm-up being the 0th."""
        weight = torch.ones(3, requires_grad=True) if weight is None else weight

        def call(x):
            mode = BOTH if torch.is_grad_enabled() else FORWARD
            turn = self.log[self.started :].count((name, mode)) - 2
            self.log.append((name, mode))
            self.wall += wall(turn)
            self.own += (own or wall)(turn)
            return x * weight

        return call

    @property
    def rounds(self) -> list[tuple[str, str]]:
        return self.log[self.started :]


def test_models_take_turns_from_the_first_round_to_the_last(monkeypatch):
    day = Day(monkeypatch)
    compare(day.model("a", lambda _: 1.0), day.model("b", lambda _: 1.0), torch.ones(3), rounds=3)
    there = [("a", FORWARD), ("a", BOTH), ("b", FORWARD), ("b", BOTH)]
    assert day.rounds == [*there, *there[::-1]] * 2 + there  # two rounds warm up, and every other one goes backwards


def test_times_are_medians_of_what_follows_the_warm_up_by_both_clocks(monkeypatch):
    day = Day(monkeypatch)
    a = day.model("a", lambda n: [3.0, 1.0, 2.0][n] if n >= 0 else 100.0, lambda _: 4.0)
    b = day.model("b", lambda n: [6.0, 3.0, 2.0][n] if n >= 0 else 50.0, lambda n: [2.0, 1.0, 9.0][max(n, 0)])
    found = compare(a, b, torch.ones(3), rounds=3, names=("old", "new"))
    for mode in (FORWARD, BOTH):
        old, new = found.times[mode]
        assert (old.seconds, new.seconds) == ([3, 1, 2], [6, 3, 2])
        assert found.ratio(mode, wall=True) == (1.0, 2.0, 3.0)  # of the rounds' ratios, 2, 3 and 1
        assert found.ratio(mode) == (0.25, 0.5, 2.25)
    record = found.record()[FORWARD]
    cpu = {"cpu_median_ms": 4e3, "cpu_lower_quartile_ms": 4e3, "cpu_upper_quartile_ms": 4e3}
    wall = {"median_ms": 2e3, "lower_quartile_ms": 1.5e3, "upper_quartile_ms": 2.5e3, "min_ms": 1e3, "max_ms": 3e3}
    assert record["old"] == {**wall, "runs": 3, **cpu}
    assert record["ratio"] == [0.25, 0.5, 2.25] and record["wall_ratio"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("seconds, expected", [(100.0, 10), (0.0, 6)])
def test_as_many_rounds_as_fit_and_six_at_least(monkeypatch, seconds, expected):
    day = Day(monkeypatch)  # a round takes 8 seconds, and two of them warm up
    found = compare(day.model("a", lambda _: 1), day.model("b", lambda _: 3), torch.ones(3), seconds=seconds)
    assert {len(one.seconds) for pair in found.times.values() for one in pair} == {expected + (seconds > 0)}


def test_a_process_s_clock_that_is_too_coarse_gives_no_ratio(monkeypatch):
    day = Day(monkeypatch)
    slow, quick = day.model("a", lambda _: 1.0, lambda _: 0.0), day.model("b", lambda _: 2.0)
    found = compare(slow, quick, torch.ones(3), rounds=2)
    assert found.ratio() == (2, 2, 2) and "CPU ms" not in str(found)


class Shown(Weighted):
    """Also returns its input."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"sum": super().forward(x), "shown": x}


class Off(Shown):
    """One entry of an output is off by a thousandth, and the weight's gradient is twice what it should be."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        doubled = 2 * self.weight - self.weight.detach()  # the same value
        return {"sum": x * doubled + self.bias, "shown": x + torch.tensor([0, 1e-3, 0])}


def test_a_planted_output_and_a_planted_gradient_are_found_to_the_digit():
    found = compare(Shown(), Off(), batch(), loss=lambda output: output["sum"].sum(), **QUICK)
    assert found.outputs["sum"] == Difference(0.0, 15.0)
    assert found.outputs["shown"].absolute == pytest.approx(1e-3) and largest(found.outputs, "absolute") == "shown"
    assert found.gradients == {"weight": Difference(7.0, 14.0), "bias": Difference(0.0, 2.0)}
    assert found.gradients["weight"].relative == 0.5 and found.not_compared == ()
    assert "outputs              1.0e-03   2.0e-04   shown\n" in str(found)
    assert "gradients            7.0e+00   5.0e-01  weight\n" in str(found)


def test_inputs_get_gradients_where_they_require_one_and_no_grad_is_left_behind():
    a, b = Weighted(), Weighted()
    x, y = batch().requires_grad_(), batch()
    a.weight.grad = kept = torch.ones(3, dtype=torch.float64)
    found = compare(lambda x, y: a(x) + y, lambda x, y: b(x) + y + x, {"x": x, "y": y}, loss=torch.sum, **QUICK)
    assert found.gradients == {"input x": Difference(1.0, 4.0)}
    assert x.grad is None and b.weight.grad is None and a.weight.grad is kept and kept.sum() == 3


def test_cotangents_are_random_and_alike_in_every_dtype():
    model = Weighted()
    lower = copy.deepcopy(model).bfloat16()
    gradients = {}
    for name, side in (("a", model), ("b", lower)):
        compared = comparison.ComparedModel(name, side, (torch.ones(3).to(side.weight.dtype),), {}, {}, None)
        gradients[name] = {one.name: one.value for one in compared.gradients(compared.run())}["bias"]
    assert torch.equal(gradients["a"], gradients["b"].double()) and len(gradients["a"].unique()) == 3


def test_parameters_go_by_name_through_wrappers_and_methods_and_others_are_named():
    class Other(Weighted):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            self.more = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def both(self, x):
            return self(x) + self.more

    found = compare(nn.DataParallel(Weighted()), Other().both, batch(), **QUICK)
    assert list(found.gradients) == ["weight"] and found.not_compared == ("bias", "more")
    assert "gradients compared: 1; not in both: bias, more\n" in str(found)


def test_a_gradient_that_one_model_does_not_give_is_zero():
    class Frozen(Weighted):
        def forward(self, x):
            return x * self.weight.detach() + self.bias

    found = compare(Weighted(), Frozen(), batch(), loss=torch.sum, **QUICK)
    assert found.gradients == {"weight": Difference(7.0, 7.0), "bias": Difference(0.0, 2.0)}


@dataclass
class Held:
    """An output with fields."""

    logits: Tensor
    loss: float
    cache: None = None


Named = namedtuple("Named", "first second")


@pytest.mark.parametrize(
    "shape, names",
    [
        (lambda y: y, ["output"]),
        (lambda y: OrderedDict(last=y, hidden=(y, [y])), ["last", "hidden.0", "hidden.1.0"]),
        (lambda y: Named(y, None), ["first"]),
        (lambda y: (Held(y, 2.0), y), ["0.logits", "0.loss", "1"]),
    ],
    ids=["tensor", "mapping", "named tuple", "dataclass"],
)
def test_outputs_of_every_structure_have_names(shape, names):
    model = Weighted()
    found = compare(lambda x: shape(model(x)), lambda x: shape(model(x)), (batch(),), **QUICK)
    assert found.outputs == dict.fromkeys(names, Difference(0.0, 15.0)) | (
        {"0.loss": Difference(0.0, 2.0)} if "0.loss" in names else {}
    )


def test_differences_of_values_that_are_no_numbers_and_of_infinities():
    nan, inf = float("nan"), float("inf")
    first = Difference.of(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0]))
    assert first.absolute != first.absolute and first.magnitude == 1
    assert Difference.of(torch.tensor([-inf, 2.0]), torch.tensor([-inf, 1.0])) == Difference(1.0, 2.0)
    assert Difference.of(torch.tensor([inf, 2.0]), torch.tensor([1.0, 2.0])).absolute == inf
    assert Difference.of(torch.zeros(0), torch.zeros(0)).relative == 0
    sparse = torch.eye(2).to_sparse()
    assert Difference.of(sparse, 3 * torch.eye(2)) == Difference(2.0, 3.0)
    assert largest({"large": Difference(9.0, 9.0), "none": first}, "absolute") == "none"


def test_memory_is_what_autograd_saves_without_parameters():
    model = Weighted()
    found = compare(model, lambda x: model(x).exp(), torch.ones(1000, 3, dtype=torch.float64), **QUICK)
    assert found.memory == {"saved for backward": (24000, 48000)}  # x, and what exp gives
    assert compare(model, model, batch(), backward=False, **QUICK).memory == {}


def test_on_a_gpu_times_are_the_device_s_and_memory_has_the_peak(monkeypatch):
    class Device(MadeUpClock):
        def time(self, call, index, lead=0.0):
            call(index)
            return Taken(0.002, 0.001)

    monkeypatch.setattr(comparison, "_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(comparison, "clock_for", lambda _: Device())
    monkeypatch.setattr(comparison, "peak_bytes", lambda call, _: 2**20 if call.__name__ == "forward" else 2**21)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    found = compare(Weighted(), Weighted(), batch(), rounds=6)
    assert found.memory["peak, forward"] == (2**20, 2**20) and found.memory[f"peak, {BOTH}"] == (2**21, 2**21)
    record = found.record()
    assert "wall_ratio" not in record[FORWARD] and record[FORWARD]["a"]["host_median_ms"] == 1
    assert "forward, ms" in str(found) and "CPU" not in str(found) and "6 rounds on cuda:0" in str(found)


def test_the_table_and_the_record(monkeypatch):
    day = Day(monkeypatch)
    a = day.model("a", lambda _: 0.002, lambda _: 0.004)
    b = day.model("b", lambda _: 0.001, lambda _: 0.001)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = compare(a, b, torch.ones(3, requires_grad=True), rounds=6)
    assert str(found) == (
        "                                   a      b  b / a  95% interval\n"
        "forward, CPU ms                4.000  1.000  0.250   0.250-0.250\n"
        "forward, wall ms               2.000  1.000  0.500   0.500-0.500\n"
        "forward and backward, CPU ms   4.000  1.000  0.250   0.250-0.250\n"
        "forward and backward, wall ms  2.000  1.000  0.500   0.500-0.500\n"
        "saved for backward, MiB        0.000  0.000  1.000\n"
        "\n"
        "largest difference  absolute  relative       in\n"
        "outputs              0.0e+00   0.0e+00   output\n"
        "gradients            0.0e+00   0.0e+00  input 0\n"
        "gradients compared: 1; not in both: unnamed 1 [3] of a, unnamed 1 [3] of b\n"
        "unnamed: what a function closes over has no name to match; give modules, or methods of modules\n"
        "medians of 6 rounds on cpu, 1 thread"
    )
    benchmark = SimpleNamespace(extra_info={"mine": 1})
    found.add_to(benchmark)
    assert benchmark.extra_info == {"mine": 1} | found.record()
    assert json.loads(json.dumps(found.record()))["outputs"] == {"output": {"absolute": 0, "magnitude": 1}}


def raised(error):
    raise error


def fails_later():
    calls = []

    def model(x):
        calls.append(x)
        return 2 * x if len(calls) < 6 else raised(ValueError("no\nmore"))

    return model


X = torch.ones(2, 3, requires_grad=True)
REFUSED = {
    "structure": (
        lambda x: {"y": x, "z": x},
        lambda x: (x,),
        {},
        "structure, got y, z of a alone and 0 of b alone",
    ),
    "shape": (lambda x: x, lambda x: x[0], {}, r"output: .* got float32 \[2, 3\] on cpu of a and float32 \[3\] on cpu"),
    "no gradient": (lambda x: x.detach(), lambda x: x, {}, "a: expected an output that needs a gradient, got none;"),
    "gradient of one": (
        lambda x: (x, x),
        lambda x: (x, x.detach()),
        {},
        "1: expected an output that needs a gradient",
    ),
    "no tensor": (lambda x: x, lambda x: None, {}, "b: expected a tensor in the output, got NoneType"),
    "unknown type": (lambda x: {"s": {1}}, lambda x: x, {}, "s: expected tensors, numbers, or mappings"),
    "in place": (lambda x: x * 1, lambda x: x.detach().mul_(1), {}, "b: expected a model that keeps its inputs"),
    "loss": (lambda x: x, lambda x: x, {"loss": lambda y: y}, "loss: expected a function that returns a tensor of one"),
    "loss, constant": (lambda x: x, lambda x: x, {"loss": lambda y: y.detach().sum()}, "a: .* needs a gradient, got"),
    "no callable": (3, lambda x: x, {}, "a: expected a module or another callable, got int 3"),
    "no rounds": (lambda x: x, lambda x: x, {"rounds": 0}, "rounds: expected 1 or more, got 0"),
    "names": (lambda x: x, lambda x: x, {"names": ("a", "a")}, "names: expected two different ones"),
    "no batch": (
        lambda x: x,
        lambda x: x,
        {"batch": [X]},
        "batch: expected a tensor, a tuple of arguments or",
    ),
    "graph": (lambda x: x, lambda x: x, {"batch": (2 * X,)}, "input 0: expected a tensor without a graph"),
    "device": (lambda x: x, lambda x: x.to("meta"), {"batch": (X,)}, "output: expected one shape and device"),
    "devices": (lambda x: x, lambda x: x, {"batch": X.to("meta").detach()}, "on a CPU or on one CUDA device, got meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(name):
    a, b, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        compare(a, b, **{"batch": X, "rounds": 1} | options)
    assert "\n" not in str(refusal.value)


def test_a_model_that_fails_in_a_round_is_named():
    with pytest.raises(RuntimeError, match=r"^b, forward.*: ValueError: no more$"):
        compare(lambda x: 2 * x, fails_later(), X, rounds=5)


def test_outputs_are_the_same_in_any_order_and_a_model_s_own_buffer_is_read_before_it_is_written_again():
    x, weight = torch.randn(4, 3), torch.nn.Parameter(torch.randn(3))
    found = compare(
        lambda x: {"y": x * weight, "z": 2 * x * weight}, lambda x: {"z": 2 * x * weight, "y": x * weight},
        x.clone().requires_grad_(), rounds=1,
    )  # fmt: skip
    assert all(one.absolute == 0 for one in found.gradients.values()) and all(
        one.absolute == 0 for one in found.outputs.values()
    )
    buffer = torch.empty(4, 3)
    found = compare(buffer.copy_, lambda x: buffer.copy_(2 * x), x, rounds=1, backward=False)
    assert [one.absolute for one in found.outputs.values()] == [pytest.approx(x.abs().max().item())]
