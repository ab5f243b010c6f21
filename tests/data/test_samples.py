"""MiCo's manifests, the frames of their files, and batches of both."""

import json

import pytest
import torch
from data._refused import refused
from training._mico_runs import SIDE, write_samples, write_tokenizer

numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from onepeace_fast.data.batches import BrokenFile  # noqa: E402
from onepeace_fast.data.image import DEVIATION, MEAN  # noqa: E402
from onepeace_fast.data.sample_batches import SampleDataset, collate_samples, read_frames  # noqa: E402
from onepeace_fast.data.samples import Seen, read_samples  # noqa: E402
from onepeace_fast.data.word_pieces import BertTokenizer  # noqa: E402

MODALITIES = ("vision", "audio", "depth", "normal")
ROW = {"caption": "a red wall", "image": "red0.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    numpy.save(folder / "ones.npy", numpy.ones((2, 3, SIDE, SIDE), "float16"))
    numpy.save(folder / "wide.npy", numpy.ones((2, SIDE, SIDE + 1), "float32"))
    numpy.save(folder / "whole.npy", numpy.ones((2, SIDE, SIDE), "int64"))
    numpy.save(folder / "infinite.npy", numpy.full((2, SIDE, SIDE), numpy.inf, "float32"))
    numpy.save(folder / "huge.npy", numpy.full((2, SIDE, SIDE), 1e300))
    Image.new("RGB", (12, 11)).save(folder / "taller.png")
    return folder


def manifest(folder, *rows):
    path = folder / "given.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def hide(ids, generator):
    """Which tokens are hidden, and random ones in their places."""
    drawn = torch.rand(ids.shape, generator=generator) < 0.5
    return torch.where(drawn, 4, ids), drawn


def dataset(folder, samples, **keys):
    write_tokenizer(folder / "bert.json")
    given = {"side": SIDE, "longest": 9, "hide": hide, "seed": 0} | keys
    return SampleDataset(samples, BertTokenizer.load(folder / "bert.json"), **given)


def test_a_row_has_any_of_the_columns_and_null_is_none(folder):
    samples = read_samples(folder / "samples.jsonl", MODALITIES)
    assert [sample.modalities for sample in samples] == [
        ("vision", "depth"), ("vision", "audio", "subtitle"), ("normal",), ("vision", "audio", "subtitle"),
        ("subtitle",), ("vision", "audio", "subtitle"), ("vision", "depth"), ("vision", "audio", "subtitle"),
    ]  # fmt: skip
    assert samples[1].seen["vision"] == Seen("video", (folder / "red0.png", folder / "red1.png"))
    assert samples[1].subtitle == "it sounds red" and samples[4].where == f"{folder / 'samples.jsonl'}, line 5"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"caption": "a wall"}, "expected at least one of subtitle, image, video, vision, audio, depth, normal beside "
                                "the caption, got none"),
        ({"caption": "a wall", "image": None}, "expected at least one of subtitle, image, video"),
        (ROW | {"image": 7}, "image: expected a path, or a list of paths of frames, got int 7"),
        (ROW | {"depth": []}, "depth: expected a path, or a list of paths of frames, got list []"),
        (ROW | {"image": ["red0.png", 3]}, "image: expected a path, or a list of paths of frames, got list"),
        (ROW | {"caption": ["a"]}, "caption: expected a text, got list ['a']"),
        (ROW | {"subtitle": 3}, "subtitle: expected a text, got int 3"),
        (ROW | {"imgae": "red0.png"}, "expected some of caption, subtitle, image, video, vision, audio, depth, normal, "
                                      "got 'imgae'; did you mean image?"),
        (ROW | {"video": ["red0.png"]}, "expected one of image and video, got both"),
        ("[1]", "expected a JSON object, got list [1]"),
        ('{"caption": "a", "audio": "a.npy", "audio": "b.npy"}', "expected a JSON object, got another text ('audio' "
                                                                 "stands there twice)"),
        ("[" * 100_000, "expected a JSON object, got another text (maximum recursion depth exceeded"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_file_and_line(folder, row, line):
    path = manifest(folder, ROW, row)
    found = refused(lambda: read_samples(path, MODALITIES), path)
    assert line in found and found.startswith(f"{path}, line 2: ")


def test_a_text_in_a_column_of_files_is_no_file_however_long_it_is(folder):
    path = manifest(folder, ROW, ROW | {"image": "a red wall " * 40})
    found = refused(lambda: read_samples(path, MODALITIES), path)
    assert "got 1 of 2 pairs without a file or a caption (line 2: no file " in found


def test_a_subtitle_that_has_no_tokens_or_too_many_is_called_so(folder, caplog):
    samples = read_samples(manifest(folder, ROW, ROW | {"subtitle": "\ud800 wall"}), MODALITIES)
    line = refused(lambda: dataset(folder, samples), samples[1].where)
    assert line.startswith(f"{samples[1].where}: subtitle: expected whole characters, got str ")
    samples = read_samples(manifest(folder, ROW, ROW | {"subtitle": "it sounds red on a wall"}), MODALITIES)
    dataset(folder, samples, longest=6)
    assert caplog.messages == ["subtitles: 1 of 1 have more than 4 tokens; each of these loses its end"]


def test_rows_without_a_file_or_a_caption_stop_or_are_left_out(folder):
    rows = [ROW | {"depth": "none.png"}, ROW, {"image": "red0.png"}, ROW | {"subtitle": " "}]
    path = manifest(folder, *rows)
    line = refused(lambda: read_samples(path, MODALITIES), path)
    assert f"line 1: no file {folder / 'none.png'}; line 3: empty caption; line 4: empty subtitle" in line
    assert [sample.where for sample in read_samples(path, MODALITIES, missing="skip")] == [f"{path}, line 2"]
    refused(lambda: read_samples(manifest(folder), MODALITIES), path, "expected samples, got none")


def test_images_are_squashed_and_normalised_as_clip_s_and_arrays_are_taken_as_they_are(folder):
    def read(modality, *names):
        return read_frames("here", modality, Seen(modality, tuple(folder / name for name in names)), SIDE)

    frames = read("vision", "red0.png", "red1.png")
    assert frames.shape == (2, 3, SIDE, SIDE)
    for frame, red in zip(frames, (255, 127), strict=True):
        pixels = frame[:, 0, 0] * torch.tensor(DEVIATION) + torch.tensor(MEAN)
        assert pixels.tolist() == pytest.approx([red / 255, 0, 0], abs=1e-6)
    spectrograms = read("audio", "green.npy")
    assert torch.equal(spectrograms, torch.from_numpy(numpy.load(folder / "green.npy"))) and len(spectrograms) == 2
    assert read("depth", "ones.npy").dtype == torch.float32 and read("depth", "ones.npy").shape == (2, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("modality", "names", "line"),
    [
        ("vision", ["red0.png", "taller.png"], "taller.png: expected frames of one size, that of "),
        ("depth", ["wide.npy"], f"got float32 [2, {SIDE}, {SIDE + 1}]"),
        ("depth", ["whole.npy"], f"expected floating point frames [frames, 3, {SIDE}, {SIDE}], or of one channel"),
        ("audio", ["infinite.npy"], "expected finite numbers, got some that are not"),
        ("audio", ["huge.npy"], "expected finite numbers, got some that are not"),
        ("audio", ["red0.png"], f"expected spectrograms [frames, {SIDE}, {SIDE}], a .npy file, got another"),
        ("depth", ["ones.npy", "ones.npy"], "expected one array of all frames, or images, got 2 files"),
        ("depth", ["samples.jsonl"], "expected JPEG, PNG, WebP or another format"),
    ],
)  # fmt: skip
def test_frames_that_do_not_fit_are_refused_by_file_and_row(folder, modality, names, line):
    given = names if len(names) > 1 else names[0]
    path = manifest(folder, ROW, {"caption": "a wall", modality: given})
    data = dataset(folder, read_samples(path, MODALITIES))
    assert data[0, 0]["seen"]["vision"].shape == (1, 3, SIDE, SIDE)
    found = ""
    try:
        data[0, 1]
    except BrokenFile as error:
        found = str(error)
    assert found.startswith(f"{path}, line 2: {modality}: ") and line in found and "\n" not in found


def test_a_batch_has_the_rows_of_each_modality_and_whose_they_are(folder):
    data = dataset(folder, read_samples(folder / "samples.jsonl", MODALITIES), longest=4)
    batch = collate_samples([data[0, index] for index in (2, 1, 4)])
    assert batch["samples"] == {"normal": [0], "vision": [1], "audio": [1], "subtitle": [1, 2]}
    assert [tuple(x.shape) for x in batch["vision"]] == [(2, 3, SIDE, SIDE)]
    assert batch["text"].tolist() == [[2, 9, 6, 3], [2, 5, 14, 3], [2, 9, 7, 3]]
    assert batch["subtitle"].tolist() == [[2, 11, 12, 3], [2, 7, 10, 3]]
    assert batch["hidden"].any() and torch.equal(batch["masked"] == 4, batch["hidden"])


def test_what_is_hidden_follows_from_seed_epoch_and_index_alone(folder):
    samples = read_samples(folder / "samples.jsonl", MODALITIES)
    first, again, other = (dataset(folder, samples, seed=seed) for seed in (1, 1, 2))

    def hidden(data, epoch):
        return [data[epoch, index]["hidden"].tolist() for index in range(8)]

    assert hidden(first, 0) == hidden(again, 0)[:8] and hidden(first, 0) != hidden(first, 1)
    assert hidden(first, 0) != hidden(other, 0)
    assert len({tuple(row) for row in hidden(first, 0)}) > 1
