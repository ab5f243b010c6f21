"""benchmarks/gpu.py: what it measures and writes, in which order, and what it does with a failure, on a CPU."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.benchmark_cases import LostClock

from benchmarks import gpu
from benchmarks.support import decoder_attention, peers, report, sections
from benchmarks.support import relative_bias_attention as attention
from benchmarks.support.variants import PASSES, Variant

CPU = torch.device("cpu")
COMPILED = {"reference_compiled", "reference_max_autotune", "flex_attention"}  # of attention


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[int, dict]:
    """One run of gpu.py over tiny shapes, in which one peer fails; its exit code and its JSON."""
    folder = tmp_path_factory.mktemp("gpu")

    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "grouped_mm", broken, raising=False)
        code = gpu.main(["--out", str(folder), "--device", "cpu", "--quick"])
    path, document = sorted(folder.iterdir())
    assert path.name.startswith("gpu-quick_") and path.suffix == ".json" and document == path.with_suffix(".md")
    return code, {**json.loads(path.read_text()), "document": document.read_text()}


def of_kind(result: dict, kind: str, compiled: bool = False) -> dict[str, dict]:
    """The sections of a kind, with compiled peers or without, by the names of their shapes."""
    return {
        section["shape"]: section
        for name, section in result["sections"].items()
        if section["kind"] == kind and name.endswith("compiled peers") == compiled
    }


def test_a_failing_peer_is_recorded_and_the_rest_goes_on(quick_run):
    code, result = quick_run
    assert code == 0 and result["unmeasured"] == [] and result["running"] is None and result["faulted"] == {}
    names = [shape.name for shape in sections.tiny_shapes()]
    assert len(result["errors"]) == 4
    assert all("RuntimeError: no such kernel" in line for line in result["errors"])
    kinds = {kind: of_kind(result, kind) for kind in ("layer", "ffn", "bias")}
    by_rows = [name for name in kinds["ffn"] if "modalities" in name]
    assert by_rows == ["2 modalities, 16 rows", "2 modalities, 48 rows"]
    for name in by_rows:
        assert list(kinds["ffn"][name]["variants"]) == ["products", "sliced", "strategy_reference"]
    for shape in names:
        variants = {kind: kinds[kind][shape]["variants"] for kind in kinds}
        assert variants["ffn"]["grouped_mm"]["error"] == "RuntimeError: no such kernel"
        layer = ("products", "products_joined", "reference", "boolean_mask", "sliced", "fused", "strategy_reference")
        measured = [("layer", name) for name in layer]
        ffn = ("products", "products_joined", "sliced", "padded", "boolean_mask", "fused", "strategy_reference")
        measured += [("ffn", name) for name in ffn]
        measured += [("bias", name) for name in ("reference", "fused")]
        for part, name in measured:
            for mode in ("forward", "forward_backward"):
                times = variants[part][name][mode]
                assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"] and times["runs"] == 3
        compared = [("layer", "fused"), ("ffn", "fused"), ("ffn", "boolean_mask")]
        for part, name in [*compared, ("layer", "strategy_reference"), ("ffn", "strategy_reference")]:
            checked = variants[part][name]["checked"]
            assert list(checked) == ["output", "gradient", "parameter gradients"] and max(checked.values()) <= 1


def test_the_most_telling_comes_first_and_compiled_peers_come_after_all_of_the_headline(quick_run):
    _, result = quick_run
    names = list(result["sections"])
    first = ["ceilings", "layer, vision-language tiny", "routed FFN, vision-language tiny"]
    assert names[:3] == first and names[5] == "attention, 3 x 17"
    assert [name.split(",")[0] for name in names[6:9]] == ["layer_norm", "residual", "gated_sub_ln"]
    compiled = [name for name in names if name.endswith("compiled peers")]
    assert names[9:15] == compiled
    full = [section.name for section in sections.rest(quick=False)]
    assert full[0] == "layer, vision-language 32, compiled peers" and full[6] == "bias, vision-language 32"
    others = full[6 : full.index("layer, image 64, compiled peers")]
    assert len(others) == 1 + 3 * 3 + 10 + 3 and not any("compiled" in name for name in others)
    assert full[-1] == "attention, 2 x 1025, compiled peers"


def test_what_compiles_long_can_be_compiled_beforehand():
    cuda = torch.device("cuda")
    warmed = {section.name: section.warmed for section in sections.headline(False, cuda) if section.warmed}
    own = ("fused", "strategy_grouped", "strategy_hybrid", "strategy_per_modality")
    assert warmed["layer, vision-language 32"] == (*own, "fused_drop_path_0.4")
    assert warmed["routed FFN, vision-language 32"] == own
    assert [name for name, variants in warmed.items() if variants == ("fused",)] == [
        f"{name}, vision-language 32" for name in ("layer_norm", "residual", "gated_sub_ln")
    ]
    compiled = {section.name: section.warmed for section in sections.rest(False) if section.warmed}
    peers = ("sliced_compiled", "sliced_max_autotune", "boolean_mask_compiled", "grouped_mm_compiled")
    assert compiled["routed FFN, audio 16, compiled peers"] == peers
    assert compiled["attention, 64 x 257, compiled peers"] == (
        "reference_compiled", "reference_max_autotune", "flex_attention"
    )  # fmt: skip
    assert next(iter(compiled)) == "layer, vision-language 32, compiled peers"


def test_one_variant_of_a_section_runs_alone_to_compile(tmp_path):
    target = ["--warm-one", "layer_norm, vision-language tiny", "fused"]
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", *target]) == 0
    assert not list(tmp_path.iterdir())


def test_an_own_variant_that_does_not_compile_is_a_fault_and_a_peer_or_too_little_time_is_none(
    tmp_path, monkeypatch, capsys
):
    codes, started = {}, []

    def start(command, timeout, **_):
        started.append((command[-2], command[-1], timeout))
        if command[-1] == "late":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, codes.get(command[-1], 0), "", "KeyError: reason\n")

    sections_ = [sections.Section("one", "layer", None, warmed=("fused", "peer", "late"))]
    monkeypatch.setattr(gpu, "sections_of", lambda *_: sections_)
    monkeypatch.setattr(gpu.subprocess, "run", start)
    command = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--warm", "--budget-seconds", "30"]
    codes["peer"] = 1
    assert gpu.main(command) == 0
    said = capsys.readouterr().out
    assert "one, peer: FAILED with 1: KeyError: reason" in said and "one, late: stopped: the time is over" in said
    assert {name for _, name, _ in started} == {"fused", "peer", "late"}
    assert all(0 < timeout <= 30 for *_, timeout in started)
    codes["fused"] = 1
    assert gpu.main(command) == 1
    started.clear()
    assert gpu.main([*command[:-1], "-1"]) == 0 and not started


def test_attention_alone_is_measured_against_its_floor_and_what_is_left_out_says_why(quick_run):
    _, result = quick_run
    measured = of_kind(result, "attention")
    decoders = {shape.name: measured.pop(shape.name) for shape, _ in decoder_attention.small_batches()}
    assert list(measured) == [shape.name for shape in attention.tiny_shapes()]
    for decoder in decoders.values():
        assert {"reference", "sdpa", "fused"} < set(decoder["variants"])
        assert list(decoder["variants"]["fused"]["checked"]) == ["output", "gradient"]
    copied = result["sections"]["ceilings"]["variants"]["copy"]["GB_per_second"]
    for shape in measured.values():
        variants, is_part = shape["variants"], "time_per_pair" in shape
        compared = {"fused", "fused_no_bias", "fused_frozen_tables"}
        if not is_part:
            listed = peers.measured("attention", torch.device("cuda"), full=True)
            assert set(listed) - COMPILED - {"sdpa"} <= set(variants)  # that is of a decoder
            compared |= {"sdpa_memory_efficient", "bias_built_sdpa_memory_efficient"}
            compared |= {"all_layers_sdpa_memory_efficient", "all_layers_fused"}
        for name in compared:
            assert list(variants[name]["checked"]) == ["output", "gradient"]
        left_out = {name: record["skipped"] for name, record in variants.items() if "skipped" in record}
        assert is_part or "CUDA device" in left_out["sdpa_cudnn"]
        assert all("left out: " in reason for reason in left_out.values())
        matrix = shape["rows"] * sections.TINY.width * 4
        assert shape["bytes"] == {name: n * matrix for name, n in zip(PASSES, (4, 8, 12), strict=True)}
        assert {name for name in variants["fused"] if name in PASSES} >= {"forward", "forward_backward"}
        for mode in variants["fused"].keys() & set(PASSES):
            found, median = shape["ratios"][mode], variants["fused"][mode]["median_ms"]
            assert found["over_floor"] == pytest.approx(median / (shape["bytes"][mode] / copied / 1e6), rel=0.05)
        assert shape["goals"]["backward"] == {}
    (compiled,) = of_kind(result, "attention", compiled=True).values()
    assert set(compiled["variants"]) == {"reference", "fused", *COMPILED}
    assert "--quick" in compiled["variants"]["flex_attention"]["skipped"]
    assert compiled["goals"]["backward"] == {"flex_attention_over_fused": "not measured, goal at least 1.0"}
    text = result["document"]
    assert "| fused_no_bias |" in text and "| time per pair of tokens, over 3 x 17 |" in text
    assert "| flex_attention_over_fused | not measured, goal at least 1.0 |" in text


def test_compiled_variants_are_left_out_with_a_reason(quick_run):
    _, result = quick_run
    expected = {
        "layer": {"reference_compiled", "reference_max_autotune"},
        "ffn": {"sliced_compiled", "sliced_max_autotune", "boolean_mask_compiled", "grouped_mm_compiled"},
        "pointwise": {"compiled", "max_autotune"},
    }
    for kind, compiled in expected.items():
        ((shape, section),) = of_kind(result, kind, compiled=True).items()
        left_out = {name: r["skipped"] for name, r in section["variants"].items() if "skipped" in r}
        assert set(left_out) == compiled and shape == "vision-language tiny"
        assert all("--quick" in reason for reason in left_out.values())
        beside = set(section["variants"]) - compiled
        assert "fused" in beside and all("forward_backward" in section["variants"][name] for name in beside)
    skipped = [line for line in result["skipped"] if "is not installed" not in line and "cuDNN" not in line]
    skipped = [line for line in skipped if "without a CUDA device" not in line and "no padding" not in line]
    assert len(skipped) == 2 + 4 + 3 + 6 and all("--quick" in line for line in skipped)
    eager = [line for line in skipped if "compiled peers, " not in line]
    assert eager == []


def test_operations_between_the_products_are_measured_against_a_copy(quick_run):
    _, result = quick_run
    for name in ("layer_norm", "residual", "gated_sub_ln"):
        operation = result["sections"][f"{name}, vision-language tiny"]
        assert [n for n, r in operation["variants"].items() if "error" in r] == []
        record = operation["variants"]["fused"]
        assert set(record["checked"]) == {"output", "gradient", "parameter gradients"}
        for mode, must_move in operation["bytes"].items():
            if mode not in record:  # a backward pass that noise has left without a time
                continue
            rate = must_move / record[mode]["median_ms"] / 1e6
            assert record[mode]["GB_per_second"] == pytest.approx(rate, rel=0.05, abs=0.1)
            copied = result["sections"]["ceilings"]["variants"]["copy"]["GB_per_second"]
            assert record[mode]["share_of_copy"] == pytest.approx(rate / copied, rel=0.05, abs=1e-3)
        assert f"| {name}, vision-language tiny; {operation['rows']} rows |" in result["document"]


def test_taxes_are_ratios_of_medians(quick_run):
    _, result = quick_run
    for part, name in (("layer", "reference"), ("layer", "fused"), ("ffn", "sliced")):
        for section in of_kind(result, part).values():
            if name not in section["variants"]:
                continue
            record, base = section["variants"][name], section["variants"]["products"]
            for mode in ("forward", "forward_backward"):
                expected = record[mode]["cpu_median_ms"] / base[mode]["cpu_median_ms"]
                assert record["tax"][mode] == pytest.approx(expected, abs=1e-3)


def test_what_a_reader_needs_is_there(quick_run):
    _, result = quick_run
    assert {"date", "device", "dtype", "machine", "method", "sizes", "seconds"} <= set(result)
    assert {"onepeace_fast", "torch", "cuda_of_torch", "triton"} <= set(result["machine"]["versions"])
    ceilings = result["sections"]["ceilings"]["variants"]
    assert ceilings["copy"]["GB_per_second"] > 0 and ceilings["product"]["TFLOP_per_second"] >= 0
    layers, biases = of_kind(result, "layer"), of_kind(result, "bias")
    for expected in sections.tiny_shapes():
        layer, bias = layers[expected.name], biases[expected.name]["variants"]["reference"]
        assert (layer["rows"], layer["padded_tokens"]) == (expected.real_tokens, expected.padded_tokens)
        assert layer["forward_operations"] > 0
        assert bias["per_layer_ms"] == pytest.approx(bias["forward_backward"]["median_ms"] / 40)
    text = result["document"]
    assert "| grouped_mm | error | error |" in text and "## Errors" in text and "--quick" in text
    assert "| copy | " in text


def test_only_the_library_and_its_reference_decide_the_exit_code(quick_run):
    _, result = quick_run
    assert not gpu.failed(result)
    own = [("residual, vision-language tiny", "fused"), ("attention, 3 x up to 29", "fused")]
    own += [("layer, audio tiny", name) for name in ("fused", "reference", "products", "strategy_reference")]
    for section, name in own:
        broken = copy.deepcopy(result)
        broken["sections"][section]["variants"][name] = {"error": "none"}
        assert gpu.failed(broken)
        broken["sections"][section]["variants"][name] = {"skipped": "left out: the time budget was used up"}
        assert not gpu.failed(broken)
    broken = copy.deepcopy(result)
    broken["sections"]["layer, audio tiny"] |= {"variants": {}, "error": "no inputs"}
    assert gpu.failed(broken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from benchmarks import gpu
from benchmarks.support.feed_forward import FeedForwardCase

whole = gpu.sections_of
gpu.sections_of = lambda *where: whole(*where)[:3]

number = sys.argv.pop()
FeedForwardCase.fused = lambda *_: os.kill(os.getpid(), int(number))
sys.exit(gpu.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_measured_survives_a_kill_and_the_same_command_goes_on_with_what_is_left(
    tmp_path, monkeypatch, number
):
    options = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--date", "once", "--part", "headline"]
    command = [sys.executable, "-c", KILLED, *options, str(int(number))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny matrices: threads would only wait for each other
    killed = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143), killed.stderr
    document, path = sorted(tmp_path.iterdir(), key=lambda file: file.suffix, reverse=True)
    left = json.loads(path.read_text())
    name = "routed FFN, vision-language tiny"
    assert list(left["sections"]) == ["ceilings", "layer, vision-language tiny"]
    assert "forward_backward" in left["sections"]["layer, vision-language tiny"]["variants"]["fused"]
    assert "## layer, vision-language tiny" in document.read_text() and "layer, vision-language tiny" in killed.stdout
    assert left["running"] == ([name, "fused"] if number == signal.SIGKILL else None)

    whole = gpu.sections_of
    monkeypatch.setattr(gpu, "sections_of", lambda *where: whole(*where)[:3])
    assert gpu.main(options) == int(number == signal.SIGKILL)
    result = json.loads(path.read_text())
    assert result["sections"]["layer, vision-language tiny"] == left["sections"]["layer, vision-language tiny"]
    assert list(result["sections"])[2:] == [name, "routed FFN, 2 modalities, 16 rows"]
    variants = result["sections"][name]["variants"]
    assert "forward_backward" in variants["sliced"] and "forward_backward" in variants["strategy_reference"]
    if number == signal.SIGKILL:
        assert variants["fused"] == {"error": "an earlier process ended while this ran", "tax": {}}
    else:
        assert "forward_backward" in variants["fused"]
    assert result["running"] is None and sorted(tmp_path.iterdir()) == sorted([path, document])


def made_up(name: str, factories: dict) -> sections.Section:
    """A section of these variants."""
    prepared = sections.Prepared(factories, "reference", lambda records: {"rows": 1})
    return sections.Section(name, "layer", lambda setting: prepared)


def test_a_lost_device_ends_the_process_and_the_next_one_leaves_out_what_lost_it(tmp_path, monkeypatch, capsys):
    def faults(_):
        raise RuntimeError("illegal memory access")

    def right() -> Variant:
        return Variant(lambda _: torch.ones(2), lambda _: (torch.ones(2),))

    measured = []
    both = {"reference": right, "fused": lambda: Variant(faults, faults)}
    listed = [made_up("first", {"reference": lambda: measured.append(1) or right()}), made_up("second", both)]
    monkeypatch.setattr(gpu, "sections_of", lambda *_: listed)
    monkeypatch.setattr(gpu, "clock_for", lambda _: LostClock())
    monkeypatch.setattr(gpu, "ceilings", lambda *_, **__: {"copy": {}, "product": {"side": 1, "dtype": "none"}})
    options = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--date", "once"]
    assert gpu.main(options) == gpu.DEVICE_LOST == 3
    assert "the device was lost: fused: RuntimeError: illegal memory access" in capsys.readouterr().err
    assert gpu.main(options) == 1 and measured == [1]
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    variants = result["sections"]["second"]["variants"]
    assert variants["fused"] == {"error": "the device was lost: RuntimeError: illegal memory access"}
    assert "forward_backward" in variants["reference"] and list(result["sections"]) == ["ceilings", "first", "second"]


def test_a_section_whose_inputs_lose_the_device_is_left_out_as_a_whole(tmp_path, monkeypatch):
    def prepare(setting):
        raise RuntimeError("no inputs")

    listed = [sections.Section("bad", "layer", prepare), made_up("good", {})]
    monkeypatch.setattr(gpu, "sections_of", lambda *_: listed)
    monkeypatch.setattr(gpu, "clock_for", lambda _: LostClock())
    options = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--date", "once"]
    assert gpu.main(options) == 3 and gpu.main(options) == 1
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["sections"]["bad"]["error"] == "the device was lost: RuntimeError: no inputs"
    assert "good" in result["sections"] and result["errors"] == [f"bad: {result['sections']['bad']['error']}"]


def test_sections_that_the_time_does_not_reach_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "sections_of", lambda *_: [made_up("one", {}), made_up("two", {})])
    options = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--budget-seconds", "-1"]
    assert gpu.main(options) == 0
    assert "not reached: one\nnot reached: two\n" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["unmeasured"] == ["one", "two"]
    assert "## Sections not reached" in path.with_suffix(".md").read_text()


def test_a_markdown_table_keeps_its_columns():
    rows = [("a | b", "c"), ("d", 1)]
    assert report.markdown(rows) == "| a \\| b | c |\n| --- | ---: |\n| d | 1 |"
