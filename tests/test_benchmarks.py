"""The benchmarks' own logic over tiny shapes: what they count, how they take turns, and what they do with a failure."""

import importlib
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support.benchmark_cases import SIZES, LostClock, tiny_runner, tiny_shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.support import machine
from benchmarks.support.boolean_masks import routed_by_masks
from benchmarks.support.encoder import EncoderCase, inputs
from benchmarks.support.layer import LayerCase
from benchmarks.support.memory import peak_of
from benchmarks.support.report import Report
from benchmarks.support.sections import full_shapes
from benchmarks.support.shapes import Shape
from benchmarks.support.timing import REPLAY, paired
from benchmarks.support.variants import Variant, compiled
from onepeace_fast.timing import DeviceLost, Timing

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BENCH_FILES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


class FakeBenchmark:
    """Does what pytest-benchmark's ``pedantic`` does, without its statistics."""

    def __init__(self) -> None:
        self.extra_info = {}

    def pedantic(self, target, rounds, iterations):
        """Run the target and keep the times that the timer says."""
        assert iterations == 1
        self.seconds = []
        for _ in range(rounds):
            start = REPLAY()
            target()
            self.seconds.append(REPLAY() - start)


class OperationCounter(TorchDispatchMode):
    """Sums the floating-point operations of matrix products."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result


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
        longest = {shape.name: max(map(max, shape.lengths.values())) for shape in full_shapes()}
        samples = {shape.name: shape.samples for shape in full_shapes()}
        assert longest == {"vision-language 32": 257, "image 64": 257, "audio 16": 750, "audio-language 16": 750}
        assert samples == {"vision-language 32": 32, "image 64": 64, "audio 16": 16, "audio-language 16": 16}
        assert 9400 < full_shapes()[0].real_tokens < 9600


class TestPairs:
    def test_pairs_alternate(self):
        called, benchmark = [], FakeBenchmark()
        measured, against = paired(
            benchmark, lambda: called.append("m"), lambda: called.append("a"), seconds=60, rounds=5
        )
        assert called == ["a", "m", "m", "a"] * 3 and benchmark.seconds == measured.seconds
        assert len(measured.seconds) == len(against.seconds) == len(measured.cpu) == 5


class TestVariants:
    def variant(self, value: float) -> Variant:
        return Variant(lambda _: torch.full((4,), value), lambda _: None, rows=lambda y: y)

    def test_the_time_budget_is_held(self):
        factories = {"eager": lambda: self.variant(1.0), "compiled": compiled(lambda: self.variant(1.0))}
        records = tiny_runner(no_compile="not today").measure(factories)
        assert records["compiled"] == {"skipped": "not today"} and "forward" in records["eager"]
        runner = tiny_runner()
        runner.budget.compile_seconds["compiled"] = 1000.0
        records = runner.measure(factories)
        assert "budget" in records["compiled"]["skipped"] and "forward" in records["eager"]
        runner.budget.compile_seconds["compiled"] = 50.0  # of 60 that are left, though of 40 sections
        runner.budget.sections_left = 40
        assert "forward" in runner.measure(factories)["compiled"]
        assert all("budget" in record["skipped"] for record in tiny_runner(-1.0).measure(factories).values())

    def test_what_building_and_compiling_take_is_not_taken_from_the_times(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("benchmarks.support.variants.time.perf_counter", lambda: now[0])

        def built() -> Variant:
            now[0] += 50.0
            return self.variant(1.0)

        runner, seconds = tiny_runner(100.0), []
        runner.budget.sections_left = 2
        monkeypatch.setattr(
            "benchmarks.support.variants.interleaved", lambda *_, **how: (seconds.append(how["seconds"]), ({}, {}))[1]
        )
        runner.measure({"slow to build": built})
        assert seconds == [25.0]  # half of what is left after building, for one of two sections

    def test_a_fault_of_the_device_names_its_variant_and_one_that_faulted_before_is_not_run(self):
        def breaks(_):
            raise RuntimeError("an illegal memory access was encountered")

        started = []
        runner = tiny_runner()
        runner.clock, runner.starting = LostClock(), started.append
        factories = {"first": lambda: self.variant(1.0), "breaks": lambda: Variant(breaks, breaks)}
        with pytest.raises(DeviceLost) as lost:
            runner.measure(factories)
        assert lost.value.args == ("breaks", "RuntimeError: an illegal memory access was encountered")
        assert started == ["first", "breaks"]
        times = iter([1, 1, 0])
        later = Variant(lambda _: torch.ones(4), lambda _: 1 / next(times))
        with pytest.raises(DeviceLost) as lost:
            runner.measure({"first": factories["first"], "later": lambda: later})
        assert lost.value.args == ("later", "forward_backward: ZeroDivisionError: division by zero")
        assert started[-1] == ""
        runner.faulted = {"breaks": "an earlier process died of it"}
        records = runner.measure(factories)
        assert records["breaks"] == {"error": "an earlier process died of it"} and "forward" in records["first"]

    def test_bare_products_are_those_of_the_layer(self):
        shape = Shape("image", {"image": [5, 5]})  # without padding the reference multiplies the same matrices
        case = LayerCase(shape, SIZES, CPU, torch.float32, sets=1)
        bare, reference = case.products(), case.reference()
        counted = {}
        for name, call in {
            "products": bare.forward,
            "products with backward": bare.variant().forward_backward,
            "reference": reference.forward,
            "reference with backward": reference.forward_backward,
            "joined": case.products(joined=True).forward,
        }.items():
            with OperationCounter() as counter:
                call(0)
            counted[name] = counter.operations
        assert counted["products"] == counted["reference"] == counted["joined"] == bare.operations > 0
        assert counted["products with backward"] == counted["reference with backward"] == 3 * bare.operations


class TestMachine:
    def program(self, tmp_path, monkeypatch, body: str) -> Path:
        """Put a nvidia-smi on PATH; returns the file to which it adds a line for each start."""
        starts, program = tmp_path / "starts", tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$1" >> {starts}\n{body}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return starts

    def test_nvidia_smi_starts_once_for_all_readings(self, tmp_path, monkeypatch):
        starts = self.program(tmp_path, monkeypatch, "echo NVIDIA H200, 580, 345, 1, 2, 3, 4, 5, 6, 0x0")
        found = machine.nvidia_smi()
        assert (found["name"], found["driver_version"], found["clocks.sm"]) == ("NVIDIA H200", "580", "345")
        assert list(found) == list(machine.QUERY) and len(starts.read_text().splitlines()) == 1

    def test_a_reading_that_the_driver_does_not_know_costs_no_other(self, tmp_path, monkeypatch):
        body = 'case $1 in *throttle*) echo "Field is not valid"; exit 2;; *) echo A, 1, 2, 3, 4, 5, 6, 7, 8;; esac'
        starts = self.program(tmp_path, monkeypatch, body)
        assert machine.nvidia_smi()["temperature.gpu"] == "8" and len(starts.read_text().splitlines()) == 2
        self.program(tmp_path, monkeypatch, "echo no device; exit 9")
        assert machine.nvidia_smi() == {"error": "no device"}


class TestBenchFiles:
    @pytest.mark.slow
    def test_pytest_collects_every_file(self):
        options = ["--collect-only", "-q"]
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

    def test_masks_route_as_the_reference_does_and_the_check_sees_another_route(self):
        case, masked = (EncoderCase(tiny_shape(), SIZES) for _ in range(2))
        case.check(routed_by_masks(masked))
        masked.stack.fusion_model.layers[0].routed_ffn.modality.zero_()
        with pytest.raises(AssertionError, match="backends differ in the output"):
            case.check(masked)

    def test_rounded_numbers_are_held_against_exact_ones(self):
        case, exact = (EncoderCase(tiny_shape(), SIZES).to(torch.bfloat16) for _ in range(2))
        exact.to(torch.float64)
        case.check_rounded(exact)
        case.packed_gradients = [1.1 * gradient for gradient in case.packed_gradients]
        with pytest.raises(AssertionError, match="backends differ in the gradient"):
            case.check_rounded(exact)

    def test_peers_row(self):
        bench = importlib.import_module("benchmarks.bench_encoder")
        report, info = Report(), {}
        timings = {name: Timing([1.0] * 4, cpu=[cpu] * 4) for name, cpu in (("fused", 0.5), ("reference", 1.0))}
        bench.add_peers(report, info, "peers", "texts", 1, timings, [("fused", "reference")])
        assert info["fused_over_reference"] == (0.5, 0.5, 0.5) and info["reference"]["cpu_median_ms"] == 1000
        assert report.rows["peers"][0]["measured"] == info and "0.50 (0.50-0.50)" in report.text()

    def test_encoder_row(self):
        bench = importlib.import_module("benchmarks.bench_encoder")
        case, report, benchmark = EncoderCase(tiny_shape(), SIZES), Report(), FakeBenchmark()
        calls = [partial(case.step, None), partial(case.step, "reference"), partial(case.forward_alone, "fused")]
        shapes = (bench.padded_shape(case.shape), case.shape)
        calls += [bench.bare_products(shape, SIZES, mode) for shape in shapes for mode in ("forward",)]
        bench.add_row(
            report, benchmark.extra_info, case, "both passes", 1, *paired(benchmark, *calls, seconds=1, rounds=3)
        )
        assert benchmark.extra_info["padded_tokens"] == 36 and benchmark.extra_info["packed_tokens"] == 30
        assert benchmark.extra_info["chosen"] in ("reference", "fused")
        assert "text+image" in report.text()

    @pytest.mark.parametrize(
        ("automatic", "fused", "missed"),
        [
            (0.8, 1.05, []),
            (1.05, 1.05, ["automatic at most 1", "0.95 of the products' gain"]),
            (0.9, 1.2, ["fused at most 1.1", "0.95 of the products' gain"]),
        ],
    )
    def test_encoder_verdicts(self, automatic, fused, missed):
        bench = importlib.import_module("benchmarks.bench_encoder")
        case, info = EncoderCase(tiny_shape(), SIZES), {}
        timings = [Timing([seconds] * 30, cpu=[seconds] * 30) for seconds in (automatic, 1.0, fused, 1.2, 1.0)]
        bench.add_row(Report(), info, case, "forward", 1, *timings)
        assert info["missed"] == missed
        assert info["products_padded_over_packed"] == pytest.approx(1.2)

    def test_memory_counts_each_storage_once(self):
        bench = importlib.import_module("benchmarks.bench_memory")
        report, case = Report(), EncoderCase(tiny_shape(), SIZES)
        bench.add_rows(report, case)
        assert [row["measured"]["measure"] for row in report.rows[bench.TITLE]] == ["saved", "peak"]
        assert all(row["measured"]["ratio"] > 0 for row in report.rows[bench.TITLE])
        x = torch.ones(1000)
        assert 8000 <= peak_of(lambda: (x + 1, x * 2)) < 8100  # and a few scalars
        assert peak_of(lambda: [(x + i).sum().item() for i in range(5)]) < 5000

    def test_embedding_compares_what_both_ways_have_in_common(self):
        for package in ("tokenizers", "PIL", "soundfile", "scipy"):
            pytest.importorskip(package)
        bench = importlib.import_module("benchmarks.bench_embedding")
        counts = bench.Counts(texts=5, images=2, sounds=3, tokens=(5, 9), seconds=(1.0, 1.2))
        case, report = bench.EmbeddingCase(SIZES, counts), Report()
        ids = case.embedder.process_text(case.texts)
        assert sorted((ids != 1).sum(1).tolist()) == [5, 6, 7, 8, 9]
        for part in bench.PARTS:
            case.check(part)
        timings = tuple(Timing([seconds] * 9, cpu=[seconds] * 9) for seconds in (0.8, 1.0))
        assert [bench.add_row(report, part, 1, timings, (1, 2)) for part in bench.PARTS] == [False, True, False, True]
        case.model.get_submodule("image_proj").register_forward_hook(
            lambda _, __, found: found * torch.randn_like(found)
        )
        with pytest.raises(AssertionError, match="not close"):
            case.check("images")

    def test_route_plans_are_alike(self):
        bench = importlib.import_module("benchmarks.bench_route_plan")
        case = EncoderCase(tiny_shape(), SIZES)
        for name in bench.BUILDERS:
            plan = bench.builder(name, case)()
            assert torch.equal(plan.offsets, case.plan.offsets)
            assert torch.equal(plan.cu_seqlens, case.plan.cu_seqlens)
        assert bench.layer_call(case)().shape == (30, 32)
        assert all(bench.shape_of(tokens).real_tokens >= tokens for tokens in (1000, 3000, 10000))
