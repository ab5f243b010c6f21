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
from support.benchmark_cases import SIZES, tiny_runner, tiny_shape

from benchmarks import gpu
from benchmarks.support import on_gpu
from benchmarks.support import relative_bias_attention as attention
from benchmarks.support.feed_forward import FeedForwardCase
from benchmarks.support.layer import LayerCase
from benchmarks.support.pointwise import PointwiseCase, operations
from benchmarks.support.relative_bias_attention import AttentionCase
from benchmarks.support.routed_rows import RoutedRows, ragged_shape
from benchmarks.support.shapes import Sizes
from benchmarks.support.timing import HostClock, clock_for
from benchmarks.support.variants import Budget, Runner

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
            variants = shape["variants"]
            assert set(on_gpu.VARIANTS["relative_bias_attention"]) <= set(variants)
            for name in ("fused", "fused_no_bias", "sdpa_memory_efficient", "bias_built_sdpa_memory_efficient"):
                assert variants[name]["output_relative_difference"] < 1e-5
                assert variants[name]["gradient_relative_difference"] < 1e-5
            left_out = {name: record["skipped"] for name, record in variants.items() if "skipped" in record}
            assert "CUDA device" in left_out["sdpa_cudnn"] and "--quick" in left_out["flex_attention"]
            assert all("left out: " in reason for reason in left_out.values())
            matrix = shape["rows"] * gpu.TINY.width * 4
            assert shape["bytes"] == {"forward": 4 * matrix, "forward_backward": 12 * matrix}
            for mode, found in shape["ratios"].items():
                median = variants["fused"][mode]["median_ms"]
                assert found["over_floor"] == pytest.approx(median / (shape["bytes"][mode] / copied / 1e6), rel=0.05)
                bare = variants["fused_no_bias"][mode]["median_ms"]
                assert found["over_no_bias"] == pytest.approx(median / bare, rel=0.05)
                built = variants["bias_built_sdpa_memory_efficient"][mode]["median_ms"]
                assert found["bias_built_over_fused"] == pytest.approx(built / median, rel=0.05, abs=1e-3)
        assert "3 x 17, fused_no_bias" in gpu.summary(result)

    def test_attention_runs_at_the_model_s_lengths(self):
        longest = [max(shape.sample_lengths) for shape in attention.full_shapes()]
        assert longest == [257, 72, 329, 750, 822, 1025]
        first = attention.full_shapes()[0]
        assert (first.name, first.samples, set(first.sample_lengths)) == (attention.GOALS_SHAPE, 64, {257})

    @pytest.mark.parametrize("shape", attention.tiny_shapes(), ids=lambda shape: shape.name)
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flex_attention_reads_the_same_bias(self, shape):
        case = AttentionCase(shape, SIZES, CPU, torch.float32, sets=1)
        flex, expected = case.flex_attention(compile_it=False), case.specification(bias=True)
        with torch.no_grad():
            out = flex.rows(flex.forward(0))
        torch.testing.assert_close(out, expected.forward(0).detach(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", attention.tiny_shapes(), ids=lambda shape: shape.name)
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

    def test_goals_are_judged_in_their_own_direction(self):
        assert attention.verdicts({"over_floor": 1.4, "over_no_bias": 1.2, "bias_built_over_fused": 3.5}) == {
            "over_floor": "1.40, goal 1.5: met",
            "over_no_bias": "1.20, goal 1.1: missed",
            "bias_built_over_fused": "3.50, goal 3.0: met",
        }
        assert attention.verdicts({}) == {}

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
            assert found == {"forward": rows * forward, "forward_backward": rows * (forward + backward)}

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
