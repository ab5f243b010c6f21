"""Which strategy is chosen where none is asked for: as measured; on a GPU without host counts, one that reads none."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onepeace_fast.kernels.launch_heuristic import WIDEST
from onepeace_fast.kernels.measured import MeasuredGPU, write_measured
from onepeace_fast.ops import routed_ffn_arguments as arguments
from onepeace_fast.ops import strategies
from onepeace_fast.ops.strategies import UNMEASURED, strategy_for

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CLASSES = [{"width": None, "rows": 1000, "strategy": "per_modality"}, {"strategy": "grouped"}]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A GPU of which these classes were measured."""
    monkeypatch.setenv("ONEPEACE_FAST_MEASURED", str(tmp_path))
    monkeypatch.setattr(strategies, "gpu_name", lambda device: "A GPU" if device.type == "cuda" else "")

    def write(classes=CLASSES):
        write_measured(MeasuredGPU("A GPU", "sm_90", {}, "2026-11-28", True, {"routed_ffn": classes}, {}), tmp_path)

    yield write
    strategies.measured_for.cache_clear()


def test_a_gpu_that_was_not_measured_takes_what_the_model_of_the_kernels_prefers(measured, capturing):
    assert strategy_for("routed_ffn", CPU, 9500, 1536) == UNMEASURED == "hybrid"
    assert strategy_for("routed_ffn", GPU, 9500, 1536) == UNMEASURED
    assert arguments.chosen_strategy(None, on_gpu(), 256, 3, (40,)) == "hybrid"
    assert arguments.chosen_strategy(None, on_gpu(), 256, 3, ()) == "grouped"
    wide = WIDEST["gated_sub_ln"] + 8
    assert arguments.chosen_strategy(None, on_gpu(torch.float16), wide, 3, (40,), unfolded=True) == "hybrid"


def test_a_measured_gpu_takes_the_first_class_that_holds_the_rows(measured):
    measured()
    found = {rows: strategy_for("routed_ffn", GPU, rows, 1536) for rows in (1, 1000, 1001, 65536)}
    assert found == {1: "per_modality", 1000: "per_modality", 1001: "grouped", 65536: "grouped"}
    assert strategy_for("routed_ffn", CPU, 9500, 1536) == UNMEASURED


def test_a_strategy_that_there_is_not_is_one_line_that_names_the_file(measured, tmp_path):
    measured([{"strategy": "fastest"}])
    with pytest.raises(ValueError, match=r"expected strategies of grouped, .*, got fastest; delete the file") as caught:
        strategy_for("routed_ffn", GPU, 1, 1)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.requires_compiler
def test_torch_compile_takes_the_measured_strategy_without_reading_files(measured):
    measured()

    def scaled(x):
        return x * {"grouped": 2, "per_modality": 3}[strategy_for("routed_ffn", GPU, x.shape[0], x.shape[1])]

    compiled = torch.compile(scaled, fullgraph=True, backend="eager", dynamic=True)
    for rows, factor in ((8, 3), (2000, 2)):
        assert torch.equal(compiled(torch.ones(rows, 2)), torch.full((rows, 2), float(factor)))


@pytest.mark.requires_compiler
def test_torch_compile_takes_what_a_gpu_is_without_tracing_the_question(monkeypatch):
    def untraceable(device):
        return Path(__file__).read_text() and "sm_75", 132

    monkeypatch.setattr(arguments, "architecture_and_multiprocessors", untraceable)

    def scaled(x):
        return x * (2 if arguments._refused_by(GPU) is None else 3)

    assert torch.compile(scaled, fullgraph=True, backend="eager")(torch.ones(())) == 3


def on_gpu(dtype=torch.bfloat16, width=64):
    """What the choice reads of a tensor on a GPU."""
    size = torch.empty(0, dtype=dtype).element_size()
    return SimpleNamespace(
        is_cuda=True, device=GPU, dtype=dtype, shape=(40, width), element_size=lambda: size
    )  # fmt: skip


@pytest.fixture
def capturing(monkeypatch):
    """A GPU on which a graph is captured or not, and that has said nothing yet."""
    state = {"capturing": False, "architecture": "sm_90"}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(arguments, "architecture_and_multiprocessors", lambda device: (state["architecture"], 132))
    arguments._warn_of_host_read.cache_clear()
    yield state
    arguments._warn_of_host_read.cache_clear()


@pytest.mark.parametrize("capture", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_without_row_counts_a_gpu_runs_the_strategy_that_reads_none(measured, capturing, dtype, capture):
    measured([{"strategy": "per_modality"}])
    capturing["capturing"] = capture
    for none in ((), []):
        assert arguments.chosen_strategy(None, on_gpu(dtype), 256, 3, none) == "grouped"
    for known in ((10, 30, 0), (0, 0), [0]):
        assert arguments.chosen_strategy(None, on_gpu(dtype), 256, 3, known) == "per_modality"


UNTAKEN = [(on_gpu(torch.float32), 256, 3, "float16 or bfloat16"), (on_gpu(width=60), 256, 3, "multiple of 8"),
           (on_gpu(), 252, 3, "multiple of 8"), (on_gpu(), 256, 65, "at most 64")]  # fmt: skip


@pytest.mark.parametrize("z, hidden, groups, reason", UNTAKEN)
def test_what_no_tile_can_take_is_the_vendor_s_whatever_was_measured(measured, capturing, z, hidden, groups, reason):
    for classes in (None, [{"strategy": "hybrid"}], [{"strategy": "grouped"}]):
        if classes is not None:
            measured(classes)
        assert arguments.chosen_strategy(None, z, hidden, groups, (40,)) == "per_modality"
    for strategy in arguments.IN_TILES:
        with pytest.raises(ValueError, match=f"{reason}.* with strategy '{strategy}'"):
            arguments.chosen_strategy(strategy, z, hidden, groups, (40,))


@pytest.mark.parametrize("z, hidden, groups, reason", UNTAKEN)
def test_what_that_strategy_cannot_take_reads_offsets_on_the_host_and_says_so_once(
    measured, capturing, z, hidden, groups, reason
):
    with pytest.warns(UserWarning, match=f"row_counts: .*{reason}"):
        assert arguments.chosen_strategy(None, z, hidden, groups, ()) == "per_modality"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arguments.chosen_strategy(None, z, hidden, groups, ()) == "per_modality"
        assert arguments.chosen_strategy(None, z, hidden, groups, (40,)) == "per_modality"


def test_a_norm_of_its_own_kernel_is_as_wide_as_its_rows(measured, capturing):
    measured([{"strategy": "grouped"}])
    z, known, most = on_gpu(torch.float16), (40,), WIDEST["gated_sub_ln"]
    for hidden, unfolded in ((most, True), (most + 8, False)):
        assert arguments.chosen_strategy("grouped", z, hidden, 3, known, unfolded) == "grouped"
    with pytest.raises(
        ValueError, match=rf"^w0: expected at most {most} hidden columns .* in float16, got {most + 8}; use"
    ):
        arguments.chosen_strategy("grouped", z, most + 8, 3, known, unfolded=True)
    assert arguments.chosen_strategy(None, z, most + 8, 3, known, unfolded=True) == "per_modality"


@pytest.mark.parametrize("z, hidden, groups, reason", UNTAKEN)
def test_inside_a_graph_capture_it_is_refused_in_one_line(measured, capturing, z, hidden, groups, reason):
    capturing["capturing"] = True
    with pytest.raises(ValueError, match=f"^row_counts: expected .* graph capture, got none; .*{reason}") as caught:
        arguments.chosen_strategy(None, z, hidden, groups, ())
    assert len(str(caught.value).splitlines()) == 1
    assert arguments.chosen_strategy(None, z, hidden, groups, (40,)) == "per_modality"


def test_a_gpu_that_is_too_old_for_any_tile_is_refused_the_fused_strategy_in_one_line(measured, capturing):
    measured([{"strategy": "grouped"}])
    capturing["architecture"] = "sm_75"
    with pytest.raises(ValueError, match=r"^z: .* capability 8.0 or later, got 7.5 .*use 'per_modality'$"):
        arguments.chosen_strategy("grouped", on_gpu(), 256, 3, (40,))
    assert arguments.chosen_strategy(None, on_gpu(), 256, 3, (40,)) == "per_modality"
    capturing["architecture"] = "sm_80"
    assert arguments.chosen_strategy(None, on_gpu(), 256, 3, (40,)) == "grouped"
