"""UnIVAL's tasks: what a manifest's lines ask and answer, locations, and one line for what does not fit."""

import json

import pytest
from data._refused import refused

pytest.importorskip("tokenizers")

from onepeace_fast.data.tasks import TASKS, Sample, Vocabulary, location, read_tasks, without_locations
from onepeace_fast.data.text import Tokenizer

ROWS = [
    {"task": "caption", "image": "maps/a.npy", "caption": "a {red} box"},
    {"task": "vqa", "image": "maps/a.npy", "question": "what colour?", "answer": "red", "id": 7},
    {"task": "grounding", "image": "maps/b.npy", "text": "the box", "box": [0, 0.25, 0.5, 1]},
    {"task": "matching", "image": "maps/b.npy", "caption": "a box", "answer": "no"},
    {"task": "video_caption", "video": "maps/a.npy", "caption": "a box falls"},
    {"task": "audio_caption", "audio": "maps/b.npy", "caption": "a thud"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "maps").mkdir()
    for name in ("a.npy", "b.npy"):
        (tmp_path / "maps" / name).touch()
    return tmp_path


def manifest(folder, *rows):
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_every_task_asks_and_answers_in_its_words(folder):
    found = read_tasks(manifest(folder, *ROWS[:3], "", *ROWS[3:]), bins=101)
    assert list(found) == list(TASKS)
    a, b = (folder / "maps" / name for name in ("a.npy", "b.npy"))
    assert [sample for own in found.values() for sample in own] == [
        Sample(a, "what does the image describe?", "a {red} box", 1),
        Sample(a, "what colour?", "red", 2),
        Sample(b, 'which region does the text " the box " describe?', "<bin_0> <bin_25> <bin_50> <bin_100>", 3),
        Sample(b, 'does the image describe " a box "?', "no", 5),
        Sample(a, "what does the video describe?", "a box falls", 6),
        Sample(b, "what does the audio describe?", "a thud", 7),
    ]


def test_other_tasks_than_those_wanted_are_left_out_and_counted(folder, caplog):
    path = manifest(folder, *ROWS[1:], ROWS[0], ROWS[1])
    assert list(read_tasks(path, wanted=["matching", "caption"])) == ["matching", "caption"]
    counts = "vqa (2), grounding (1), video_caption (1), audio_caption (1)"
    assert caplog.messages == [f"{path}: samples of other tasks than matching, caption are left out: {counts}"]
    read_tasks(path)
    read_tasks(path, wanted=list(TASKS))
    assert len(caplog.messages) == 1
    refused(lambda: read_tasks(manifest(folder, *ROWS[:2]), wanted=["caption", "matching"]), path, "sample of matching")
    refused(lambda: read_tasks(manifest(folder, *ROWS[:2]), wanted=["matching"]), path, "got none")


@pytest.mark.parametrize(
    ("share", "bins", "expected"),
    [(0.0, 1000, 0), (1.0, 1000, 999), (0.9994, 1000, 998), (0.9996, 1000, 999), (0.6, 3, 1)],
)
def test_a_location_is_the_nearest_bin(share, bins, expected):
    assert location(share, bins) == f"<bin_{expected}>"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"task": "captoin", "image": "maps/a.npy"},
            ["task: expected one of caption", "'captoin'; did you mean caption?"],
        ),
        ({"image": "maps/a.npy", "caption": "a"}, ["task: expected one of", "got None"]),
        ({"task": ["caption"]}, ["task: expected one of", "got ['caption']"]),
        ({"task": "caption", "image": "maps/a.npy"}, ["caption: expected a text for caption, got none"]),
        ({"task": "caption", "image": 3, "caption": "a"}, ["image: expected a path for caption, got int 3"]),
        ({**ROWS[1], "answer": 3}, ["answer: expected a text for vqa, got int 3"]),
        ({**ROWS[3], "answer": "maybe"}, ["answer: expected yes or no for matching, got str 'maybe'"]),
        ({**ROWS[2], "box": [0, 0, 1]}, ["box: expected [left, top, right, bottom] as shares", "[0, 0, 1]"]),
        ({**ROWS[2], "box": [0, 0, 1, 1.5]}, ["box: expected", "1.5]"]),
        ({**ROWS[2], "box": [0.6, 0, 0.5, 1]}, ["box: expected", "got list [0.6"]),
        ({**ROWS[2], "box": [0, 0.6, 1, 0.5]}, ["box: expected", "got list [0, 0.6"]),
        ('{"task": "caption"', ["a JSON object", "another text"]),
        ("[1]", ["a JSON object, got list [1]"]),
    ],
)
def test_what_does_not_fit_is_named_by_file_and_line(folder, row, parts):
    path = manifest(folder, ROWS[0], row)
    refused(lambda: read_tasks(path), f"{path}, line 2: ", *parts)


def test_files_that_are_missing_and_empty_texts_are_told_or_left_out(folder, caplog):
    rows = [{**ROWS[0], "image": "none.npy"}, {**ROWS[0], "caption": " "}, ROWS[0]]
    path = manifest(folder, *rows)
    refused(
        lambda: read_tasks(path), path, "got 2 of 3", f"line 1: no file {folder / 'none.npy'}; line 2: empty caption"
    )
    assert [sample.line for sample in read_tasks(path, missing="skip")["caption"]] == [3]
    assert "2 of 3" in caplog.text
    refused(lambda: read_tasks(manifest(folder, *rows[:2]), missing="skip"), path, "got none among 2")
    refused(lambda: read_tasks(folder / "other.jsonl"), folder / "other.jsonl", "got no file there")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red box stands on a green table"], 300)


def test_locations_are_the_last_rows_of_the_table(tokenizer):
    words = Vocabulary(tokenizer, tokenizer.vocab_size + 30, bins=10)
    first = tokenizer.vocab_size + 20
    box, starts = tokenizer.tokens("a red box")
    assert words.tokens("a red box") == (box, starts)
    assert words.tokens("<bin_0> <bin_9>") == ([first, first + 9], [True, True])
    ids, starts = words.tokens("a red box<bin_3> on")
    assert ids == [*box, first + 3, *tokenizer.tokens("on")[0]]
    assert len(starts) == len(ids) and starts[len(box)]
    assert words.text(ids) == "a red box <bin_3> on"
    assert words.text([first, first + 9]) == "<bin_0> <bin_9>"
    refused(lambda: words.tokens("a <bin_10>"), "text: ", "up to <bin_9>, got <bin_10>")
    refused(lambda: words.tokens(" "), "caption: ")
    size = tokenizer.vocab_size
    refused(
        lambda: Vocabulary(tokenizer, size + 9, bins=10), "vocab_size: ", f"at least {size + 10}", f"got {size + 9}"
    )
    assert without_locations("a <bin_3> b").split() == ["a", "b"]
