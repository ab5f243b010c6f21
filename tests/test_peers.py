"""Peers by name: what each needs, how absence and wrong values are reported, and the command that shows it all."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.benchmark_cases import SIZES, tiny_runner, tiny_shape
from support.clocks import MadeUpClock

from benchmarks import bench
from benchmarks.support import peers, results, suites
from benchmarks.support.layer import LayerCase
from benchmarks.support.peers import PEERS, Peer
from benchmarks.support.sections import Setting, frequencies, layer_section, step_section
from benchmarks.support.step import StepCase
from benchmarks.support.suites import SUITES
from benchmarks.support.variants import Budget, Runner, Variant, trained
from onepeace_fast import bench_command
from onepeace_fast.cli import main

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_first_peers_are_those_with_the_learned_bias_and_every_name_is_one():
    names = [peer.name for peer in PEERS]
    first = [
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "sdpa_built_bias",
        "eager",
    ]
    assert names[:6] == first and len(set(names)) == len(names)


def test_a_peer_that_cannot_run_says_why_in_one_line(monkeypatch):
    absent = Peer("absent", "", {}, package="no_such_package.inside")
    assert absent.reason(CUDA, True) == "no_such_package.inside is not installed"
    assert Peer("gpu", "", {}, needs_gpu=True).reason(CPU, True) == "it needs a CUDA device"
    compiled = Peer("compiled", "", {}, compiled=True)
    assert compiled.reason(CPU, False) == "it is compiled, on a CPU with --full alone"
    assert compiled.reason(CUDA, False) is None
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    assert compiled.reason(CPU, True) == "torch.compile needs g++ on a CPU"


def test_every_variant_of_a_peer_is_one_that_its_sections_have():
    where = Setting(CPU, torch.float32, SIZES, sets=1, layers=1)
    for kind in SUITES:
        (section, *_) = [one for one in suites.suite(kind, CPU) if one.kind == kind]
        sections = suites.suite(kind, CPU) if kind in ("attention", "pointwise") else [section]
        known = {name for one in sections for name in one.prepare(where).factories}
        named = {name for peer in PEERS for name in peer.variants.get(kind, ())}
        assert named - known == set(), kind


@pytest.mark.parametrize("section", [layer_section, step_section])
def test_others_ways_of_layer_and_step_keep_the_rule_at_a_ragged_batch(section):
    where = Setting(CPU, torch.float32, SIZES, sets=2, layers=1)
    made = section(tiny_shape(), names=peers.measured(section.__name__.removesuffix("_section"), CPU, False))
    record = made.measure(where, tiny_runner())
    assert results.faults(made.name, record) == []
    checked = {name for name, one in record["variants"].items() if max(one.get("checked", {"": 2}).values()) <= 1}
    assert {"reference", "boolean_mask", "fused"} <= checked


def test_a_planted_wrong_result_is_shown_as_wrong_with_its_error_and_ends_the_command_with_1(
    tmp_path, monkeypatch, capsys
):
    fused = LayerCase.fused

    def planted(self, *arguments, **how):
        variant = fused(self, *arguments, **how)
        forward = variant.forward
        variant.forward = lambda index: forward(index) * 1.001
        return variant

    monkeypatch.setattr(LayerCase, "fused", planted)
    monkeypatch.setattr(suites, "SMALL", SIZES)
    monkeypatch.setattr(
        bench, "suite", lambda *_: [layer_section(tiny_shape(), names=("products", "reference", "fused"))]
    )
    assert main(["bench", "layer", "--seconds", "1", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    (section,) = json.loads(path.read_text())["sections"].values()
    record = section["variants"]["fused"]
    assert record["wrong"].startswith("output: ") and not {"forward", "forward_backward"} & record.keys()
    printed = capsys.readouterr().out
    assert "fused" in printed and f"fused: wrong: {record['wrong']}" in printed
    assert "flash_attention_2 is not measured: flash_attn is not installed" in printed


def test_a_peer_that_is_ahead_by_more_than_the_noise_is_named():
    def variant(ratio, peak):
        return {"over_ours": {"forward": ratio}, "peak_bytes": {"forward": peak}}

    variants = {
        "fused": {"peak_bytes": {"forward": 100}}, "products": variant([0.1, 0.2, 0.3], 1),
        "level": variant([0.9, 0.99, 1.01], 100), "ahead": variant([0.7, 0.8, 0.9], 90),
    }  # fmt: skip
    assert results.behind("layer", {"variants": variants}) == [
        "layer, forward: ahead takes 0.80 of our time (0.70-0.90)",
        "layer, forward: ahead allocates 0.90 of our peak",
    ]


def test_without_a_checkout_bench_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_command, "ROOT", tmp_path)
    assert main(["bench", "layer"]) == 2
    line = capsys.readouterr().err
    assert line == (
        f"bench: expected a checkout with benchmarks/ in {tmp_path}, got an installed package; run it from one\n"
    )


def test_compiled_layers_of_a_step_leave_the_others_alone(monkeypatch):
    case, compiled = StepCase(tiny_shape(), SIZES, CPU, torch.float32, 1), []
    layer = type(case.stack.fusion_model.layers[0])
    monkeypatch.setattr(layer, "compile", lambda self, **how: compiled.append((self, how)))
    case.compiled(mode="default")
    own = list(case.stack.fusion_model.layers)
    assert len(compiled) == len(own) and not any(one is other for one, _ in compiled for other in own)
    assert all(how == {"mode": "default"} for _, how in compiled)


def test_a_clock_s_rates_are_in_the_section():
    assert frequencies(SimpleNamespace(frequencies=[])) == {}
    found = frequencies(SimpleNamespace(frequencies=[2000.4, 1500.0, 1980.0]))
    assert found == {"least": 1500, "median": 1980, "most": 2000, "samples": 3}


def planted(**functions) -> dict[str, dict]:
    """What is found of functions of x and one parameter, held against 2 x w + 1 where w is 3."""
    torch.manual_seed(0)
    weight = torch.full((2,), 3.0, requires_grad=True)
    x, gradient = torch.randn(8, 2, requires_grad=True), torch.randn(8, 2)

    def factory(function):
        variant = trained(lambda x: function(x, weight), [(x,)], [gradient], [weight])
        variant.rows = variant.gradient_rows = lambda rows: rows
        variant.slices = [slice(0, 3), slice(3, 8)]
        return lambda: variant

    functions |= {"base": lambda x, w: 2 * x * w + 1}
    return tiny_runner().measure({name: factory(function) for name, function in functions.items()}, base="base")


def test_another_output_is_wrong_and_has_no_time():
    records = planted(
        wrong=lambda x, w: 2.001 * x * w + 1, nan=lambda x, w: (2 * x * w + 1) * float("nan"),
        right=lambda x, w: x * w + x * w + 1, short=lambda x, w: (2 * x * w + 1)[:4].repeat(2, 1)[:, :1] + 0 * w,
    )  # fmt: skip
    assert {name: record.get("wrong", "").partition(" ")[0] for name, record in records.items()} == {
        "wrong": "output:", "nan": "output:", "right": "", "short": "output:", "base": ""
    }  # fmt: skip
    assert "the tolerance rule allows" in records["wrong"]["wrong"] and "not finite" in records["nan"]["wrong"]
    assert not {"forward", "forward_backward", "error"} & {*records["wrong"], *records["nan"], *records["short"]}
    assert records["right"]["forward"]["runs"] == records["base"]["forward_backward"]["runs"] == 3
    assert 0 <= max(records["right"]["checked"].values()) <= 1


def test_a_wrong_gradient_of_tokens_or_parameters_is_wrong():
    records = planted(
        tokens=lambda x, w: x * w + (x * w).detach() + 1 + (x.detach() * w - (x * w).detach()),
        parameters=lambda x, w: 2 * x * w.detach() + 1 + 0 * w,
    )
    found = {name: record["wrong"].partition(":")[0] for name, record in records.items() if "wrong" in record}
    assert found == {"tokens": "gradient", "parameters": "parameter gradients"}


def test_every_variant_is_held_against_ours_round_by_round():
    clock, ours, other = MadeUpClock(), iter([9.0] * 6 + [1.0, 2.0] * 3), iter([9.0] * 6 + [2.0, 6.0] * 3)

    def timed(times):
        return lambda: Variant(lambda _: next(times), lambda _: next(times))

    runner = Runner(clock, Budget(60), rounds=3, memory=False)
    record = runner.measure({"fused": timed(ours), "other": timed(other)})
    assert "over_ours" not in record["fused"]
    assert [ratio[1] for ratio in record["other"]["over_ours"].values()] == [2.0, 3.0, 4.0]
