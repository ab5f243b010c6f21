"""Inputs that do not fit: one line naming the argument, what came and what is taken, before any work."""

import pytest
import torch
from models._refusal import refuse
from models._small import (
    BACKENDS,
    batch_of,
    samples_of,
    small_config,
    small_model,
    text_batch,
)

ENCODE = {
    "text of another rank": (
        {"text": torch.full((7,), 5)},
        "text: got int64 [7] on cpu, takes int64 or int32 [rows, length]",
    ),
    "text of another dtype": ({"text": torch.zeros(2, 7)}, "text: got float32 [2, 7] on cpu, takes int64"),
    "text that is a list": ({"text": [[5, 6]]}, "text: got list [[5, 6]], takes int64"),
    "text on another device": (
        {"text": torch.full((2, 7), 5, device="meta")},
        "text: got a tensor on meta, takes cpu; move it with .to('cpu')",
    ),
    "token past the vocabulary": (
        {"text": torch.tensor([[4, 29, 30]])},
        "text: got 1 token ids outside the vocabulary, takes 0 to 29",
    ),
    "negative tokens": (
        {"text": torch.tensor([[4, -1, -7]])},
        "text: got 2 token ids outside the vocabulary, takes 0 to 29",
    ),
    "text past the positions": (
        {"text": torch.full((1, 514), 5)},
        "text: got 514 tokens a row, takes at most 513 beside CLS",
    ),
    "image of another rank": (
        {"image": torch.zeros(3, 32, 32)},
        "image: got float32 [3, 32, 32] on cpu, takes float32 [rows, 3",
    ),
    "image of another dtype": (
        {"image": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)},
        "image: got uint8 [1, 3, 32, 32]",
    ),
    "image of the wrong precision": (
        {"image": torch.zeros(1, 3, 32, 32).double()},
        "image: got float64 [1, 3, 32, 32]",
    ),
    "image on another device": (
        {"image": torch.zeros(1, 3, 32, 32, device="meta")},
        "image: got a tensor on meta, takes cpu",
    ),
    "image of other channels": (
        {"image": torch.zeros(1, 4, 32, 32)},
        "image: got float32 [1, 4, 32, 32] on cpu, takes a square",
    ),
    "image that is not square": (
        {"image": torch.zeros(1, 3, 32, 48)},
        "image: got float32 [1, 3, 32, 48] on cpu, takes a square",
    ),
    "image of a broken patch": ({"image": torch.zeros(1, 3, 40, 40)}, "with side a multiple of 16"),
    "image without pixels": ({"image": torch.zeros(1, 3, 0, 0)}, "image: got float32 [1, 3, 0, 0]"),
    "image past the bias table": ({"image": torch.zeros(1, 3, 80, 80)}, "image: got side 80, takes at most 64"),
    "audio of another rank": (
        {"audio": torch.zeros(1, 1, 99)},
        "audio: got float32 [1, 1, 99] on cpu, takes float32 [rows, samples]",
    ),
    "audio of another dtype": ({"audio": torch.zeros(1, 99, dtype=torch.int16)}, "audio: got int16 [1, 99]"),
    "audio on another device": ({"audio": torch.zeros(1, 99, device="meta")}, "audio: got a tensor on meta, takes cpu"),
    "audio too short for a frame": (
        {"audio": torch.zeros(1, samples_of(1) - 1)},
        "audio: got 19 samples, takes enough for one frame",
    ),
    "audio past the positions": (
        {"audio": torch.zeros(1, samples_of(1024))},
        "audio: got 10250 samples, 1024 frames, takes at most 1023 frames",
    ),
    "audio_padding of another shape": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.zeros(2, 5, dtype=torch.bool)},
        "audio_padding: got bool [2, 5] on cpu, takes bool [2, 6]",
    ),
    "audio_padding of another dtype": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.zeros(2, 6)},
        "audio_padding: got float32 [2, 6]",
    ),
    "audio_padding on another device": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.zeros(2, 6, dtype=torch.bool, device="meta")},
        "audio_padding: got a tensor on meta, takes cpu",
    ),
    "audio_padding at CLS": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.eye(2, 6, dtype=torch.bool)},
        "audio_padding: got True at CLS, column 0, takes False there",
    ),
    "audio_padding without audio": (
        {"text": torch.full((2, 3), 5), "audio_padding": torch.zeros(2, 6, dtype=torch.bool)},
        "audio_padding: got a tensor without audio, takes both",
    ),
    "nothing at all": ({}, "text, image, audio: got none, takes at least one modality"),
}
TWO = {"text": torch.full((2, 3), 5), "image": torch.zeros(2, 3, 32, 32)}
SAMPLES = {
    "rows that differ": (
        {"text": [0, 1]},
        3,
        "samples: got ['text'], takes exactly the modalities given, ['image', 'text']",
    ),
    "a modality without samples": (
        None,
        3,
        "samples: got none with {'text': 2, 'image': 3} rows, takes the sample of each row",
    ),
    "samples of an absent modality": (
        {"text": [0, 1], "image": [0, 1], "audio": [0]},
        2,
        "samples: got ['audio', 'image', 'text']",
    ),
    "too few entries": ({"text": [0, 1], "image": [0]}, 2, "samples['image']: got 1 entries, takes one per row, 2"),
    "a sample twice": ({"text": [0, 0], "image": [0, 1]}, 2, "samples['text']: got [0] more than once"),
    "a gap": ({"text": [0, 1], "image": [0, 3]}, 2, "samples: got no row for [2]"),
    "a negative sample": ({"text": [0, -1], "image": [0, 1]}, 2, "samples"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ENCODE)
def test_encode_refuses(case, backend, monkeypatch):
    inputs, expected = ENCODE[case]
    model = small_model(backend, dtype=torch.float32)
    message = refuse(expected, lambda: model.encode(**inputs), monkeypatch)
    assert message.split(":")[0] in (*inputs, "text, image, audio")
    single = {name: value for name, value in inputs.items() if name != "text" or "audio_padding" not in inputs}
    if len({*single} - {"audio_padding"}) == 1:
        refuse(expected, lambda: model.embed(**inputs), monkeypatch)


@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_encode_refuses_samples(case, as_tensor, monkeypatch):
    samples, images, expected = SAMPLES[case]
    if samples is not None and as_tensor:
        samples = {name: torch.tensor(rows) for name, rows in samples.items()}
    model = small_model("fused", dtype=torch.float32)
    inputs = {**TWO, "image": torch.zeros(images, 3, 32, 32)}
    refuse(expected, lambda: model.encode(**inputs, samples=samples), monkeypatch)


UNFIT_SAMPLES = {
    "fractions": torch.tensor([0.0, 1.5]),
    "two dimensions": torch.tensor([[0], [1]]),
    "another device": torch.tensor([0, 1], device="meta"),
    "words": ["a", "b"],
    "fractions in a list": [0, 1.5],
    "a number": 3,
}


@pytest.mark.parametrize("case", UNFIT_SAMPLES)
def test_encode_refuses_samples_that_are_no_row_of_integers(case, monkeypatch):
    model = small_model("fused", dtype=torch.float32)
    samples = {"text": UNFIT_SAMPLES[case], "image": [0, 1]}
    refuse("samples['text']: got ", lambda: model.encode(**TWO, samples=samples), monkeypatch)


def test_embed_refuses_two_modalities(monkeypatch):
    model = small_model("fused", dtype=torch.float32)
    refuse("text, image, audio: got ['image', 'text'], takes exactly one", lambda: model.embed(**TWO), monkeypatch)


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_a_model_refuses_a_modality_it_was_built_without(modality, monkeypatch):
    model = small_model("fused", small_config(decoder={modality: None}, **{modality: None}))
    inputs = batch_of(text=[3, 2], image=(2, 2), audio=[4, 3])
    inputs = {name: value for name, value in inputs.items() if name.startswith(modality)}
    refuse(
        f"{modality}: got a tensor, takes none: the model was built without",
        lambda: model.encode(**inputs),
        monkeypatch,
    )


def test_tokens_may_be_int32():
    model, text = small_model("fused"), text_batch([5, 3])
    assert torch.equal(model.encode(text=text.int())["text"], model.encode(text=text)["text"])


@pytest.mark.parametrize("backend", ["triton", "", "Fused"])
def test_an_unknown_backend_is_refused(backend):
    with pytest.raises(ValueError, match=r"^backend: got .*, takes one of reference, fused$"):
        small_model(backend)
