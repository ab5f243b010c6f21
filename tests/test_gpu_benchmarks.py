"""What is measured on a GPU, over tiny shapes on a CPU: that all ways of one operation compute the same."""

import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from support import host_extension as host
from support.benchmark_cases import SIZES, tiny_runner, tiny_shape
from support.clocks import MadeUpClock
from torch.nn.attention import SDPBackend

from benchmarks.support import attention_goals as goals
from benchmarks.support import decoder_attention
from benchmarks.support import relative_bias_attention as attention
from benchmarks.support.decoder_attention import DecoderAttentionCase
from benchmarks.support.feed_forward import FeedForwardCase
from benchmarks.support.pointwise import PointwiseCase, operations
from benchmarks.support.relative_bias_attention import AttentionCase
from benchmarks.support.routed_rows import RoutedRows, ragged_shape
from benchmarks.support.shapes import Shape, Sizes, subset_of
from benchmarks.support.variants import PASSES, Budget, Runner, Variant
from onepeace_fast.timing import HostClock, clock_for

CPU = torch.device("cpu")


def test_attention_runs_at_the_model_s_lengths():
    whole = [shape for shape in attention.full_shapes() if shape.subset_of is None]
    assert [max(shape.sample_lengths) for shape in whole] == [257, 72, 329, 750, 822, 1025]
    assert (whole[0].name, whole[0].samples, set(whole[0].sample_lengths)) == (goals.GOALS_SHAPE, 64, {257})
    subsets = {shape.name: shape for shape in attention.full_shapes() if shape.subset_of is not None}
    found = {name: (shape.samples, *set(shape.sample_lengths), shape.in_order) for name, shape in subsets.items()}
    assert found == {
        "64 x 193, 75% visible": (64, 193, True),
        "64 x 129, 50% visible": (64, 129, True),
        "64 x 65, 25% visible": (64, 65, True),
        "64 x 257, shuffled": (64, 257, False),
        "2 x 1025": (2, 1025, True),
    }


def test_parts_are_drawn_for_each_sample_and_keep_the_whole_grid_s_codes():
    whole = Shape("whole", {"image": [17] * 3})
    visible, shuffled = subset_of(whole, "visible", 0.5), subset_of(whole, "shuffled", in_order=False)
    for row in visible.position_ids("image"):
        assert row == sorted(set(row)) and len(row) == 9 and row[0] == 0
    assert all(row[0] == 0 and sorted(row) == list(range(17)) for row in shuffled.position_ids("image"))
    for shape in (visible, shuffled):
        first, second, third = shape.position_ids("image")
        assert first != second != third != first
    assert shuffled.position_ids("image")[0] != list(range(17)) and whole.position_ids("image") is None


@pytest.mark.parametrize("shape", attention.tiny_shapes()[2:], ids=lambda shape: shape.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_dense_bias_and_the_code_form_are_alike_in_parts(shape):
    case = AttentionCase(shape, SIZES, CPU, torch.float32, sets=1)
    factories = {"reference": lambda: case.reference(bias=True), "fused": lambda: case.fused(bias=True)}
    factories |= {"dense": lambda: case.sdpa(SDPBackend.EFFICIENT_ATTENTION, build=True)}
    records = tiny_runner().measure(factories, base="reference")
    for name in ("fused", "dense"):
        assert list(records[name]["checked"]) == ["output", "gradient"]


@pytest.mark.parametrize("batch", decoder_attention.small_batches(), ids=lambda batch: batch[0].name)
def test_a_decoder_s_attention_is_the_same_in_every_way(batch, monkeypatch):
    def naive(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        bounds = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
        assert [one.diff().max() for one in bounds[:2]] == [max_seqlen_q, max_seqlen_k]
        each = zip((q, k, v), bounds, strict=True)
        samples = zip(*(x.transpose(0, 1).split(at.diff().tolist(), 1) for x, at in each), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*one, is_causal=causal).transpose(0, 1) for one in samples])

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=naive))
    factories = DecoderAttentionCase(batch, SIZES, CPU, torch.float32, sets=2).factories()
    names = ("reference", "sdpa", "flash_attention_no_bias", "fused")
    records = tiny_runner().measure({name: factories[name] for name in names}, base="reference")
    for name in names[1:]:
        assert list(records[name]["checked"]) == ["output", "gradient"]


def test_all_layers_add_up_one_gradient_of_the_tables_in_both_ways():
    case = AttentionCase(attention.tiny_shapes()[1], SIZES, CPU, torch.float32, sets=2, layers=3)
    fused, dense = case.all_layers_fused(), case.all_layers_sdpa()
    assert fused.repeats == dense.repeats == 3 and len(fused.forward(0)) == len(dense.forward(0)) == 3
    tables = len(case.tables)
    found, expected = (variant.forward_backward(1)[-tables:] for variant in (fused, dense))
    single = case.sdpa(SDPBackend.EFFICIENT_ATTENTION, build=True)
    layers = [single.forward_backward(index)[-tables:] for index in (1, 2, 3)]
    for actual, other, gradients in zip(found, expected, zip(*layers, strict=True), strict=True):
        torch.testing.assert_close(actual, sum(gradients), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, sum(gradients), rtol=1e-4, atol=1e-4)


def test_frozen_tables_get_no_gradient_and_the_bias_all_the_same():
    case = AttentionCase(attention.tiny_shapes()[0], SIZES, CPU, torch.float32, sets=1)
    frozen, learned = case.fused(bias=True, frozen=True), case.fused(bias=True)
    assert torch.equal(frozen.forward(0), learned.forward(0))
    assert (len(frozen.forward_backward(0)), len(learned.forward_backward(0))) == (1, 2)


@pytest.mark.parametrize("shape", attention.tiny_shapes(), ids=lambda shape: shape.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_reads_the_same_bias(shape):
    case = AttentionCase(shape, SIZES, CPU, torch.float32, sets=1)
    flex, expected = case.flex_attention(compile_it=False), case.reference(bias=True)
    with torch.no_grad():
        out = flex.rows(flex.forward(0))
    torch.testing.assert_close(out, expected.rows(expected.forward(0)).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", attention.tiny_shapes()[:2], ids=lambda shape: shape.name)
def test_flash_attention_is_given_whole_samples_and_its_output_is_put_back(shape, monkeypatch):
    def naive(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k and cu_seqlens_k is cu_seqlens_q
        samples = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*sample).transpose(0, 1) for sample in samples])

    module = types.SimpleNamespace(flash_attn_varlen_func=naive)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    case = AttentionCase(shape, SIZES, CPU, torch.float32, sets=2)
    factories = {name: factory for name, factory in case.factories().items() if "no_bias" in name}
    records = tiny_runner().measure(factories, base="reference")
    assert list(records["flash_attention_no_bias"]["checked"]) == ["output", "gradient"]


def test_attention_by_the_kernel_agrees_and_its_launches_are_counted(monkeypatch, host_extension):
    host.use(monkeypatch, host_extension)
    case = AttentionCase(attention.tiny_shapes()[1], Sizes(64, 64, 2), CPU, torch.bfloat16, sets=1)
    factories = {name: case.factories()[name] for name in ("reference", "sdpa_memory_efficient", "fused")}
    runner = Runner(HostClock(), Budget(60.0), rounds=1, memory=False)
    records = runner.measure(factories, base="reference")
    for name in ("fused", "sdpa_memory_efficient"):
        assert list(records[name].get("checked", ())) == ["output", "gradient"], records[name]
    launches = re.findall(r"\d+", records["fused"]["note"])
    assert int(launches[0]) == 1 and int(launches[1]) >= 1


def test_ratios_and_verdicts_of_every_pass():
    times = {
        "fused": (0.12, 0.18, 0.3),
        "fused_no_bias": (0.1, 0.12, 0.22),
        "fused_frozen_tables": (0.12, 0.16, 0.28),
        "bias_built_sdpa_memory_efficient": (0.3, 0.9, 1.2),
        "all_layers_fused": (0.12, 0.2, 0.32),
        "all_layers_sdpa_memory_efficient": (0.24, 0.5, 0.74),
        "flex_attention": (0.18, 0.09, 0.27),
    }
    variants = {
        name: {mode: {"median_ms": time} for mode, time in zip(PASSES, row, strict=True)} for name, row in times.items()
    }
    bytes_ = {"forward": 200_000_000, "backward": 400_000_000, "forward_backward": 600_000_000}
    found = goals.ratios(variants, bytes_, rate=4e12)
    assert found["forward"] == {
        "floor_ms": 0.05, "over_floor": 2.4, "over_no_bias": 1.2, "over_frozen_tables": 1.0,
        "bias_built_over_fused": 2.5, "upstream_over_fused": 2.0, "flex_attention_over_fused": 1.5,
    }  # fmt: skip
    assert found["backward"] == {
        "floor_ms": 0.1, "over_floor": 1.8, "over_no_bias": 1.5, "over_frozen_tables": 1.125,
        "bias_built_over_fused": 5.0, "upstream_over_fused": 2.5, "flex_attention_over_fused": 0.5,
    }  # fmt: skip
    assert found["forward_backward"]["floor_ms"] == 0.15 and found["forward_backward"]["over_floor"] == 2.0
    stated = goals.verdicts(found, goals.GOALS_SHAPE, variants)
    assert stated["forward"] == {
        "over_floor": "2.40, goal at most 1.5: missed",
        "over_no_bias": "1.20, goal at most 1.1: missed",
        "bias_built_over_fused": "2.50, goal at least 3.0: missed",
        "flex_attention_over_fused": "1.50, goal at least 1.0: met",
    }
    assert stated["backward"] == {
        "over_floor": "1.80, goal at most 1.5: missed",
        "over_frozen_tables": "1.12, goal at most 1.2: met",
        "upstream_over_fused": "2.50, goal at least 3.0: missed",
        "flex_attention_over_fused": "0.50, goal at least 1.0: missed",
    }
    assert set(stated["forward_backward"]) == set(stated["backward"])
    elsewhere = goals.verdicts(found, "16 x 1025", variants)
    assert elsewhere["backward"] == {"flex_attention_over_fused": "0.50, goal at least 1.0: missed"}
    none = goals.verdicts(goals.ratios({}, bytes_, None), goals.GOALS_SHAPE, variants)
    assert none["backward"]["over_floor"] == "not measured, goal at most 1.5"
    assert none["forward"]["flex_attention_over_fused"] == "not measured, goal at least 1.0"
    alone = goals.verdicts(found, goals.GOALS_SHAPE, ["fused", "flex_attention"])
    assert set(alone["forward"]) == {"over_floor", "flex_attention_over_fused"}


def test_a_pair_s_time_is_held_against_the_whole_batch():
    whole = Shape("whole", {"image": [9] * 4})
    shapes = [whole, subset_of(whole, "visible", 0.5), subset_of(whole, "few", samples=2)]
    times = [{"fused": 8.1}, {"fused": 5.0, "fused_no_bias": 1.0}, {"fused": 8.1}]
    measured = [{name: {"backward": {"median_ms": t}} for name, t in row.items()} for row in times]
    assert goals.times_per_pair(measured[1], measured[0], shapes[1]) == {
        "over": "whole", "forward": {}, "backward": {"fused": 2.0}, "forward_backward": {}
    }  # fmt: skip
    assert goals.times_per_pair(measured[2], measured[0], shapes[2])["backward"] == {"fused": 2.0}


def test_backward_is_what_both_passes_take_longer_round_by_round_and_repeats_are_divided():
    forward, both = (0.0, 0.0, 1.0, 5.0, 3.0), (0.0, 0.0, 4.0, 9.0, 9.0)

    def factories(forward, both, repeats=1):
        return {"one": lambda: Variant(forward.__getitem__, both.__getitem__, repeats=repeats)}

    runner = Runner(MadeUpClock(), Budget(60.0), rounds=3, memory=False)
    record = runner.measure(factories(forward, both))["one"]
    assert [record[mode]["median_ms"] for mode in PASSES] == [3e3, 4e3, 9e3]
    assert (record["backward"]["min_ms"], record["backward"]["max_ms"], record["backward"]["runs"]) == (3e3, 6e3, 3)
    record = runner.measure(factories(forward, both, repeats=2))["one"]
    assert [record[mode]["median_ms"] for mode in PASSES] == [1.5e3, 2e3, 4.5e3]
    assert "backward" not in runner.measure(factories(forward, forward))["one"]


@pytest.mark.parametrize("modalities, rows", [(1, 16), (3, 50), (8, 100)])
def test_the_routed_ffn_alone_agrees_in_all_variants_for_any_number_of_modalities(modalities, rows):
    shape = ragged_shape(modalities, rows)
    assert len(shape.lengths) == modalities and shape.real_tokens == rows
    case = FeedForwardCase(RoutedRows(shape, Sizes(32, 48, 2), CPU, torch.float32, sets=2))
    runner = Runner(clock_for(CPU), Budget(60, "left out"), rounds=1, memory=False)
    records = runner.measure(case.factories(), base="sliced")
    compared = {name for name, record in records.items() if "checked" in record}
    assert compared == {"sliced", "boolean_mask", "grouped_mm", "fused", "strategy_reference"}
    assert not any("error" in record for record in records.values())


def test_bytes_are_those_of_every_row_tensor_once_each_way():
    case = PointwiseCase(tiny_shape(), Sizes(32, 48, 2), CPU, torch.bfloat16, sets=1, stream=torch.float32)
    rows = tiny_shape().real_tokens
    expected = {"layer_norm": (2 * 2 * 32, 3 * 2 * 32), "gated_sub_ln": (3 * 2 * 48, 5 * 2 * 48)}
    expected["residual"] = ((4 + 2 + 4 + 2) * 32, (4 + 2 + 4 + 2 + 4 + 2) * 32)
    expected["rms_norm"] = expected["layer_norm"]
    for name, (forward, backward) in expected.items():
        found = operations(case)[name]().bytes
        passes = (forward, backward, forward + backward)
        assert found == {mode: rows * width for mode, width in zip(PASSES, passes, strict=True)}
