"""Inputs that do not fit: one line naming the argument, what came and what is taken, before any work."""

import pytest
import torch
from models._refusal import refuse
from models._small import BACKENDS, batch_of, hide, samples_of, small_config, small_model, text_batch

ENCODE = {
    "text of another rank": (
        {"text": torch.full((7,), 5)},
        "text: expected int64 or int32 [rows, length], got int64 [7] on cpu",
    ),
    "text of another dtype": ({"text": torch.zeros(2, 7)}, "[rows, length], got float32 [2, 7] on cpu"),
    "text that is a list": ({"text": [[5, 6]]}, "text: expected int64 or int32 [rows, length], got list [[5, 6]]"),
    "text on another device": (
        {"text": torch.full((2, 7), 5, device="meta")},
        "text: expected a tensor on cpu, got one on meta; move it with .to('cpu')",
    ),
    "token past the vocabulary": (
        {"text": torch.tensor([[4, 29, 30]])},
        "text: expected token ids from 0 to 29, got 1 others",
    ),
    "negative tokens": ({"text": torch.tensor([[4, -1, -7]])}, "text: expected token ids from 0 to 29, got 2 others"),
    "text past the positions": (
        {"text": torch.full((1, 514), 5)},
        "text: expected at most 513 tokens a row beside CLS, got 514",
    ),
    "image of another rank": (
        {"image": torch.zeros(3, 32, 32)},
        "image: expected float32 [rows, 3, side, side], got float32 [3, 32, 32] on cpu",
    ),
    "image of another dtype": (
        {"image": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)},
        "image: expected float32 [rows, 3, side, side], got uint8 [1, 3, 32, 32]",
    ),
    "image of the wrong precision": (
        {"image": torch.zeros(1, 3, 32, 32).double()},
        "image: expected float32 [rows, 3, side, side], got float64 [1, 3, 32, 32]",
    ),
    "image on another device": (
        {"image": torch.zeros(1, 3, 32, 32, device="meta")},
        "image: expected a tensor on cpu, got one on meta",
    ),
    "image of other channels": (
        {"image": torch.zeros(1, 4, 32, 32)},
        "side a multiple of 16, got float32 [1, 4, 32, 32] on cpu",
    ),
    "image that is not square": (
        {"image": torch.zeros(1, 3, 32, 48)},
        "side a multiple of 16, got float32 [1, 3, 32, 48] on cpu",
    ),
    "image of a broken patch": ({"image": torch.zeros(1, 3, 40, 40)}, "with side a multiple of 16"),
    "image without pixels": ({"image": torch.zeros(1, 3, 0, 0)}, "got float32 [1, 3, 0, 0]"),
    "image past the bias table": ({"image": torch.zeros(1, 3, 80, 80)}, "image: expected a side of at most 64, got 80"),
    "audio of another rank": (
        {"audio": torch.zeros(1, 1, 99)},
        "audio: expected float32 [rows, samples], got float32 [1, 1, 99] on cpu",
    ),
    "audio of another dtype": ({"audio": torch.zeros(1, 99, dtype=torch.int16)}, "[rows, samples], got int16 [1, 99]"),
    "audio on another device": ({"audio": torch.zeros(1, 99, device="meta")}, "audio: expected a tensor on cpu"),
    "audio too short for a frame": (
        {"audio": torch.zeros(1, samples_of(1) - 1)},
        "audio: expected samples for one frame at least, got 19",
    ),
    "audio past the positions": (
        {"audio": torch.zeros(1, samples_of(1024))},
        "audio: expected at most 1023 frames, got 1024 of 10250 samples",
    ),
    "audio_padding of another shape": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.zeros(2, 5, dtype=torch.bool)},
        "audio_padding: expected bool [2, 6], CLS and 5 frames, True at padding, got bool [2, 5] on cpu",
    ),
    "audio_padding of another dtype": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.zeros(2, 6)},
        "True at padding, got float32 [2, 6]",
    ),
    "audio_padding on another device": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.zeros(2, 6, dtype=torch.bool, device="meta")},
        "audio_padding: expected a tensor on cpu, got one on meta",
    ),
    "audio_padding at CLS": (
        {"audio": torch.zeros(2, samples_of(5)), "audio_padding": torch.eye(2, 6, dtype=torch.bool)},
        "audio_padding: expected False at CLS, column 0, got True there",
    ),
    "audio_padding without audio": (
        {"text": torch.full((2, 3), 5), "audio_padding": torch.zeros(2, 6, dtype=torch.bool)},
        "audio_padding: expected audio with it, got it alone",
    ),
    "nothing at all": ({}, "text, image, audio: expected at least one modality, got none"),
}
TWO = {"text": torch.full((2, 3), 5), "image": torch.zeros(2, 3, 32, 32)}
SAMPLES = {
    "rows that differ": (
        {"text": [0, 1]},
        3,
        "samples: expected exactly the modalities given, ['image', 'text'], got ['text']",
    ),
    "a modality without samples": (None, 3, "modalities differ in rows, got none with {'text': 2, 'image': 3}"),
    "samples of an absent modality": (
        {"text": [0, 1], "image": [0, 1], "audio": [0]},
        2,
        "got ['audio', 'image', 'text']",
    ),
    "too few entries": ({"text": [0, 1], "image": [0]}, 2, "samples['image']: expected an entry per row, 2, got 1"),
    "a sample twice": ({"text": [0, 0], "image": [0, 1]}, 2, "per modality, got [0] more than once"),
    "a gap": ({"text": [0, 1], "image": [0, 3]}, 2, "modality, got no row for [2]"),
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


@pytest.mark.parametrize(
    "rows",
    [torch.tensor([0.0, 1.5]), torch.tensor([[0], [1]]), torch.tensor([0, 1], device="meta"), ["a", "b"], [0, 1.5], 3],
)
def test_encode_refuses_samples_that_are_no_row_of_integers(rows, monkeypatch):
    model = small_model("fused", dtype=torch.float32)
    samples = {"text": rows, "image": [0, 1]}
    refuse("samples['text']: expected ", lambda: model.encode(**TWO, samples=samples), monkeypatch)


def test_embed_refuses_two_modalities(monkeypatch):
    model = small_model("fused", dtype=torch.float32)
    refuse("text, image, audio: expected exactly one, got ['image', 'text']", lambda: model.embed(**TWO), monkeypatch)


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_a_model_refuses_a_modality_it_was_built_without_or_that_its_decoder_lacks(modality, monkeypatch):
    inputs = batch_of(text=[3, 2], image=(2, 2), audio=[4, 3])
    inputs = {name: value for name, value in inputs.items() if name.startswith(modality)}
    model = small_model("fused", small_config(decoder={modality: None}))
    refuse(modality, lambda: model.reconstruct(**inputs, masks=hide(inputs)), monkeypatch)
    model = small_model("fused", small_config(decoder={modality: None}, **{modality: None}))
    expected = f"{modality}: expected no tensor, got one: the model was built without"
    refuse(expected, lambda: model.encode(**inputs), monkeypatch)


def test_tokens_may_be_int32():
    model, text = small_model("fused"), text_batch([5, 3])
    assert torch.equal(model.encode(text=text.int())["text"], model.encode(text=text)["text"])


@pytest.mark.parametrize("backend", ["triton", "", "Fused"])
def test_an_unknown_backend_is_refused(backend):
    with pytest.raises(ValueError, match=r"^backend: expected one of reference, fused, got .*$"):
        small_model(backend)
