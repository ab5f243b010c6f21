"""The estimate: its FLOPs are those that torch counts, its bytes those that autograd saves, its times the model's."""

from __future__ import annotations

import dataclasses
import json
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.support.encoder import EncoderCase
from benchmarks.support.shapes import Shape, Sizes
from onepeace_fast.cli import main
from onepeace_fast.config import OnePeaceConfig, TextAdapterConfig, TransformerConfig
from onepeace_fast.estimate import command, constants, errors, scale, speed
from onepeace_fast.estimate.parameters import sizes_of
from onepeace_fast.estimate.work import Batch, Work
from onepeace_fast.layers import transformer
from onepeace_fast.memory import saved_bytes
from onepeace_fast.models import stack as stacks
from onepeace_fast.ops import operation
from onepeace_fast.report.results import read
from tools.kernel_model import summary, table

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
RAGGED = {"text": [3, 6, 5], "image": [17, 17, 17]}
EVEN = {"text": [6, 6, 6], "image": [17, 17, 17]}  # attention on a CPU pads nothing then


class Dropping(Sizes):
    """Sizes of a stack with DropPath."""

    def config(self, *arguments, **settings) -> TransformerConfig:
        return dataclasses.replace(super().config(*arguments, **settings), drop_path_rate=0.5)


def sizes(layers: int = 2, kind: type[Sizes] = Sizes) -> Sizes:
    return kind(width=64, hidden=192, heads=2, layers=layers, grid=4)


def count(call) -> int:
    """FLOPs of a call, of a CPU's attention too."""
    mapping = {FLASH: lambda query, key, value, *_, out_shape=None, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def by_ops(monkeypatch):
    """The packed layer by its ops, whose insides a dispatch mode sees."""
    monkeypatch.setattr(operation, "is_eager", lambda tensors: True)
    monkeypatch.setattr(transformer, "FEW_NUMBERS", 0)


@pytest.mark.filterwarnings("ignore:.*to be fused.*")
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("lengths", [EVEN, {"audio": [9, 9]}], ids=["two modalities", "audio"])
def test_flops_are_those_that_torch_counts(lengths, backend, by_ops):
    case = EncoderCase(Shape("x", lengths), sizes())
    work = Work(case.stack.config, Batch(lengths), backend == "fused", autocast=False)
    assert count(lambda: case.forward(backend)) == work.forward().total
    assert count(lambda: case.step(backend)) == work.step().total
    assert work.needed() == 3 * work.forward().total  # nothing is padded here


@pytest.mark.filterwarnings("ignore:.*to be fused.*")
def test_padding_counts_in_the_padded_layout_alone(by_ops):
    case = EncoderCase(Shape("x", RAGGED), sizes())
    padded, packed = (Work(case.stack.config, Batch(RAGGED), packed, autocast=False) for packed in (False, True))
    assert count(lambda: case.step("reference")) == padded.step().total
    with patch.object(stacks, "choose"):
        products = count(lambda: case.forward("fused")) - 2 * 4 * 64 * 3 * 23**2  # it pads samples of like lengths
    assert products == packed.forward().products < padded.forward().products


@pytest.mark.filterwarnings("ignore:.*to be fused.*")
def test_drop_path_leaves_rows_out_of_the_packed_layout_alone(by_ops, monkeypatch):
    lengths = {"image": [17, 17]}
    case = EncoderCase(Shape("x", lengths), sizes(kind=Dropping))
    # [layers, branches, samples]: half of the last layer's are dropped.
    factors = torch.tensor([[[1.0, 1], [1, 1]], [[2, 0], [0, 2]]])
    monkeypatch.setattr(stacks, "draw_drop_path", lambda rates, samples: factors)
    packed, padded = (Work(case.stack.config, Batch(lengths), packed, autocast=False) for packed in (True, False))
    assert (packed.kept_share, padded.kept_share) == (0.75, 1)
    found = count(lambda: case.forward("fused"))
    assert found - packed.forward().total in range(64)  # the plan's own, whose sizes no width is in
    assert count(lambda: case.forward("reference")) == padded.forward().total


@pytest.mark.filterwarnings("ignore:.*to be fused.*")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_bytes_kept_are_those_that_autograd_saves(backend, autocast, by_ops):
    found = {}
    for layers in (2, 3):
        case = EncoderCase(Shape("x", RAGGED), sizes(layers))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            found[layers] = saved_bytes(lambda case=case: case.forward(backend), case.stack.parameters())
    work = Work(case.stack.config, Batch(RAGGED), backend == "fused", autocast)
    # On a CPU attention keeps its result and log-sum-exp with one row more, into which padding is written.
    row = 64 * work.element + 2 * 4 if backend == "fused" else 0
    assert found[3] - found[2] == work.saved_bytes_of_layer() + row
    beside = found[3] - work.saved_bytes() - 3 * row
    assert 0 <= beside < 0.02 * found[3]  # the plan's or the bias's integers


def test_checkpointing_keeps_streams_and_one_layer():
    config = TransformerConfig(layers=4, checkpoint_activations=True)
    work = Work(config, Batch({"image": [257] * 8}), True)
    plain = Work(dataclasses.replace(config, checkpoint_activations=False), work.batch, True)
    stream = 8 * 257 * 1536 * 4
    assert work.saved_bytes() == work.saved_bytes_of_layer() + 5 * stream + 8 * 257 * 8
    assert work.step().products == 4 / 3 * plain.step().products


def test_what_is_installed_of_the_kernels_model_is_of_the_newest_table():
    newest = table.last_file()
    written = summary.FILE.read_text(encoding="utf-8")
    assert written == summary.text(table.load(newest), newest.name), "python -m tools.kernel_model --write"


@pytest.mark.parametrize("way", speed.STRATEGIES)
@pytest.mark.parametrize("gpu", ["A100", "H100", "H200"])
def test_at_the_table_s_shape_a_layer_takes_what_the_table_says(gpu, way):
    found = table.load(table.last_file())
    text, image = found["shape"]["counts"]
    lengths = {"text": [text // 32 + (i < text % 32) for i in range(32)], "image": [image // 32] * 32}
    work = Work(TransformerConfig(), Batch(lengths), True)
    expected = found["gpus"][gpu]["strategies"][speed.STRATEGIES[way]]
    estimated = speed.layer(work, gpu, way)
    assert estimated.seconds.low * 1e6 == pytest.approx(expected["layer"][0], rel=2e-3)
    # The table has attention at its goal; here it may take longer, where its products bind.
    assert expected["layer"][1] * (1 - 2e-3) <= estimated.seconds.high * 1e6 <= 1.05 * expected["layer"][1]
    assert estimated.tax.low == pytest.approx(expected["tax"][0], abs=0.01)


def test_ranges_are_ordered_and_grow_with_work():
    batch = Batch({"text": [20] * 8, "image": [257] * 8})
    twice = Batch({name: [*row, *row] for name, row in batch.lengths.items()})
    for gpu in constants.gpus():
        for way in speed.WAYS:
            one, two = (speed.layer(Work(TransformerConfig(), b, True), gpu, way) for b in (batch, twice))
            assert 0 < one.seconds.low <= one.seconds.high < two.seconds.high and one.tax.low >= 1


def test_a_step_on_several_gpus_takes_at_least_what_it_sends():
    work = Work(TransformerConfig(layers=1), Batch({"image": [5]}), True)
    sizes = scale.Sizes(10**9, 10**8, 10**7)
    sent = scale.sent(sizes, 1, 1536, 16)
    assert sent.gathered == 15 / 16 * 4 * (2 * (10**9 - 10**7) + 10**7) and sent.gradients == 15 / 16 * 4e9
    time = scale.seconds(work, "H100", "hybrid", sizes, 16)
    assert time.low == pytest.approx(sent.total / 40e9) and time.high > time.low
    assert scale.seconds(work, "H100", "hybrid", sizes, 8).low < time.low  # by NVLink
    assert scale.memory(work, sizes, 1).gathered == 0 < scale.memory(work, sizes, 2).gathered


def test_the_largest_batch_fits_and_one_more_does_not():
    lengths = {"text": [7, 72], "image": [257, 257]}
    config, sizes = TransformerConfig(), scale.Sizes(3_926_290_113, 94_430_438, 149_072_673)
    most = command.largest(config, lengths, "hybrid", "H100", sizes, 64)
    peaks = [
        scale.memory(
            Work(config, Batch({n: (r * 100)[:samples] for n, r in lengths.items()}), True), sizes, 64
        ).peak.high
        for samples in (most, most + 1)
    ]
    assert peaks[0] <= 80e9 < peaks[1]


def small(**changes) -> OnePeaceConfig:
    one = {"embed_dim": 64, "ffn_embed_dim": 128, "layers": 3, "attention_heads": 2, "image": None, "audio": None}
    decoder = TransformerConfig(**{**one, "layers": 1, "text": TextAdapterConfig(use_bias=False)})
    return OnePeaceConfig(vocab_size=50, encoder=TransformerConfig(**{**one, **changes}), decoder=decoder)


def test_parameters_are_the_model_s():
    from onepeace_fast.models.pretrain import OnePeacePretrain

    model, sizes = OnePeacePretrain(small()), sizes_of(small())
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    layers = [layer for layer in model.modules() if isinstance(layer, transformer.TransformerLayer)]
    assert sizes.layer == sum(p.numel() for p in layers[0].parameters())
    assert sizes.root == sizes.parameters - sum(p.numel() for layer in layers for p in layer.parameters())


def test_its_errors_beside_the_committed_measurements_are_printed(capsys):
    path = command.RESULTS / "cpu_AMD-EPYC_2026-11-30T0019Z.json"
    found = errors.errors([read(path)])
    kept = {error.what: error for error in found if ", saved, " in error.what}
    # When it was measured, the packed layer also kept what its output projection gives.
    off = {what: error.relative for what, error in kept.items()}
    assert len(off) == 4 and all((-0.06 if "fused" in what else -0.01) < by < 0.01 for what, by in off.items()), off
    ratios = [error for error in found if error.what.endswith("fused over reference")]
    assert len(ratios) == 20
    by_name = next(error for error in ratios if "sounds of 3-15 s, both passes" in error.what)
    assert by_name.measured == read_ratio(path, "sounds of 3-15 s")
    arguments = ["--width", "64", "--hidden", "128", "--heads", "2", "--layers", "2", "--gpu", "H100"]
    assert main(["estimate", *arguments, "--gpus", "1", "16", "--measured", str(path)]) == 0
    out = capsys.readouterr().out
    assert "28 figures of 1 files" in out and "None of them is a time on a GPU" in out
    assert all(word in out for word in ("samples/s", "GB sent", "MFU", "hybrid", "eager", "compiled", "TFLOP forward"))
    assert "A100" not in out


def read_ratio(path, name) -> float:
    rows = next(iter(json.loads(path.read_text())["measured"].values()))
    return next(r for r in rows if r["input"] == name and r["mode"] == "both passes")["fused_over_reference"][1]


def test_a_gpu_s_times_are_held_against_the_estimate(tmp_path):
    lengths = {"text": [20] * 4, "image": [257] * 4}
    times = {"median_ms": 5.0, "min_ms": 4.0, "max_ms": 6.0}
    section = {"kind": "layer", "rows": 1108, "padded_tokens": 1108, "lengths": lengths,
               "variants": {"strategy_hybrid": {"forward_backward": times}}}  # fmt: skip
    content = {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "sizes": {"width": 1536, "hidden": 6144, "heads": 24},
               "sections": {"layer, a": section}}  # fmt: skip
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    (error,) = errors.errors([read(path)])
    expected = speed.layer(Work(TransformerConfig(layers=1), Batch(lengths), True), "H100", "hybrid").seconds
    assert (error.measured, error.unit) == (5.0, "ms") and error.estimated == expected.times(1e3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tokens", "smell=3"], "--tokens: expected a modality of the model (text, image, audio), got smell"),
        (["--modalities", "smell"], "--modalities: expected some of text, image, audio, got smell"),
        (["--drop-path", "1"], "drop_path_rate: expected a probability in [0, 1), got 1.0"),
        (["--width", "100"], "embed_dim: expected a multiple of attention_heads (24), got 100"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, line, capsys):
    assert main(["estimate", *arguments]) == 2
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("arguments", [["--tokens", "text"], ["--tokens", "text=9-3"], ["--gpus", "1025"]])
def test_arguments_of_another_form_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *arguments])
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err
