"""The demo's report: one file with everything inside, fair examples, titles that say no more than the figures."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
import re
import wave
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")

from demo._pictures import assert_legible
from demo._results import SOUNDS_PER_VOICE, VOICES, made_up
from PIL import Image

from onepeace_fast.demo import charts, cost_charts, report, run
from onepeace_fast.demo.result import Comparison, Result


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.text += " "
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(result: Result, folder: Path) -> Elements:
    return Elements(report.write(result, folder).read_text(encoding="utf-8"))


def payload(uri: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))


@pytest.fixture(scope="module")
def result() -> Result:
    return made_up(noise=2)


@pytest.fixture(scope="module")
def page(result, tmp_path_factory) -> Elements:
    return written(result, tmp_path_factory.mktemp("report"))


def test_report_is_one_small_file_that_fetches_nothing(result, tmp_path):
    path = report.write(result, tmp_path / "new" / "folder")
    assert [entry.name for entry in path.parent.iterdir()] == ["index.html"]
    assert path.stat().st_size < 5_000_000
    elements = Elements(path.read_text(encoding="utf-8"))
    sources = [attributes["src"] for _, attributes in elements.tags if "src" in attributes]
    sources += [attributes["href"] for attributes in elements.all("link")]
    assert sources and all(source.startswith("data:") for source in sources)
    assert {tag for tag, _ in elements.tags}.isdisjoint({"script", "iframe", "object", "embed", "base"})
    assert not re.search(r"@import|url\(", path.read_text(encoding="utf-8"))


def test_report_can_be_read_aloud(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(len(image["alt"]) > 10 for image in page.all("img"))
    assert all(sound["aria-label"] and "controls" in sound for sound in page.all("audio"))
    assert [drawing["role"] for drawing in page.all("svg")] == ["img"] and page.all("svg")[0]["aria-label"]


def test_an_earlier_report_stays_until_the_new_one_is_whole(result, tmp_path, monkeypatch):
    index = tmp_path / "index.html"
    index.write_text("earlier")
    with pytest.raises(ValueError, match="similarity: expected cosines, got NaN"):
        report.write(dataclasses.replace(result, similarity=np.full_like(result.similarity, np.nan)), tmp_path)
    assert index.read_text() == "earlier"

    def watched(draft: Path, target: Path) -> None:
        assert target.read_text() == "earlier" and draft.read_text().rstrip().endswith("</html>")
        assert draft.parent == target.parent
        replace(draft, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", watched)
    assert report.write(result, tmp_path) == index
    assert index.read_text().startswith("<!doctype html>")


def test_the_headline_gives_both_figures_with_chance_and_control(page, result):
    for figure in (result.sound_to_image, result.image_to_sound):
        assert page.text.count(f"{figure:.0%}") >= 2
    for control in (result.sound_to_image_before, result.image_to_sound_before):
        assert f"before stage 2: {control:.0%} chance: 10%" in page.text


@pytest.mark.parametrize(
    ("noise", "title"),
    [
        (0.0, "Spoken digits find handwritten ones, though no sound was ever paired with an image"),
        (5.0, "Spoken and handwritten digits, never paired, align in part"),
        (50.0, "Spoken and handwritten digits, never paired, hardly align in this run"),
    ],
)
def test_the_claim_follows_the_figures(noise, title):
    assert report.verdict(made_up(noise))[0] == title


def test_a_high_control_takes_the_claim_back():
    result = made_up(noise=0)
    assert "hardly" in report.verdict(dataclasses.replace(result, similarity_before=result.similarity))[0]


def test_the_sounds_shown_are_two_per_digit_by_different_voices_in_turn(result):
    rows = report.choose(result.sound_labels, result.sound_voices)
    assert [result.sound_labels[row] for row in rows] == 2 * list(range(10))
    said = [(result.sound_labels[row], result.sound_voices[row]) for row in rows]
    assert len(set(said)) == 20
    assert Counter(voice for _, voice in said) == dict.fromkeys(VOICES, 4)
    assert all(row % SOUNDS_PER_VOICE == 0 for row in rows)  # the first of each voice


def test_a_voice_without_the_digit_is_passed_over():
    # Row 1 is a second "zero" of the same voice, and only one voice says "one".
    assert report.choose([0, 0, 0, 1], ["a", "a", "b", "b"]) == [0, 3, 2]
    assert report.choose([3], ["a"]) == [0]


def test_every_sound_stands_beside_its_nearest_images(page, result):
    rows = report.choose(result.sound_labels, result.sound_voices)
    sounds = page.all("audio")
    assert len(sounds) == len(rows) == 20
    pictures = [image for image in page.all("img") if image["alt"].startswith("handwritten ")]
    frames = [item["class"] for item in page.all("li") if "class" in item]
    assert len(pictures) == len(frames) == 100
    for place, row in enumerate(rows):
        with wave.open(payload(sounds[place]["src"])) as reader:
            assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (16_000, 1, 2)
            heard = np.frombuffer(reader.readframes(reader.getnframes()), dtype="<i2")
        np.testing.assert_array_equal(heard, result.sounds[row])
        for rank, nearest in enumerate(np.argsort(-result.similarity[row])[:5]):
            picture = pictures[5 * place + rank]
            assert picture["alt"] == f"handwritten {result.image_labels[nearest]}"
            ink = 16 - np.asarray(Image.open(payload(picture["src"])), dtype=float) / 255 * 16
            np.testing.assert_allclose(ink, result.images[nearest], atol=0.05)
            right = result.image_labels[nearest] == result.sound_labels[row]
            assert frames[5 * place + rank] == ("right" if right else "wrong")
    assert page.text.count("✓") == frames.count("right") > 0 < page.text.count("✗") == frames.count("wrong")


def test_six_cards_are_open_and_the_others_folded(result, tmp_path):
    text = report.write(result, tmp_path).read_text(encoding="utf-8")
    before, folded = text.split("<details>")[:2]
    assert before.count('<article class="card">') == 6
    assert folded.split("</details>")[0].count('<article class="card">') == 14
    assert "<summary>The other 14 of these 20 sounds</summary>" in folded and "<details open" not in text


def test_a_spectrogram_stands_beside_each_sound(page, result):
    spectrograms = [image for image in page.all("img") if image["alt"].startswith("spectrogram ")]
    assert len(spectrograms) == len(page.all("audio"))
    tone = np.asarray(Image.open(payload(report.spectrogram_uri(result.sounds[-1]))).convert("L"), float)
    height, _ = tone.shape
    brightest = height - 1 - tone.mean(1).argmax()  # upwards
    assert brightest * 8000 / (height - 1) == pytest.approx(200 + 50 * 9, abs=8000 / (height - 1))
    short = np.asarray(Image.open(payload(report.spectrogram_uri(np.ones(5, np.int16)))))
    assert short.size > 0


def test_what_the_library_did_is_said_as_measured(page):
    assert "image-text: fused is slower, 0.80 times as fast" in page.text
    assert "audio-text: fused is 1.11 times as fast; automatic is 1.11 times as fast." in page.text
    assert "image-text: fused 0.70 and automatic 1.00 times the reference's peak memory." in page.text
    assert "Padding is 38% of a padded image-text batch and none of a padded audio-text batch" in page.text


def test_a_run_says_why_packing_was_slower_after_what_it_measured(capsys):
    run._print_result(made_up(noise=2), Path("report/index.html"), Path("report"))
    said = capsys.readouterr().out
    assert re.search(r"\n  Padding is 38%.*\n  image-text: fused packs the tokens.* 128\.\n  Wider models .*\n\n", said)


def mistaken(rows: list[int]) -> Result:
    """A result where the sounds of these rows alone find a wrong digit first."""
    result = made_up(noise=0)
    similarity = result.similarity.copy()
    for row in rows:
        wrong = next(i for i, label in enumerate(result.image_labels) if label != result.sound_labels[row])
        similarity[row, wrong] = 1
    return dataclasses.replace(result, similarity=similarity)


def test_mistakes_are_added_where_the_chosen_sounds_hold_none(tmp_path):
    page = written(mistaken([1, 33]), tmp_path)
    assert "0 of these 20 find a wrong digit first; of all 100 held-out sounds 2 do." in page.text
    assert "All sounds above find their digit first. The first 2 of all 2 mistakes" in page.text
    assert len(page.all("audio")) == 22


def test_a_mistake_among_the_chosen_sounds_is_shown_in_its_place(tmp_path):
    page = written(mistaken([0, 1]), tmp_path)
    assert "1 of these 20 find a wrong digit first; of all 100 held-out sounds 2 do." in page.text
    assert "All sounds above find their digit first" not in page.text and len(page.all("audio")) == 20


def test_without_a_mistake_the_report_says_so(tmp_path):
    page = written(made_up(noise=0), tmp_path)
    assert "There is no mistake to show" in page.text and len(page.all("audio")) == 20


def test_disagreeing_backends_are_shouted(result, tmp_path):
    agreeing = result.comparisons[0]
    assert report.agreement([agreeing]) == ["Both backends compute the same outputs and gradients, up to rounding."]
    broken = Comparison("cuda", False, 0.5, 4.0)
    page = written(dataclasses.replace(result, comparisons=[agreeing, broken]), tmp_path)
    assert "THE BACKENDS DISAGREE by more than rounding on cuda." in page.text
    assert "cuda 0.5" not in page.text.split("Largest value")[0]


def test_names_are_escaped(result, tmp_path):
    voices = ["<img src=x> & co" if voice == VOICES[0] else voice for voice in result.sound_voices]
    page = written(dataclasses.replace(result, sound_voices=voices), tmp_path)
    assert {"src": "x"} not in page.all("img") and "voice <img src=x> & co" in page.text


def test_report_names_versions_sources_and_licences(page, result):
    parts = ["torch", "numpy", "scikit-learn", "espeakng-loader", "Python", "CPU", "Threads", "Seed", "1,234,567"]
    parts += ["E. Alpaydin, C. Kaynak", "eSpeak NG (GPL-3.0", "arXiv 2305.11172", "audio-text 40.5"]
    assert [part for part in parts if part not in page.text] == []


def test_losses_are_said_to_end_below_guessing_only_where_they_do():
    low, high = [2.5, 1.0], [2.5, math.log(10) + 0.01]
    titles = {
        "Both losses end": {"image-text": low, "audio-text": low},
        "Only the audio-text loss ends": {"image-text": high, "audio-text": low},
        "No loss ends": {"image-text": high, "audio-text": [2.5, math.nan]},
    }
    for lead, losses in titles.items():
        ends = {stage: [values[-1]] * charts.SMOOTHED for stage, values in losses.items()}
        assert charts.loss_curves(ends).title.startswith(f"{lead} below guessing (2.30)")


@pytest.mark.parametrize(
    ("before", "after", "lead"),
    [
        (0.0, 1.0, "After stage 2 the diagonal stands out: 10 of 10 spoken digits are on average nearest to their own"),
        (0.0, 0.5, "The diagonal shows in part: 5 of 10"),
        (0.5, 0.5, "Stage 2 brought no diagonal out: 5 of 10"),
        (1.0, 1.0, "Stage 2 brought no diagonal out: 10 of 10"),
    ],
)
def test_the_diagonal_is_claimed_only_where_it_is(before, after, lead):
    def cosines(share: float) -> np.ndarray:
        return np.eye(10)[[digit if digit < 10 * share else (digit + 1) % 10 for digit in range(10)]]

    title = charts.similarity(cosines(before), cosines(after), range(10), range(10)).title
    assert title.startswith(lead)
    assert f"{10 * before:.0f} before. Mean cosine now: {'+' if after else ''}{after:.2f} to the same digit" in title


def test_digits_without_a_sound_are_left_out_of_the_count():
    title = charts.similarity(np.zeros((2, 10)), np.eye(10)[:2], [0, 1], range(10)).title
    assert ": 2 of 2 spoken digits" in title


@pytest.mark.parametrize(
    ("found", "end"),
    [
        ([1, 2, 3, 3], "4 of 4 find their digit first, there is no mistake."),
        ([1, 2, 8, 8], "2 of 4 find their digit first. The most frequent mistake: 3 finds 8, 2 of 2 times."),
        ([7, 2, 8, 3], "2 of 4 find their digit first. One of the most frequent mistakes: 1 finds 7, 1 of 1 times."),
    ],
)
def test_confusion_names_the_most_frequent_mistake(found, end):
    assert charts.confusion([1, 2, 3, 3], found, "spoken", "handwritten").title == f"From spoken to handwritten: {end}"


@pytest.mark.parametrize(
    ("noise", "title"),
    [
        (0.0, r"Sounds move to the images of their digit: [\d.]+% stand .* before stage 2, 100% after\."),
        (90.0, r"On this map sounds hardly move to their digit: .*"),
    ],
)
def test_the_map_claims_only_what_it_shows(noise, title):
    assert re.fullmatch(title, charts.embeddings(made_up(noise).map).title)


def test_voices_are_said_to_be_above_chance_only_where_they_are():
    counts = {"a": 10, "b": 10}
    assert charts.voices({"a": 0.9, "b": 0.4}, counts).title == "Every voice is above chance, from 40% (b) to 90% (a)."
    assert charts.voices({"a": 0.9, "b": 0.1}, counts).title.startswith("1 of 2 voices are above chance, from 10% (b)")
    assert charts.voices({"a": 1.0, "b": 1.0}, counts).title == "Every voice is above chance, all at 100%."


def test_bias_titles_name_the_head_and_the_distances():
    values = np.zeros((2, 5))
    assert charts.series_bias("text", "tokens", values).title == "Text: nothing was learned, every bias is 0."
    values[0, 0], values[1, 1], values[1, 4] = 0.5, -0.75, 0.25
    expected = (
        "Text: head 2 depends most on distance, +0.25 at distance +2, \N{MINUS SIGN}0.75 at distance \N{MINUS SIGN}1."
    )
    assert charts.series_bias("text", "tokens", values).title == expected
    grid = np.zeros((2, 3, 3))
    grid[0, 0, 2], grid[0, 1, 1] = 0.5, -0.25
    high, low = "+0.50 at \N{MINUS SIGN}1 down, +1 right", "\N{MINUS SIGN}0.25 at 0 down, 0 right"
    expected = f"Image: head 1 depends most on distance, {high}, {low}."
    assert charts.grid_bias("image", grid).title == expected


LONG = ["grandmother, Lancastrian", "grandfather, Lancastrian"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: charts.loss_curves({"image-text": [2.3, 1.0], "audio-text": [2.3]}),
        lambda: charts.similarity(np.eye(10), np.eye(10), range(10), range(10)),
        lambda: charts.confusion(range(10), range(10), "handwritten", "spoken"),
        lambda: charts.voices(dict.fromkeys(LONG, 1.0), dict.fromkeys(LONG, 100)),
        lambda: charts.series_bias("audio", "frames of 20 ms", np.ones((8, 99))),
        lambda: charts.grid_bias("image", np.ones((4, 3, 3))),
        lambda: charts.grid_bias("image", np.ones((6, 7, 7))),
        lambda: charts.embeddings(made_up(noise=2).map),
        lambda: cost_charts.tokens(made_up(noise=2).tokens, 20),
        lambda: cost_charts.times(made_up(noise=2).costs),
        lambda: cost_charts.memory(made_up(noise=2).costs),
    ],
)
def test_text_in_pictures_is_large_enough_for_a_phone_and_inside(draw):
    assert_legible(draw())


def test_ranking_is_a_page_of_its_own_beside_the_report(result, tmp_path):
    index = report.write(result, tmp_path)
    before = index.read_bytes()
    images = [(result.images[row], result.image_labels[row], 0.5 - row / 10) for row in range(5)]
    path = report.write_ranking("my <three>.wav", result.sounds[0], [(3, 0.75), (8, -0.5)], images, "", tmp_path)
    assert path == tmp_path / "my <three>-ranking.html" and index.read_bytes() == before
    page = Elements(path.read_text(encoding="utf-8"))
    assert "my <three>.wav: three is the nearest digit" in page.text
    assert page.text.index("3 three 0.750") < page.text.index("8 eight -0.500")
    shown = [image["alt"] for image in page.all("img")]
    assert shown[1:] == [f"handwritten {label}" for label in result.image_labels[:5]] and "spectrogram" in shown[0]
    assert [link["href"] for link in page.all("a")] == ["index.html"] and "unlike any" not in page.text
    assert [sound["src"] for sound in page.all("audio")] == [report.sound_uri(result.sounds[0])]


def test_ranking_says_first_that_a_sound_is_unlike_any_digit_and_links_to_no_report_that_is_not_there(result, tmp_path):
    path = report.write_ranking("hum.wav", result.sounds[0], [(3, 0.75)], [], "This is unlike.", tmp_path)
    page = Elements(path.read_text(encoding="utf-8"))
    assert "hum.wav: unlike any digit This is unlike. The nearest digit is three all the same." in page.text
    assert page.all("a") == []


@pytest.mark.parametrize("waveform", [np.zeros(16), np.zeros((1, 16), dtype=np.int16)])
def test_ranking_refuses_what_is_no_int16_sound(waveform, tmp_path):
    with pytest.raises(ValueError, match="waveform: expected int16"):
        report.write_ranking("mine.wav", waveform, [(3, 0.5)], [], "", tmp_path)
    assert list(tmp_path.iterdir()) == []
