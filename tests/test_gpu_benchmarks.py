"""What benchmarks/gpu.py measures and writes, over tiny shapes on a CPU, and what it does with a failure."""

import copy
import json
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from support import host_extension as host
from support.benchmark_cases import SIZES, MadeUpClock, tiny_runner, tiny_shape
from torch.nn.attention import SDPBackend

from benchmarks import gpu
from benchmarks.support import attention_goals as goals
from benchmarks.support import on_gpu
from benchmarks.support import relative_bias_attention as attention
from benchmarks.support.feed_forward import FeedForwardCase
from benchmarks.support.layer import LayerCase
from benchmarks.support.pointwise import PointwiseCase, operations
from benchmarks.support.relative_bias_attention import AttentionCase
from benchmarks.support.routed_rows import RoutedRows, ragged_shape
from benchmarks.support.shapes import Shape, Sizes, part_of
from benchmarks.support.timing import HostClock, clock_for
from benchmarks.support.variants import PASSES, Budget, Runner, Variant

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[int, dict]:
    """One run of gpu.py over tiny shapes, in which one peer fails; its exit code and its JSON."""
    folder = tmp_path_factory.mktemp("gpu")

    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "grouped_mm", broken, raising=False)
        code = gpu.main(["--out", str(folder), "--device", "cpu", "--quick"])
    (path,) = folder.iterdir()
    assert path.name.startswith("gpu-quick_") and path.suffix == ".json"
    return code, json.loads(path.read_text())


class TestGpuScript:
    def test_a_failing_peer_is_recorded_and_the_rest_goes_on(self, quick_run):
        code, result = quick_run
        assert code == 0
        assert len(result["shapes"]) == 4 and len(result["errors"]) == 4
        assert all("RuntimeError: no such kernel" in line for line in result["errors"])
        for shape in result["shapes"]:
            assert shape["ffn"]["grouped_mm"]["error"] == "RuntimeError: no such kernel"
            measured = [("layer", name) for name in ("products", "products_joined", "baseline", "fused")]
            measured += [("ffn", name) for name in ("products", "products_joined", "sliced", "boolean_mask", "fused")]
            measured += [("bias", name) for name in ("baseline", "fused")]
            for part, name in measured:
                for mode in ("forward", "forward_backward"):
                    times = shape[part][name][mode]
                    assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"] and times["runs"] == 3
            for part, name in (("layer", "fused"), ("ffn", "fused"), ("ffn", "boolean_mask")):
                assert 0 <= shape[part][name]["output_relative_difference"] < 1e-4
                assert 0 <= shape[part][name]["gradient_relative_difference"] < 1e-4

    def test_attention_alone_is_measured_against_its_floor_and_what_is_left_out_says_why(self, quick_run):
        _, result = quick_run
        assert [shape["name"] for shape in result["attention"]] == [shape.name for shape in attention.tiny_shapes()]
        copied = result["ceilings"]["copy"]["GB_per_second"]
        for shape in result["attention"]:
            variants, is_part = shape["variants"], "time_per_pair" in shape
            compared = {"fused", "fused_no_bias", "fused_frozen_tables"}
            if not is_part:
                assert set(on_gpu.VARIANTS["relative_bias_attention"]) <= set(variants)
                compared |= {"sdpa_memory_efficient", "bias_built_sdpa_memory_efficient"}
                compared |= {"all_layers_sdpa_memory_efficient", "all_layers_fused"}
            for name in compared:
                assert variants[name]["output_relative_difference"] < 1e-5
                assert variants[name]["gradient_relative_difference"] < 1e-5
            left_out = {name: record["skipped"] for name, record in variants.items() if "skipped" in record}
            assert (is_part or "CUDA device" in left_out["sdpa_cudnn"]) and "--quick" in left_out["flex_attention"]
            assert all("left out: " in reason for reason in left_out.values())
            matrix = shape["rows"] * gpu.TINY.width * 4
            assert shape["bytes"] == {name: n * matrix for name, n in zip(PASSES, (4, 8, 12), strict=True)}
            assert {name for name in variants["fused"] if name in PASSES} >= {"forward", "forward_backward"}
            for mode in variants["fused"].keys() & set(PASSES):
                found, median = shape["ratios"][mode], variants["fused"][mode]["median_ms"]
                assert found["over_floor"] == pytest.approx(median / (shape["bytes"][mode] / copied / 1e6), rel=0.05)
            assert shape["goals"]["backward"]["flex_attention_over_fused"] == "not measured, goal at least 1.0"
        text = gpu.summary(result)
        assert "3 x 17, fused_no_bias" in text and "2 x 17, shuffled, fused, over 3 x 17" in text
        assert "3 x 17, flex_attention_over_fused" in text

    def test_attention_runs_at_the_model_s_lengths(self):
        whole = [shape for shape in attention.full_shapes() if shape.part_of is None]
        assert [max(shape.sample_lengths) for shape in whole] == [257, 72, 329, 750, 822, 1025]
        assert (whole[0].name, whole[0].samples, set(whole[0].sample_lengths)) == (goals.GOALS_SHAPE, 64, {257})
        parts = {shape.name: shape for shape in attention.full_shapes() if shape.part_of is not None}
        found = {name: (shape.samples, *set(shape.sample_lengths), shape.in_order) for name, shape in parts.items()}
        assert found == {
            "64 x 193, 75% kept": (64, 193, True),
            "64 x 129, 50% kept": (64, 129, True),
            "64 x 65, 25% kept": (64, 65, True),
            "64 x 257, shuffled": (64, 257, False),
            "2 x 1025": (2, 1025, True),
        }

    def test_parts_are_drawn_for_each_sample_and_keep_the_whole_grid_s_codes(self):
        whole = Shape("whole", {"image": [17] * 3})
        kept, shuffled = part_of(whole, "kept", 0.5), part_of(whole, "shuffled", in_order=False)
        for row in kept.position_ids("image"):
            assert row == sorted(set(row)) and len(row) == 9 and row[0] == 0
        assert all(row[0] == 0 and sorted(row) == list(range(17)) for row in shuffled.position_ids("image"))
        for shape in (kept, shuffled):
            first, second, third = shape.position_ids("image")
            assert first != second != third != first
        assert shuffled.position_ids("image")[0] != list(range(17)) and whole.position_ids("image") is None

    @pytest.mark.parametrize("shape", attention.tiny_shapes()[2:], ids=lambda shape: shape.name)
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_a_dense_bias_and_the_code_form_are_alike_in_parts(self, shape):
        case = AttentionCase(shape, SIZES, CPU, torch.float32, sets=1)
        factories = {"specification": lambda: case.specification(bias=True), "fused": lambda: case.fused(bias=True)}
        factories |= {"dense": lambda: case.sdpa(SDPBackend.EFFICIENT_ATTENTION, build=True)}
        records = tiny_runner().measure(factories, base="specification")
        for name in ("fused", "dense"):
            assert records[name]["output_relative_difference"] < 1e-5
            assert records[name]["gradient_relative_difference"] < 1e-5

    def test_all_layers_add_up_one_gradient_of_the_tables_in_both_ways(self):
        case = AttentionCase(attention.tiny_shapes()[1], SIZES, CPU, torch.float32, sets=2, layers=3)
        fused, dense = case.all_layers_fused(), case.all_layers_sdpa()
        assert fused.repeats == dense.repeats == 3 and len(fused.forward(0)) == len(dense.forward(0)) == 3
        tables = len(case.tables)
        found, expected = (variant.forward_backward(1)[-tables:] for variant in (fused, dense))
        single = case.sdpa(SDPBackend.EFFICIENT_ATTENTION, build=True)
        layers = [single.forward_backward(index)[-tables:] for index in (1, 2, 3)]
        for actual, other, parts in zip(found, expected, zip(*layers, strict=True), strict=True):
            torch.testing.assert_close(actual, sum(parts), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(other, sum(parts), rtol=1e-4, atol=1e-4)

    def test_frozen_tables_get_no_gradient_and_the_bias_all_the_same(self):
        case = AttentionCase(attention.tiny_shapes()[0], SIZES, CPU, torch.float32, sets=1)
        frozen, learned = case.fused(bias=True, frozen=True), case.fused(bias=True)
        assert torch.equal(frozen.forward(0), learned.forward(0))
        assert (len(frozen.forward_backward(0)), len(learned.forward_backward(0))) == (1, 2)

    @pytest.mark.parametrize("shape", attention.tiny_shapes(), ids=lambda shape: shape.name)
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flex_attention_reads_the_same_bias(self, shape):
        case = AttentionCase(shape, SIZES, CPU, torch.float32, sets=1)
        flex, expected = case.flex_attention(compile_it=False), case.specification(bias=True)
        with torch.no_grad():
            out = flex.rows(flex.forward(0))
        torch.testing.assert_close(out, expected.forward(0).detach(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", attention.tiny_shapes()[:2], ids=lambda shape: shape.name)
    def test_flash_attention_is_given_whole_samples_and_its_output_is_put_back(self, shape, monkeypatch):
        def naive(qkv, bounds, longest):
            parts = [part.permute(1, 2, 0, 3) for part in qkv.split(bounds.diff().tolist())]
            assert max(part.shape[2] for part in parts) == longest
            return torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts])

        module = types.SimpleNamespace(flash_attn_varlen_qkvpacked_func=naive)
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        case = AttentionCase(shape, SIZES, CPU, torch.float32, sets=2)
        factories = {name: factory for name, factory in case.factories().items() if "no_bias" in name}
        records = tiny_runner().measure(factories, base="specification")
        record = records["flash_attention_no_bias"]
        assert record["output_relative_difference"] < 1e-5 and record["gradient_relative_difference"] < 1e-5

    @pytest.mark.requires_compiler
    def test_attention_by_the_kernel_agrees_and_its_launches_are_counted(self, monkeypatch, host_extension):
        host.use(monkeypatch, host_extension)
        case = AttentionCase(attention.tiny_shapes()[1], Sizes(64, 64, 2), CPU, torch.bfloat16, sets=1)
        factories = {name: case.factories()[name] for name in ("specification", "sdpa_memory_efficient", "fused")}
        runner = Runner(HostClock(), Budget(60.0), rounds=1, tolerance=0.05)
        records = runner.measure(factories, base="specification")
        assert records["fused"]["output_relative_difference"] < 0.02
        assert records["sdpa_memory_efficient"]["gradient_relative_difference"] < 0.02
        launches = re.findall(r"\d+", records["fused"]["note"])
        assert int(launches[0]) == 1 and int(launches[1]) >= 1

    def test_ratios_and_verdicts_of_every_pass(self):
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
            name: {mode: {"median_ms": time} for mode, time in zip(PASSES, row, strict=True)}
            for name, row in times.items()
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
        stated = goals.verdicts(found, goals.GOALS_SHAPE)
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
        elsewhere = goals.verdicts(found, "16 x 1025")
        assert elsewhere["backward"] == {"flex_attention_over_fused": "0.50, goal at least 1.0: missed"}
        none = goals.verdicts(goals.ratios({}, bytes_, None), goals.GOALS_SHAPE)
        assert none["backward"]["over_floor"] == "not measured, goal at most 1.5"

    def test_a_pair_s_time_is_held_against_the_whole_batch(self):
        whole = Shape("whole", {"image": [9] * 4})
        shapes = [whole, part_of(whole, "kept", 0.5), part_of(whole, "few", samples=2)]
        times = [{"fused": 8.1}, {"fused": 5.0, "fused_no_bias": 1.0}, {"fused": 8.1}]
        measured = [
            {"name": shape.name, "variants": {name: {"backward": {"median_ms": t}} for name, t in row.items()}}
            for shape, row in zip(shapes, times, strict=True)
        ]
        goals.add_times_per_pair(measured, shapes)
        assert "time_per_pair" not in measured[0]
        assert measured[1]["time_per_pair"] == {
            "over": "whole", "forward": {}, "backward": {"fused": 2.0}, "forward_backward": {}
        }  # fmt: skip
        assert measured[2]["time_per_pair"]["backward"] == {"fused": 2.0}

    def test_backward_is_what_both_passes_take_longer_round_by_round_and_repeats_are_divided(self):
        forward, both = (0.0, 0.0, 1.0, 5.0, 3.0), (0.0, 0.0, 4.0, 9.0, 9.0)

        def factories(forward, both, repeats=1):
            return {"one": lambda: Variant(forward.__getitem__, both.__getitem__, repeats=repeats)}

        runner = Runner(MadeUpClock(), Budget(60.0), rounds=3, tolerance=1e-4)
        record = runner.measure(factories(forward, both))["one"]
        assert [record[mode]["median_ms"] for mode in PASSES] == [3e3, 4e3, 9e3]
        assert (record["backward"]["min_ms"], record["backward"]["max_ms"], record["backward"]["runs"]) == (3e3, 6e3, 3)
        record = runner.measure(factories(forward, both, repeats=2))["one"]
        assert [record[mode]["median_ms"] for mode in PASSES] == [1.5e3, 2e3, 4.5e3]
        assert "backward" not in runner.measure(factories(forward, forward))["one"]

    def test_compiled_variants_are_left_out_with_a_reason(self, quick_run):
        _, result = quick_run
        for shape in result["shapes"]:
            left_out = [name for part in ("layer", "ffn") for name, r in shape[part].items() if "skipped" in r]
            names = ["sliced_compiled", "boolean_mask_compiled", "grouped_mm_compiled"]
            assert left_out == ["baseline_compiled", *names]
        skipped = [line for line in result["skipped"] if "is not installed" not in line]
        skipped = [line for line in skipped if not line.startswith("attention ")]
        assert len(skipped) == 16 + 3 and all("--quick" in line for line in skipped)

    def test_operations_between_the_products_are_measured_against_a_copy(self, quick_run):
        _, result = quick_run
        pointwise = result["pointwise"]
        assert set(pointwise["operations"]) == {"layer_norm", "residual", "gated_sub_ln"}
        for name, operation in pointwise["operations"].items():
            assert [n for n, r in operation["variants"].items() if "error" in r] == []
            record = operation["variants"]["fused"]
            assert record["output_relative_difference"] < 1e-5 and record["gradient_relative_difference"] < 1e-5
            for mode, must_move in operation["bytes"].items():
                if mode not in record:  # a backward pass that noise has left without a time
                    continue
                rate = must_move / record[mode]["median_ms"] / 1e6
                assert record[mode]["GB_per_second"] == pytest.approx(rate, rel=0.05, abs=0.1)
                copied = result["ceilings"]["copy"]["GB_per_second"]
                assert record[mode]["share_of_copy"] == pytest.approx(rate / copied, rel=0.05, abs=1e-3)
            assert f"{name}, fused" in gpu.summary(result)

    @pytest.mark.parametrize("modalities, rows", [(1, 16), (3, 50), (8, 100)])
    def test_the_routed_ffn_alone_agrees_in_all_variants_for_any_number_of_modalities(self, modalities, rows):
        shape = ragged_shape(modalities, rows)
        assert len(shape.lengths) == modalities and shape.real_tokens == rows
        case = FeedForwardCase(RoutedRows(shape, Sizes(32, 48, 2), CPU, torch.float32, sets=2))
        runner = Runner(clock_for(CPU), Budget(60, "left out"), rounds=1, tolerance=1e-5)
        records = runner.measure(case.factories(), base="sliced")
        compared = {name for name, record in records.items() if "output_relative_difference" in record}
        assert compared == {"boolean_mask", "grouped_mm", "fused"}
        assert not any("error" in record for record in records.values())

    def test_bytes_are_those_of_every_row_tensor_once_each_way(self):
        case = PointwiseCase(tiny_shape(), Sizes(32, 48, 2), CPU, torch.bfloat16, sets=1, stream=torch.float32)
        rows = tiny_shape().real_tokens
        expected = {"layer_norm": (2 * 2 * 32, 3 * 2 * 32), "gated_sub_ln": (3 * 2 * 48, 5 * 2 * 48)}
        expected["residual"] = ((4 + 2 + 4 + 2) * 32, (4 + 2 + 4 + 2 + 4 + 2) * 32)
        for name, (forward, backward) in expected.items():
            found = operations(case)[name]().bytes
            passes = (forward, backward, forward + backward)
            assert found == {mode: rows * width for mode, width in zip(PASSES, passes, strict=True)}

    def test_taxes_are_ratios_of_medians(self, quick_run):
        _, result = quick_run
        for shape in result["shapes"]:
            for part, name in (("layer", "baseline"), ("layer", "fused"), ("ffn", "sliced")):
                record, base = shape[part][name], shape[part]["products"]
                for mode in ("forward", "forward_backward"):
                    expected = record[mode]["median_ms"] / base[mode]["median_ms"]
                    assert record["tax"][mode] == pytest.approx(expected, abs=1e-3)

    def test_what_a_reader_needs_is_there(self, quick_run):
        _, result = quick_run
        assert {"date", "device", "dtype", "machine", "method", "sizes", "seconds"} <= set(result)
        assert {"onepeace_fast", "torch", "cuda_of_torch", "triton"} <= set(result["machine"]["versions"])
        assert result["ceilings"]["copy"]["GB_per_second"] > 0
        assert result["ceilings"]["product"]["TFLOP_per_second"] >= 0
        for shape, expected in zip(result["shapes"], gpu.tiny_shapes(), strict=True):
            assert (shape["real_tokens"], shape["padded_tokens"]) == (expected.real_tokens, expected.padded_tokens)
            per_layer, whole = (shape["bias"]["baseline"][key] for key in ("per_layer_ms", "forward_backward"))
            assert per_layer == pytest.approx(whole["median_ms"] / 40)
        text = gpu.summary(result)
        assert "grouped_mm" in text and "ERROR" in text and "--quick" in text

    def test_only_the_library_and_its_baseline_decide_the_exit_code(self, quick_run):
        _, result = quick_run
        assert not gpu.failed(result)
        broken = copy.deepcopy(result)
        del broken["pointwise"]["operations"]["residual"]["variants"]["fused"]["forward_backward"]
        assert gpu.failed(broken)
        broken = copy.deepcopy(result)
        del broken["attention"][1]["variants"]["fused"]["forward_backward"]
        assert gpu.failed(broken)
        broken = copy.deepcopy(result)
        del broken["shapes"][2]["layer"]["fused"]["forward_backward"]
        assert gpu.failed(broken)

    def test_a_grouped_product_computes_what_slices_do(self):
        case = LayerCase(tiny_shape(), Sizes(32, 48, 2), CPU, torch.float32, sets=2)
        factories = gpu.FeedForwardCase(case).factories()
        if not hasattr(F, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
            pytest.skip("this torch has no grouped product")
        chosen = {name: factories[name] for name in ("sliced", "grouped_mm")}
        records = tiny_runner().measure(chosen, base="sliced")
        assert records["grouped_mm"]["output_relative_difference"] < 1e-5
        assert records["grouped_mm"]["gradient_relative_difference"] < 1e-5

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
    def test_without_a_gpu_it_says_so(self, tmp_path, capsys):
        assert gpu.main(["--out", str(tmp_path)]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
