"""The demo of MiCo: its views of digits, its batches, what it measures, and the page of a short run."""

import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("espeakng_loader")

from demo._pictures import assert_legible

from onepeace_fast import cli
from onepeace_fast.demo import data
from onepeace_fast.demo.mico import charts, experiment, run, views
from onepeace_fast.demo.mico.experiment import MATCHING, RETRIEVAL, SETS, Result
from onepeace_fast.demo.mico.views import FIRST, MODALITIES


@pytest.fixture(scope="module")
def sets(spoken):
    return views.arrange(*spoken)


def result():
    context = {"+".join(names): {RETRIEVAL: len(names) / 5, MATCHING: len(names) / 10} for names in SETS}
    context["vision"] = {RETRIEVAL: 0.6, MATCHING: 0.1}
    shares = {what: {RETRIEVAL: 0.5, MATCHING: 0.2} for what in ("images alone", "all of them")}
    return Result(0, 4, 100, {"contexts": 1.0}, context, {str(count): shares for count in range(1, 5)})


def test_the_pen_goes_from_the_topmost_dark_pixel_to_the_nearest_and_is_lifted_over_gaps():
    image = torch.zeros(8, 8)
    for row, column, ink in ((1, 2, 16), (2, 2, 8), (2, 3, 5), (5, 2, 12), (3, 3, 16), (1, 6, 16)):
        image[row, column] = ink
    path = views.pen_path(image)
    expected = [[1, 2, 1.0, 0], [2, 2, 0.0, 0], [3, 3, 1.0, 0], [5, 2, 0.5, 1], [1, 6, 1.0, 1]]  # 5 is too light
    assert torch.equal(path, torch.tensor([[r / 3.5 - 1, c / 3.5 - 1, ink, 2 * up - 1] for r, c, ink, up in expected]))
    found = views.pen_map(image)
    assert torch.equal(found[:, 0], path[0].repeat_interleave(4)) and torch.equal(
        found[:, -1], path[-1].repeat_interleave(4)
    )


def test_the_table_has_the_sums_of_rows_and_of_columns():
    image = torch.zeros(1, 8, 8)
    image[0, 2, 5] = 16
    image[0, 2, 6] = 16
    found = views.table_map(image)[0]
    assert torch.equal(found, found[:, :1].expand(-1, views.SIDE))
    assert found[:, 0].nonzero()[:, 0].tolist() == [*range(16)]
    assert {place: found[place, 0].item() for place in (2, 3, 13, 14)} == {2: -0.5, 3: -1, 13: -0.75, 14: -0.75}


def test_views_are_of_their_digits_and_none_of_the_held_out_ones_is_trained_with(sets, spoken):
    for name in MODALITIES:
        training, held_out = (of[name] for of in sets)
        assert list(training.maps.shape[1:]) == list(held_out.maps.shape[1:]) == [views.SIDE, views.SIDE]
    assert sets.held_out["audio"].labels.tolist() == spoken[1].labels
    written = data.load()
    assert [len(of["vision"].labels) for of in sets] == [len(half.labels) for half in written]
    assert torch.equal(sets.held_out["strokes"].maps[3], views.pen_map(written[1].images[3]))


def test_each_sample_of_a_batch_has_a_modality_and_views_of_its_own_digit(sets):
    marked = {
        name: views.Views(of.labels[:, None, None].float().expand(-1, 16, 16), of.labels)
        for name, of in sets.training.items()
    }
    counts = set()
    for seed in range(4):
        batch = views.draw(marked, MODALITIES, 2, torch.Generator().manual_seed(seed))
        digits = (batch.text[:, 3] - FIRST).tolist()
        assert digits == [*range(10), *range(10)]
        for name, rows in batch.samples.items():
            assert batch.frames[name][:, 0, 0, 0].tolist() == [digits[row] for row in rows]
        has = [sum(sample in rows for rows in batch.samples.values()) for sample in range(20)]
        counts |= {*has}
    assert counts == {1, 2, 3, 4}


def test_shares_are_those_of_the_samples_that_find_their_own_caption(sets):
    model = experiment.fresh(MODALITIES, 0).eval()
    frames, digits = views.held_out(sets.held_out, 2)
    right = []
    for sample, digit in enumerate(digits.tolist()):
        own = {name: x[sample : sample + 1] for name, x in frames.items()}
        found = model.embed(text=views.captions(range(10)), **own)
        likely = model.match(views.captions(range(10)), of=[0] * 10, **own)
        right.append([int((found["union"] @ found["text"].t()).argmax()) == digit, int(likely.argmax()) == digit])
    expected = torch.tensor(right).double().mean(0).tolist()
    assert [*experiment.measure(model, frames, digits).values()] == pytest.approx(expected)


def test_figures_and_titles_are_those_of_the_shares():
    one = result()
    assert sorted(one.of_size(1, RETRIEVAL)) == [0.2, 0.2, 0.2, 0.6] and len(one.of_size(2, MATCHING)) == 6
    figures = one.figures()
    assert figures["retrieval, 1 in the context"] == pytest.approx(0.3)
    assert figures["classification, images alone, pretrained with 3"] == 0.2
    title = "From one modality to four: retrieval 30% to 80%; classification 10% to 40%."
    assert charts.context(one).title == title
    assert charts.pretraining(one).title.endswith("retrieval 50% to 50%; classification 20% to 20%.")
    assert charts.standard_error(0.5, 100) == 0.05
    for picture in (charts.context(one), charts.pretraining(one)):
        assert_legible(picture)


@pytest.mark.slow
def test_a_short_run_measures_all_and_writes_one_page(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(views, "load", lambda: sets)
    monkeypatch.setattr(experiment, "MEASURED", 3)
    run.demo(3).run_one(0, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/svg+xml") == 3 and page.count('<th scope="row">vision, audio') == 4
    assert not re.search(r"(src|href)=\"https?://(?!arxiv)", page)
    printed = capsys.readouterr().out
    assert "retrieval, 4 in the context" in printed and "index.html in a browser" in printed


def test_a_folder_that_cannot_be_made_ends_it_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo-mico", "--output", str(tmp_path / "file" / "report")]) == 2
    assert "cannot be read or written" in capsys.readouterr().err
