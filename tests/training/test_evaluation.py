"""`onepeace-fast evaluate`: figures by embeddings of one item at a time, every pair of modalities, what is refused."""

import dataclasses
import json
import shutil
import statistics

import pytest
import torch
from models._small import small_config, small_model
from training._runs import FEATURES, write_clips, write_config, write_images

from onepeace_fast import OnePeacePretrain, cli
from onepeace_fast.data.audio import prepare_waveform, read_audio
from onepeace_fast.data.image import prepare_image, read_image
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.training import command

ROWS = [  # image, clip, caption: an image with several captions, a caption of two images, a clip in two rows
    (0, 0, "a red thing"), (0, 1, "red, seen from the front"), (1, 2, "a green thing"), (2, 3, "a green thing"),
    (3, 3, "something yellow"), (4, 4, "grey"), (5, 5, "white"), (1, 5, "green or white"),
]  # fmt: skip
TRAINED = {"text", "image", "audio"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files, manifests, and a model of random weights, saved with a tokenizer in ``model``."""
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder, 6)
    write_clips(folder, 6)
    manifests = {
        "all": ["image\taudio\tcaption", *(f"{i}.png\t{a}.wav\t{text}" for i, a, text in ROWS)],
        "pairs": ["caption\timage", *(f"{text}\t{i}.png" for i, _, text in ROWS)],
        "one": ["image\tcaption", "0.png\ta", "0.png\tb"],
        "only": ["caption\ttitle", "a\tb"],
        "gone": ["image\tcaption", "0.png\ta", "none.png\tb"],
        "broken": ["image\tcaption", "0.png\ta", "all.tsv\tb"],
    }
    for name, lines in manifests.items():
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    audio = dataclasses.replace(small_config().encoder.audio, feature_layers=tuple(map(tuple, FEATURES)))
    config = dataclasses.replace(small_config(audio=audio), vocab_size=280)
    small_model("fused", config, torch.float32).save(folder / "model")
    Tokenizer.train([text for *_, text in ROWS], 280).save(folder / "model" / "tokenizer.json")
    return folder


def naive(corpus, first, second):
    """Ranks both ways, each item embedded alone and all of the others sorted."""
    model = OnePeacePretrain.load(corpus / "model").eval()
    tokenizer = Tokenizer.load(corpus / "model" / "tokenizer.json")

    def embed(kind, value):
        if kind == "text":
            inputs = torch.tensor([tokenizer.encode(value)[0]])
        elif kind == "image":
            inputs = prepare_image(read_image(corpus / f"{value}.png"), 48)[None]
        else:
            inputs = prepare_waveform(read_audio(corpus / f"{value}.wav"))[None]
        with torch.no_grad():
            return model.embed(**{kind: inputs})[0].double()

    def items(kind):
        cells = [row[("image", "audio", "text").index(kind)] for row in ROWS]
        return cells if kind == "text" else sorted(set(cells))

    def belong(a, b):
        return any({a, b} <= {f"{kind}{cell}" for kind, cell in zip(("i", "a", "t"), row, strict=True)} for row in ROWS)

    def ranks(queries, candidates):
        result = []
        for query in items(queries):
            own = embed(queries, query)
            scored = [
                (float(own @ embed(candidates, item)), belong(f"{queries[0]}{query}", f"{candidates[0]}{item}"))
                for item in items(candidates)
            ]
            scored.sort(key=lambda pair: -pair[0])
            result.append(1 + [right for _, right in scored].index(True))
        return result

    return ranks(first, second), ranks(second, first)


@pytest.mark.parametrize(
    ("manifest", "options", "first", "second", "counts"),
    [
        ("pairs", [], "image", "text", (6, 8)),
        ("pairs", ["--batch-size", "3"], "image", "text", (6, 8)),
        ("all", ["--columns", "caption", "audio", "--batch-size", "1"], "audio", "text", (6, 8)),
        ("all", ["--columns", "image", "audio", "--batch-size", "1"], "image", "audio", (6, 6)),
    ],
)
def test_figures_are_those_of_embeddings_one_by_one(corpus, tmp_path, capsys, manifest, options, first, second, counts):
    path = tmp_path / "figures.json"
    arguments = ["evaluate", str(corpus / "model"), str(corpus / f"{manifest}.tsv"), *options, "--json", str(path)]
    assert cli.main(arguments) == 0
    found = json.loads(path.read_text())["directions"]
    assert list(found) == [f"{first} to {second}", f"{second} to {first}"]
    for figures, ranks, sizes in zip(found.values(), naive(corpus, first, second), (counts, counts[::-1]), strict=True):
        assert (figures["queries"], figures["candidates"]) == sizes
        assert figures["median_rank"] == statistics.median(ranks)
        for k in (1, 5, 10):
            assert figures[f"recall_at_{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["direction", "queries", "candidates", "R@1", "R@5", "R@10", "median", "rank"]
    assert f"{found[f'{first} to {second}']['recall_at_1']:.1%}" in lines[1] and "by chance" in lines[2]


@pytest.mark.parametrize(
    ("checkpoint", "manifest", "options", "part"),
    [
        ("nowhere", "pairs", [], "expected a folder that save() wrote, got "),
        ("model", "none", [], "none.tsv: expected a manifest, TSV or Parquet, got no file there"),
        ("model", "all", [], "expected two of the columns image, audio and caption, got image, audio, caption; say"),
        ("model", "only", [], "expected two of the columns image, audio and caption, got caption"),
        ("model", "pairs", ["--columns", "audio", "caption"], "--columns: expected two of the columns of "),
        ("model", "one", [], "one.tsv: expected at least two different entries of 'image', got one"),
        ("model", "gone", [], "expected both of every pair, got 1 of 2 pairs without a file"),
        ("model", "broken", [], "got what does not decode as an image"),
        ("model", "pairs", ["--json", "nowhere/figures.json"], "--json: expected a file in a folder that exists, got"),
        ("silent", "pairs", [], "tokenizer.json: expected a tokenizer.json, got no file there"),
        ("two", "all", ["--columns", "image", "audio"], "two: expected a model of image and audio, got one of text"),
    ],
)
def test_what_does_not_fit_is_one_line(corpus, tmp_path, monkeypatch, capfd, checkpoint, manifest, options, part):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus / "model", tmp_path / "silent", ignore=lambda *_: ["tokenizer.json"])
    config = dataclasses.replace(small_config(audio=None, decoder={"audio": None}), vocab_size=280)
    small_model("fused", config, torch.float32).save(tmp_path / "two")
    place = corpus / checkpoint if checkpoint == "model" else tmp_path / checkpoint
    assert cli.main(["evaluate", str(place), str(corpus / f"{manifest}.tsv"), *options]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "batch/s" not in line]
    assert len(lines) == 1 and part in lines[0]


@pytest.mark.parametrize("change", ["halved", "broken"])
def test_half_precision_is_measured_and_embeddings_that_are_no_numbers_are_refused(corpus, tmp_path, capfd, change):
    model = OnePeacePretrain.load(corpus / "model").bfloat16()
    if change == "broken":
        with torch.no_grad():
            model.text_proj.weight[0, 0] = float("nan")
    model.save(tmp_path / "model")
    shutil.copy(corpus / "model" / "tokenizer.json", tmp_path / "model")
    code = cli.main(["evaluate", str(tmp_path / "model"), str(corpus / "pairs.tsv")])
    refused = "expected finite embeddings of text, got some that are" in capfd.readouterr().err
    assert (code, refused) == ((2, True) if change == "broken" else (0, False))


def test_a_checkpoint_is_measured_on_what_it_was_trained_on_and_never_when_damaged(corpus, capfd):
    assert command.pretrain(str(write_config(corpus, "stage1", steps=1, warm_up=0))) == 0
    first = corpus / "stage1" / "step-00000001"
    clips = ["--columns", "audio", "caption"]

    def run(folder, *options):
        capfd.readouterr()
        return cli.main(["evaluate", str(folder), str(corpus / "all.tsv"), *options])

    assert run(first, "--columns", "image", "caption") == 0
    assert run(first, *clips) == 2
    assert "expected a checkpoint trained on audio and text, got one of text and image" in capfd.readouterr().err
    keys = {"stage": "audio_language", "manifest": "clips.tsv", "model": None, "init": "stage1/step-00000001"}
    assert command.pretrain(str(write_config(corpus, "stage2", steps=1, warm_up=0, **keys))) == 0
    second = corpus / "stage2" / "step-00000001"
    assert set(torch.load(second / "training.pt", weights_only=True)["trained"]) == TRAINED
    assert run(second, *clips) == run(second, "--columns", "image", "audio") == 0
    with (second / "config.json").open("a") as file:
        file.write(" ")
    assert run(second, *clips) == 2
    assert "expected a whole checkpoint, got a damaged one (config.json changed since" in capfd.readouterr().err
