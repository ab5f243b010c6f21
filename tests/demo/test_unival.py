"""The demo of UnIVAL: its texts and data, its measure of attention, and the page of a short run."""

import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("espeakng_loader")

from demo._pictures import assert_legible

from onepeace_fast import cli
from onepeace_fast.demo import data, speech
from onepeace_fast.demo.unival import attention, charts, examples, experiment, model, run, tasks, training
from onepeace_fast.demo.unival.experiment import Bench, Result, Steps
from onepeace_fast.demo.unival.tasks import TASKS, Vocabulary, digit_named, texts

SHORT = Steps(2, 5, 2, 2)


@pytest.fixture(scope="module")
def sets(spoken):
    return tasks.arrange(*spoken)


@pytest.fixture
def bench(sets, monkeypatch):
    monkeypatch.setattr(experiment, "EXAMINED", 60)  # more than some sets have
    return Bench(sets, 0, SHORT)


def test_a_caption_names_the_digit_and_a_question_asks_for_its_neighbour_on_a_dial():
    assert texts(TASKS[0], [3], [0]) == (["what does the image show"], ["a handwritten three"])
    assert texts(TASKS[2], [0], [1]) == (["what does the sound say"], ["a spoken zero"])
    asked = ["which digit comes after it", "which digit comes before it", "which digit comes before it"]
    assert texts(TASKS[3], [9, 0, 4], [0, 1, 3]) == (asked, ["zero", "nine", "three"])
    assert [digit_named(text) for text in ("a spoken zero", "a spoken", "one two")] == ["zero", None, None]
    vocabulary = Vocabulary()
    assert vocabulary.decode(vocabulary.encode("a handwritten three")) == "a handwritten three"
    assert vocabulary.batch(["a spoken zero", "zero"])[1].tolist()[1:] == [2, 1, 1]


def test_no_clip_and_no_voice_of_the_held_out_ones_is_trained_with(sets, spoken):
    training, familiar, shifted = (of["audio"] for of in sets)
    assert [len(of.labels) for of in (training, familiar, shifted)] == [80, 20, 50]
    heard = {sound.tobytes() for sound in training.items}
    assert not heard & {sound.tobytes() for sound in [*familiar.items, *shifted.items]}
    assert shifted.labels.tolist() == spoken[1].labels
    accents = [(clip.voice, clip.accent) for clip in spoken[0].clips]
    assert sorted({accents[row] for row, sound in enumerate(spoken[0].sounds) if sound.tobytes() not in heard}) == [
        ("adam", speech.ACCENTS[0]), ("f3", speech.ACCENTS[1]),
    ]  # fmt: skip
    assert torch.equal(sets.familiar["image"].items, data.load()[1].images)


def test_what_is_examined_has_every_digit_both_questions_and_both_turns(bench):
    for (name, kind), one in bench.examined.items():
        digits = bench.sets._asdict()[kind]["image" if "image" in name else "audio"].labels[one.rows]
        assert set(digits.tolist()) == {*range(10)}
        if "questions" in name:
            pairs = {(place % 2, text) for place, text in enumerate(one.sources)}
            assert len(pairs) == 4


def test_shifted_images_are_turned_left_and_right_in_turns():
    bar = torch.zeros(2, 8, 8)
    bar[:, 3:5] = data.DARKEST
    left, right = (
        tasks.pictures(bar, turned=True)[:, 0, :, columns].mean(2).argmax(1) for columns in (slice(4, 8), slice(24, 28))
    )
    expected = round(20 * torch.tan(torch.deg2rad(torch.tensor(tasks.TURNED))).item())
    assert [abs(one - expected) <= 2 for one in (left - right).abs().tolist()] == [True, True]
    assert ((left - right) > 0).tolist() in ([True, False], [False, True])
    assert tasks.pictures(bar)[0].aminmax() == (0, 2)


def test_a_batch_has_every_digit_of_every_task_and_its_samples_are_in_their_places(sets):
    vocabulary, generator = Vocabulary(), torch.Generator().manual_seed(0)
    batch = training.draw(TASKS, sets.training, vocabulary, generator)
    assert batch.samples == {"image": [*range(20)], "audio": [*range(20, 40)]}
    assert {name: list(x.shape) for name, x in batch.inputs.items()} == {
        "image": [20, 1, 32, 32], "audio": [20, 1, model.BANDS, model.COLUMNS],
    }  # fmt: skip
    said = [vocabulary.decode(row.tolist()) for row in batch.target]
    assert said[:10] == [f"a handwritten {name}" for name in data.NAMES]
    assert said[20:30] == [f"a spoken {name}" for name in data.NAMES]


def test_a_low_tone_is_in_a_low_band_of_the_map():
    time = torch.arange(16000) / 16000
    maps = model.log_mel(torch.stack([(2 * torch.pi * tone * time).sin() for tone in (300.0, 3000.0)]))
    bands = maps[:, 0, :, 10:40].mean(2).argmax(1).tolist()
    mel = [2595 * torch.log10(torch.tensor(1 + tone / 700)).item() for tone in (300, 3000, 8000)]
    assert bands == [round(one / mel[2] * (model.BANDS + 1)) - 1 for one in mel[:2]]
    torch.testing.assert_close(maps.mean((1, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)


def test_the_weights_shown_are_those_by_which_the_decoder_takes_its_values(bench):
    own, batch = bench.fresh().eval(), bench.examined["image captions", "familiar"].batch
    found = []
    layer = own.unival.decoder.layers[-1].encoder_attn
    layer.register_forward_hook(lambda module, inputs, output: found.append((*inputs, output)))
    written = [[5, 6, 7]] * len(batch.source)
    looks = attention.looks(own, batch, written, [2] * len(written))
    ((x, keys, route, output),) = found
    weights = attention.weights_of(layer, x, keys, route)
    values = layer.v_proj(keys).unflatten(2, (4, -1)).transpose(1, 2)
    mine = layer.out_proj((weights @ values * layer.c_attn[:, None, None]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mine, output)
    assert torch.equal(looks, weights[:, :, 2, :16].mean(1))


@pytest.mark.slow
def test_a_short_run_measures_every_claim_and_writes_one_page(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "POINTS", (0.0, 0.5, 1.0))
    monkeypatch.setattr(tasks, "load", lambda: bench.sets)
    run.demo(SHORT).run_one(0, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<article") >= 20 and page.count("<audio") >= 10
    assert page.count("&cross; wrong") > 10 and "&amp;" not in page
    examined = [str(len(bench.examined[name, "familiar"].rows)) for name in ("image captions", "sound captions")]
    assert re.findall(r"Of (\d+) held-out (?:images|sounds) \d+ get", page) == examined
    assert page.count("data:image/svg+xml") == 5
    assert not re.search(r"(src|href)=\"https?://(?!arxiv)", page)
    printed = capsys.readouterr().out
    assert "together mean" in printed and "index.html in a browser" in printed


def test_figures_are_those_of_the_curves():
    curve = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    shares = {"familiar voices": curve, "unseen voices": [one / 2 for one in curve]}
    transfer = {"steps": [0, 50, 100, 150, 200, 250], "pretrained": shares, "scratch": shares}
    line = {"points": [0, 0.5, 1], "curves": {"images": [0.8, 0.9, 0.2]}, "before": {"images": 0.5}}
    result = Result(
        0, {}, {}, transfer, line, {"a": {"together": 0.5, "alone": 0.4}, "b": {"together": 0.7, "alone": 0.8}}
    )
    found = result.figures()
    assert [found[f"pretrained familiar voices {when}"] for when in ("early", "end")] == [0.3, 0.5]
    assert [found[f"line images {place}"] for place in ("first", "middle", "last", "best")] == [0.8, 0.9, 0.2, 0.9]
    assert (found["together a"], found["alone b"], found["together mean"]) == (0.5, 0.8, 0.6)
    assert charts.tasks(result.tasks).title == "Of 2 tasks 1 are learned better with the others, 1 better alone."
    assert charts.transfer(transfer).title.startswith("Images helped little: 30% right after 150 steps")
    four = {name: [0.5, 0.7, 0.6] for name in ("images", "turned images", "familiar voices", "unseen voices")}
    for picture in (charts.tasks(result.tasks), charts.transfer(transfer), charts.line({**line, "curves": four})):
        assert_legible(picture)
    assert charts.line({**line, "curves": four}).title == (
        "Half of each is better than either: 70% right on the mean of the four, 50% and 60% at the ends."
    )


def test_the_ends_of_the_line_are_the_two_models_themselves(bench, monkeypatch):
    monkeypatch.setattr(experiment, "POINTS", (0.0, 1.0))
    own, tuned, seen = bench.fresh(), [], []
    monkeypatch.setattr(Bench, "train", lambda self, model, *_, **__: tuned.append(_shaken(model)) or tuned[-1])
    monkeypatch.setattr(Bench, "share", lambda self, model, tasks, kind: seen.append(_sum(model)) or 0.0)
    experiment.measure_line(bench, own)
    assert seen[0] == _sum(tuned[0]) and seen[4] == _sum(tuned[1]) and seen[8] == _sum(own)
    assert len({seen[0], seen[4], seen[8]}) == 3


def _shaken(one):
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return one


def _sum(one):
    return sum(parameter.double().sum().item() for parameter in one.parameters())


def test_a_folder_that_cannot_be_made_ends_it_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo-unival", "--output", str(tmp_path / "file" / "report")]) == 2
    assert "cannot be read or written" in capsys.readouterr().err


def test_the_first_example_of_each_digit_is_shown():
    assert examples.first_of_each([1, 0, 1, 9, 0]) == [1, 0, 3]
