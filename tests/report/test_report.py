"""The report of benchmarks: what it flags, what its pictures say, and that it renders from the committed results."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from matplotlib.colors import to_hex
from matplotlib.image import imread

from onepeace_fast.cli import main
from onepeace_fast.report import drawing, page
from onepeace_fast.report.changes import compare
from onepeace_fast.report.drawing import MEASURED, MODELLED
from onepeace_fast.report.model_charts import MEASURED_HERE
from onepeace_fast.report.results import Model, Results, read

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"
OF_CPU = sorted(RESULTS.glob("cpu_*.json"))
MOST = RESULTS / "cpu_AMD-EPYC_2026-11-30T0019Z.json"
OF_MODEL = RESULTS / "model_2026-11-30.json"
UNITS = (" ms", "ms\n", "us for", "MiB", "TFLOP/s", "over th", "of a copy's rate", "times", "GB", "samples a second")


@pytest.fixture(scope="module")
def drawn():
    return page.draw([read(path) for path in (*OF_CPU, OF_MODEL)])


def texts(figure) -> str:
    labels = [figure.get_supxlabel(), *(text.get_text() for text in figure.texts)]
    for axes in figure.axes:
        labels += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title()]
    return f" {' | '.join(labels)}".replace("| ms", "|  ms")


def timed(median: float, low: float, high: float) -> dict:
    ends = {"lower_quartile_ms": low, "upper_quartile_ms": high, "min_ms": low / 2, "max_ms": high * 3}
    return {"median_ms": median, **ends, "runs": 30, "host_median_ms": median / 4}


def of_gpu() -> dict:
    """A file as benchmarks/gpu.py writes one."""
    variants = {
        "products": {"forward_backward": timed(1, 0.99, 1.01), "tax": {"forward_backward": 1}},
        "reference": {"forward_backward": timed(2, 1.9, 2.1), "tax": {"forward_backward": 2},
                      "over_ours": {"forward_backward": [1.7, 1.8, 1.9]}, "peak_bytes": {"forward_backward": 2**30}},
        "fused": {"forward_backward": timed(1.1, 1.05, 1.15), "tax": {"forward_backward": 1.1},
                  "peak_bytes": {"forward_backward": 2**29}},
        "apex": {"skipped": "left out: apex is not installed"},
        "slow": {"wrong": "its output differs"},
    }  # fmt: skip
    layer = {"kind": "layer", "rows": 100, "padded_tokens": 150, "lengths": {"text": [50, 50]},
             "forward_operations": 10**9, "variants": variants}  # fmt: skip
    sections = {"ceilings": {"kind": "ceilings", "variants": {"product": {"TFLOP_per_second": 700}}}, "layer, a": layer}
    for number, lengths in enumerate(({"text": [90]}, {"text": [50], "image": [70]}, {"text": [60], "image": [80]}), 2):
        sections[f"layer, {number}"] = {
            **layer,
            "rows": 100 * number,
            "padded_tokens": 200 * number,
            "lengths": lengths,
        }
    machine = {"gpu": "NVIDIA H100", "versions": {"torch": "2.13.0", "python": "3.12"}}
    return {"date": "2026-12-01T0000Z", "machine": machine, "sections": sections, "unmeasured": ["bias, b"]}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def slowed(found: dict, factor: float) -> dict:
    """The same file, one variant of one section slower."""
    found = copy.deepcopy(found)
    row = next(row for row in next(iter(found["measured"].values())) if row["input"] == "32 texts of 5-70")
    for name in [name for name in row["fused"] if name.endswith("_ms")]:
        row["fused"][name] *= factor
    row["fused_over_reference"] = [factor * end for end in row["fused_over_reference"]]
    return found


def test_a_planted_slow_down_is_flagged_and_nothing_else(tmp_path, capsys):
    found = json.loads(OF_CPU[0].read_text(encoding="utf-8"))
    planted = write(tmp_path / "after.json", slowed(found, 1.3))
    code = main(["report", str(planted), "--before", str(OF_CPU[0]), "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    flagged = [line for line in lines if line.startswith(("WORSE", "better"))]
    assert [line.partition(":")[0].partition(",")[0] for line in flagged] == ["WORSE Stack of 4 layers"] * 2
    assert all("+30.0%, noise " in line and " fused" in line for line in flagged)
    assert "figures compared, 2 changed beyond the noise, which was " in lines[-2]
    assert "WORSE" in (tmp_path / page.NAME).read_text(encoding="utf-8")


def test_more_memory_of_any_variant_is_flagged(tmp_path):
    found = of_gpu()
    variants = found["sections"]["layer, a"]["variants"]
    variants["boolean_masks"] = {"forward_backward": timed(2, 1.9, 2.1), "peak_bytes": {"forward_backward": 2**30}}
    before = read(write(tmp_path / "before.json", found))
    variants["boolean_masks"]["peak_bytes"] = {"forward_backward": 1.1 * 2**30}
    after = read(write(tmp_path / "after.json", found))
    flagged = [one.what for one in compare(before, after).flagged]
    assert "layer, a, both passes: memory of boolean_masks" in flagged
    assert all(what.endswith("memory of boolean_masks") for what in flagged)


def test_peaks_by_variant_are_compared():
    (path,) = RESULTS.glob("embedding_*.json")
    found = compare(read(path), read(path))
    peaks = [one.what.rpartition(": ")[2] for one in found.changes if one.unit == "MiB"]
    assert set(peaks) == {"memory of ours", "memory of upstream"} and not found.flagged


def test_a_slow_down_within_the_noise_is_not_flagged():
    before = read(OF_CPU[0])
    after = Results(before.path, slowed(before.found, 1.01), [])
    after = Results(after.path, after.found, read_rows(after.found))
    found = compare(before, after)
    assert not found.flagged and found.noise[0] > 0 and len(found.changes) > 50


def read_rows(found: dict):
    from onepeace_fast.report.results import _of_tables

    return [*_of_tables(found["measured"])]


def test_an_unchanged_file_is_not_flagged():
    found = compare(read(OF_CPU[0]), read(OF_CPU[0]))
    assert len(found.changes) > 50 and not found.flagged and not found.gone and not found.new


def test_noise_is_that_of_both_files_and_never_what_another_program_took_once():
    rows = [{"measured": {"Times": [{"input": "a", "fused": {"median_ms": 10 * k, "min_ms": 9.5 * k, "max_ms": 90}}]},
             "machine": {}} for k in (1, 1.15, 1.05)]  # fmt: skip
    one, other, near = (Results(Path("x.json"), found, read_rows(found)) for found in rows)
    (change,) = compare(one, other).changes
    assert (round(change.noise, 6), change.flagged, change.worse) == (0.1, True, True)
    (back,) = compare(other, one).changes
    assert (back.flagged, back.worse) == (True, False)
    (within,) = compare(one, near).changes
    assert (round(within.ratio, 6), within.flagged) == (1.05, False)


def test_the_page_renders_from_the_committed_results_of_a_cpu(tmp_path, capsys):
    assert main(["report", str(MOST), "--output", str(tmp_path)]) == 0
    text = (tmp_path / page.NAME).read_text(encoding="utf-8")
    for path in tmp_path.glob("*.png"):
        check_ink(path.read_bytes())
    pictures = [path.name for path in tmp_path.glob("*.png")]
    assert len(pictures) == text.count("data:image/png") > 6
    assert {name.partition("-")[0] for name in pictures} >= {"peers", "tokens", "padding", "memory", "host"}
    assert "AMD EPYC, 2 threads, torch 2.13.0+cpu" in text and 'name="viewport"' in text
    assert "No file has this. To get it: <code>make gpu" in text and "every time here is of a CPU" in text
    assert "4. benchmarks:" in text and "Measured ceilings" in text  # of PENDING.md, beside the files


def test_every_picture_has_a_name_and_units(drawn):
    assert len({picture.name for picture in drawn}) == len(drawn) > 20
    for picture in drawn:
        assert any(unit in texts(picture.figure) for unit in UNITS), (picture.name, texts(picture.figure))


@pytest.mark.slow
def test_no_picture_is_empty(drawn):
    for picture in drawn:
        check_ink(picture.png)


def check_ink(png: bytes) -> None:
    """It has the width that it should have, and something is drawn on it."""
    image = imread(io.BytesIO(png))
    assert image.shape[1] == round(drawing.WIDTH * drawing.DOTS)
    assert (image[..., :3] < 0.9).any(-1).mean() > 0.01


def test_measured_and_modelled_share_no_colour(drawn):
    assert MODELLED not in MEASURED and MEASURED_HERE in MEASURED
    found = {True: set(), False: set()}
    for picture in drawn:
        for axes in picture.figure.axes:
            lines = [line for line in axes.lines if len(line.get_xdata()) and line.get_color() != "#111827"]
            found[picture.modelled] |= {to_hex(line.get_color()) for line in lines}
    assert found[True] == {MODELLED}
    assert found[False] and found[False] <= set(MEASURED)


def test_a_model_is_drawn_as_ranges(drawn):
    tax = next(picture for picture in drawn if picture.modelled and picture.topic == "tax")
    layer = json.loads(OF_MODEL.read_text(encoding="utf-8"))["gpus"]["A100"]["strategies"]["fused"]["tax"]
    line = tax.figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), layer)


def test_a_file_of_a_gpu_gives_tax_utilisation_and_what_was_left_out(tmp_path, capsys):
    path = write(tmp_path / "gpu.json", of_gpu())
    pictures = {picture.topic: picture for picture in page.draw([read(path)])}
    assert set(pictures) >= {"tax", "peers", "tokens", "padding", "modalities", "memory", "host", "utilisation"}
    assert "ours takes 1.10 to 1.10 times the bare products" in pictures["tax"].title
    shares = {line.get_label(): line.get_xdata()[0] for line in pictures["utilisation"].figure.axes[0].lines}
    assert shares["fused"] == pytest.approx(3 * 10**9 / 1.1e-3 / 700e12)
    assert main(["report", str(path), "--output", str(tmp_path)]) == 0
    text = (tmp_path / page.NAME).read_text(encoding="utf-8")
    for line in ("apex is not installed", "wrong: its output differs", "not reached in the run", "NVIDIA H100"):
        assert line in text
    assert "every time here is of a CPU" not in text


@pytest.mark.parametrize("content", ["{", "[]", '{"machine": {}}', '{"machine": {}, "sections": {"a": 2}}'])
def test_other_files_are_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    assert main(["report", str(path), "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: expected results of benchmarks or of the model of the kernels, got ")


def test_two_files_are_compared_and_no_more(tmp_path, capsys):
    two = [str(path) for path in OF_CPU[:2]]
    assert main(["report", *two, "--before", two[0], "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "--before: expected one file of times to compare with, got 2; name one\n"
    assert main(["report", two[0], "--before", str(OF_MODEL), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"--before: expected a file of times, got the model {OF_MODEL}\n"
    assert isinstance(read(OF_MODEL), Model)
