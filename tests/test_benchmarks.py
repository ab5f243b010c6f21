"""The benchmarks' own logic over tiny shapes: what they count, how they take turns, and what they do with a failure."""

import copy
import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import host_extension as host
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu  # noqa: E402
from benchmarks.support import on_gpu, shapes  # noqa: E402
from benchmarks.support import relative_bias_attention as attention  # noqa: E402
from benchmarks.support.encoder import EncoderCase, inputs  # noqa: E402
from benchmarks.support.feed_forward import FeedForwardCase  # noqa: E402
from benchmarks.support.layer import LayerCase  # noqa: E402
from benchmarks.support.pointwise import PointwiseCase, operations  # noqa: E402
from benchmarks.support.relative_bias_attention import AttentionCase  # noqa: E402
from benchmarks.support.report import Report  # noqa: E402
from benchmarks.support.routed_rows import RoutedRows, ragged_shape  # noqa: E402
from benchmarks.support.shapes import Shape, Sizes  # noqa: E402
from benchmarks.support.timing import EventClock, HostClock, Timing, clock_for, interleaved, paired  # noqa: E402
from benchmarks.support.variants import Budget, Runner, Variant, compiled, trained  # noqa: E402

CPU = torch.device("cpu")
SIZES = Sizes(width=32, hidden=48, heads=2, layers=2)
BENCH_FILES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


def tiny_shape() -> Shape:
    """Ragged text beside images of 2 x 2 patches."""
    return Shape("text+image", {"text": [3, 7, 5], "image": [5, 5, 5]})


class ScriptedClock:
    """Returns given times instead of taking any."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times = {name: iter(values) for name, values in times.items()}
        self.recovered = 0

    def time(self, call, index, lead):
        """The next time of the call's script; the call itself returns its name."""
        seconds = next(self.times[call(index)])
        return seconds, seconds

    def recover(self):
        """Count."""
        self.recovered += 1


class FakeBenchmark:
    """Does what pytest-benchmark's ``pedantic`` does, without its statistics."""

    def __init__(self) -> None:
        self.extra_info = {}

    def pedantic(self, target, setup, rounds, iterations):
        """Run the setup and the target in turn."""
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()


class OperationCounter(TorchDispatchMode):
    """Sums the floating-point operations of matrix products."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result


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


class TestShapes:
    def test_counts_are_those_of_the_masks(self):
        for shape in inputs(samples=3).values():
            case = EncoderCase(shape, SIZES)
            masks = [part.valid for part in case.tokens.values()]
            assert shape.real_tokens == sum(int(mask.sum()) for mask in masks) == case.plan.capacity
            assert shape.padded_tokens == sum(mask.numel() for mask in masks)
            assert sum(shape.sample_lengths) == shape.real_tokens

    def test_a_batch_counted_by_hand(self):
        shape = tiny_shape()
        assert (shape.real_tokens, shape.padded_tokens, shape.samples) == (30, 36, 3)
        assert shape.sample_lengths == [8, 12, 10]
        assert shape.ratio == pytest.approx(1.2)

    @pytest.mark.parametrize(
        ("name", "shortest", "longest"), [("text", 7, 72), ("image", 257, 257), ("audio", 150, 750)]
    )
    def test_lengths_of_the_inputs(self, name, shortest, longest):
        lengths = inputs()[name].lengths[name]
        assert (len(lengths), min(lengths), max(lengths)) == (8, shortest, longest)

    def test_shapes_of_a_gpu_run(self):
        longest = {shape.name: max(map(max, shape.lengths.values())) for shape in gpu.full_shapes()}
        samples = {shape.name: shape.samples for shape in gpu.full_shapes()}
        assert longest == {"vision-language 32": 257, "image 64": 257, "audio 16": 750, "audio-language 16": 750}
        assert samples == {"vision-language 32": 32, "image 64": 64, "audio 16": 16, "audio-language 16": 16}
        assert 9400 < gpu.full_shapes()[0].real_tokens < 9600


class TestTiming:
    def test_variants_run_in_turn(self):
        called = []
        calls = {name: lambda index, name=name: called.append((name, index)) for name in "abc"}
        timings, errors = interleaved(calls, HostClock(), rounds=4, warmups=2)
        assert called == [(name, index) for index in range(6) for name in "abc"]
        assert not errors and [len(timing.seconds) for timing in timings.values()] == [4, 4, 4]

    def test_a_failing_variant_stops_no_other(self):
        def breaks(index):
            if index == 3:
                raise ValueError("out\nof   order")
            return "breaks"

        clock = ScriptedClock({"breaks": [0.1] * 3, "works": [0.2] * 6})
        timings, errors = interleaved({"breaks": breaks, "works": lambda _: "works"}, clock, rounds=4)
        assert errors == {"breaks": "ValueError: out of order"}
        assert list(timings) == ["works"] and timings["works"].seconds == [0.2] * 4
        assert clock.recovered == 1

    def test_a_slow_variant_runs_three_times_at_least(self):
        clock = ScriptedClock({"slow": [9.0] * 30, "quick": [0.1] * 30})
        calls = {"slow": lambda _: "slow", "quick": lambda _: "quick"}
        timings, _ = interleaved(calls, clock, rounds=20, seconds_each=4.0)
        assert {name: len(timing.seconds) for name, timing in timings.items()} == {"slow": 3, "quick": 20}

    def test_warm_ups_are_not_counted(self):
        clock = ScriptedClock({"a": [100.0, 50.0, 3.0, 1.0, 2.0]})
        timings, _ = interleaved({"a": lambda _: "a"}, clock, rounds=3, warmups=2)
        record = timings["a"].record()
        assert (record["median_ms"], record["min_ms"], record["max_ms"], record["runs"]) == (2e3, 1e3, 3e3, 3)

    def test_pairs_alternate(self):
        called = []
        measured, against = paired(
            FakeBenchmark(), lambda: called.append("m"), lambda: called.append("a"), seconds=60, rounds=5
        )
        assert called == ["a", "m"] * 6
        assert len(measured.seconds) == len(against.seconds) == len(measured.cpu) == 5

    def test_events_enclose_the_call_alone(self, monkeypatch):
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def elapsed_time(self, other):
                return 20.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
        clock = EventClock()
        log.clear()
        seconds, host = clock.time(lambda index: log.append(f"call {index}"), 7, lead=0.01)
        cycles = 15_000_000  # 1.5 x 10 ms at the 1e9 cycles a second that were calibrated
        assert log == ["synchronize", cycles, "record", "call 7", "record", "synchronize"]
        assert seconds == 0.02 and 0 < host < 1


class TestVariants:
    def runner(self, seconds: float = 60.0, no_compile: str | None = None) -> Runner:
        return Runner(HostClock(), Budget(seconds, no_compile), rounds=3, tolerance=1e-4)

    def variant(self, value: float) -> Variant:
        return Variant(lambda _: torch.full((4,), value), lambda _: None, rows=lambda y: y)

    def test_another_output_is_an_error_and_no_time(self):
        factories = {"wrong": lambda: self.variant(1.001), "base": lambda: self.variant(1.0)}
        factories |= {"nan": lambda: self.variant(float("nan")), "right": lambda: self.variant(1.00001)}
        records = self.runner().measure(factories, base="base")
        assert list(records) == ["wrong", "base", "nan", "right"]
        for name in ("wrong", "nan"):
            assert "differs" in records[name]["error"] and "forward" not in records[name]
        assert records["right"]["forward"]["runs"] == records["base"]["forward_backward"]["runs"] == 3

    def test_a_wrong_gradient_is_an_error(self):
        x, gradient = torch.ones(4, 2, requires_grad=True), torch.ones(4, 2)

        def factory(function):
            variant = trained(function, [(x,)], [gradient], [])
            variant.rows = variant.gradient_rows = lambda rows: rows
            return lambda: variant

        factories = {"base": factory(lambda x: 2 * x), "wrong": factory(lambda x: x + x.detach())}
        record = self.runner().measure(factories, base="base")["wrong"]
        assert record["output_relative_difference"] == 0 and "its gradient differs" in record["error"]

    def test_the_time_budget_is_held(self):
        factories = {"eager": lambda: self.variant(1.0), "compiled": compiled(lambda: self.variant(1.0))}
        records = self.runner(no_compile="not today").measure(factories)
        assert records["compiled"] == {"skipped": "not today"} and "forward" in records["eager"]
        runner = self.runner()
        runner.budget.compile_seconds["compiled"] = 1000.0
        records = runner.measure(factories)
        assert "budget" in records["compiled"]["skipped"] and "forward" in records["eager"]
        assert all("budget" in record["skipped"] for record in self.runner(-1.0).measure(factories).values())

    def test_bare_products_are_those_of_the_layer(self):
        shape = Shape("image", {"image": [5, 5]})  # without padding the baseline multiplies the same matrices
        case = LayerCase(shape, SIZES, CPU, torch.float32, sets=1)
        bare, baseline = case.products(), case.baseline()
        counted = {}
        for name, call in {
            "products": bare.forward,
            "products with backward": bare.variant().forward_backward,
            "baseline": baseline.forward,
            "baseline with backward": baseline.forward_backward,
            "joined": case.products(joined=True).forward,
        }.items():
            with OperationCounter() as counter:
                call(0)
            counted[name] = counter.operations
        assert counted["products"] == counted["baseline"] == counted["joined"] == bare.operations > 0
        assert counted["products with backward"] == counted["baseline with backward"] == 3 * bare.operations


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
        records = TestVariants().runner().measure(factories, base="specification")
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
        records = TestVariants().runner().measure(chosen, base="sliced")
        assert records["grouped_mm"]["output_relative_difference"] < 1e-5
        assert records["grouped_mm"]["gradient_relative_difference"] < 1e-5

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
    def test_without_a_gpu_it_says_so(self, tmp_path, capsys):
        assert gpu.main(["--out", str(tmp_path)]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestBenchFiles:
    def test_pytest_collects_every_file(self):
        options = ["-o", "python_files=bench_*.py", "--collect-only", "-q"]
        command = [sys.executable, "-m", "pytest", "benchmarks", *options]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stdout + found.stderr
        for name in BENCH_FILES:
            assert f"benchmarks/{name}.py::test_" in found.stdout

    def test_the_check_sees_a_difference(self):
        case = EncoderCase(tiny_shape(), SIZES)
        case.check()
        case.packed_gradients = [gradient * 1.001 for gradient in case.packed_gradients]
        with pytest.raises(AssertionError, match="backends differ in the gradient"):
            case.check()

    def test_encoder_row(self):
        bench = importlib.import_module("benchmarks.bench_encoder")
        case, report, benchmark = EncoderCase(tiny_shape(), SIZES), Report(), FakeBenchmark()
        fused, reference = paired(benchmark, case.fused_step, case.reference_step, seconds=1, rounds=3)
        bench.add_row(report, benchmark.extra_info, case, fused, reference, 1)
        assert {"padded_tokens", "real_tokens", "ratio", "speed_up", "goal", "verdict"} <= set(benchmark.extra_info)
        assert "text+image" in report.text()

    @pytest.mark.parametrize(
        ("reference", "fused", "verdict"), [(1.0, 0.5, "met"), (1.0, 0.95, "missed"), (1.0, 1.2, "slower")]
    )
    def test_encoder_verdicts(self, reference, fused, verdict):
        bench = importlib.import_module("benchmarks.bench_encoder")
        case, info = EncoderCase(tiny_shape(), SIZES), {}
        timings = [Timing([seconds] * 3, cpu=[seconds] * 3) for seconds in (fused, reference)]
        bench.add_row(Report(), info, case, *timings, 1)
        assert info["goal"] == pytest.approx(0.9 * 1.2)
        assert (info["verdict"], info["speed_up"]) == (verdict, pytest.approx(reference / fused, abs=1e-3))

    def test_memory_counts_each_storage_once(self):
        bench = importlib.import_module("benchmarks.bench_memory")
        report, case = Report(), EncoderCase(tiny_shape(), SIZES)
        bench.add_rows(report, case)
        assert [row["measured"]["measure"] for row in report.rows[bench.TITLE]] == ["saved", "peak"]
        assert all(row["measured"]["ratio"] > 0 for row in report.rows[bench.TITLE])
        x = torch.ones(1000)
        assert 8000 <= bench.peak_of(lambda: (x + 1, x * 2)) < 8100  # and a few scalars
        assert bench.peak_of(lambda: [(x + i).sum().item() for i in range(5)]) < 5000

    def test_route_plans_are_alike(self):
        bench = importlib.import_module("benchmarks.bench_route_plan")
        case = EncoderCase(tiny_shape(), SIZES)
        for name in bench.BUILDERS:
            plan = bench.builder(name, case)()
            assert torch.equal(plan.offsets, case.plan.offsets)
            assert torch.equal(plan.cu_seqlens, case.plan.cu_seqlens)
        assert bench.layer_call(case)().shape == (30, 32)
        assert all(bench.shape_of(tokens).real_tokens >= tokens for tokens in (1000, 3000, 10000))


def test_text_image_and_audio_lengths_include_cls():
    assert shapes.text(2, 5, 70) in ([7, 72], [72, 7])
    assert shapes.image(2) == [257, 257]
    assert sorted(shapes.audio(2)) == [150, 750]
