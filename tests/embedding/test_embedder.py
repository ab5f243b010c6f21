"""Lists in, embeddings out: each as of the item alone, in the order given; and upstream's names."""

import logging

import numpy
import pytest
import torch
from data._refused import refused
from embedding._small import CAPTIONS, SIDE, pixels, unit, write_files, write_model
from models._small import small_config, small_model
from models.test_process_defaults import DEFAULTS, same_under

for package in ("tokenizers", "PIL", "soundfile", "scipy"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402

from onepeace_fast import OnePeaceRetrieval  # noqa: E402
from onepeace_fast.data.text import Tokenizer  # noqa: E402
from onepeace_fast.embedding import Batches, Embedder, from_pretrained  # noqa: E402
from onepeace_fast.embedding import embedder as embedding  # noqa: E402
from onepeace_fast.embedding.batches import by_length  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("public")).parent


@pytest.fixture(scope="module")
def embedder(folder):
    return from_pretrained(folder / "public.pt", backend="reference")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_every_row_is_its_items_alone_in_the_order_given_whatever_the_batches_are(folder, files):
    images, sounds = files
    pictures = [images[2], Image.open(images[0]), pixels(7)]
    samples = torch.sin(torch.arange(20000) / 9.0)
    clips = [sounds[1], samples.numpy(), sounds[0], samples]
    tight = Batches(tokens=20, images=2, seconds=2.5)
    embedder = from_pretrained(folder / "public.pt", backend="reference", batches=tight)
    found = embedder.embed(text=CAPTIONS, image=pictures, audio=clips)
    model, processor = embedder.model, embedder.processor
    with torch.no_grad():
        alone = {
            "text": [model.embed(text=processor.process_text([text])) for text in CAPTIONS],
            "image": [model.embed(image=processor.process_image([image])) for image in pictures],
            "audio": [model.embed(audio=processor.clips([clip])[0][None]) for clip in clips],
        }
    for name, rows in alone.items():
        got = getattr(found, name)
        close(got, torch.cat(rows))
        close(unit(got), torch.ones(len(rows)))
        assert (got.dtype, got.requires_grad) == (torch.float32, False)
        assert (found.places[name], found.broken[name]) == ([*range(len(rows))], {})


@DEFAULTS
def test_embeddings_are_the_same_whatever_the_defaults_are(embedder, files, value):
    same_under(value, lambda: vars(embedder.embed(text=CAPTIONS, image=files[0], audio=files[1])))


def test_what_goes_through_the_model_at_once_keeps_to_the_batches(folder, files):
    embedder, seen = from_pretrained(folder / "public.pt", batches=Batches(tokens=30, images=2, seconds=2.5)), []
    for name in ("text", "image", "audio"):
        adapter = embedder.model.encoder.adapter(name)
        adapter.register_forward_hook(lambda *_, name=name: seen.append((name, list(_[1][0].shape))))
    embedder.embed(text=CAPTIONS, image=files[0])
    texts = [shape for name, shape in seen if name == "text"]
    assert len(texts) > 1 and all(rows * (length + 1) <= 30 for rows, length in texts)
    assert [shape[0] for name, shape in seen if name == "image"] == [2, 1]


@pytest.mark.parametrize("tokens", [1, 9, 24, 1000])
def test_texts_of_similar_length_share_a_batch(tokens):
    lengths = {place: 1 + place * 7 % 11 for place in range(11)}
    batches = [*by_length(lengths, tokens)]
    ordered = [lengths[place] for batch in batches for place in batch]
    assert ordered == sorted(lengths.values())
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert len(batch) == 1 or len(batch) * (lengths[batch[-1]] + 1) <= tokens
        if following is not None:
            assert (len(batch) + 1) * (lengths[following[0]] + 1) > tokens


def test_upstreams_example_runs_with_its_import_changed(folder, files):
    model = from_pretrained(str(folder / "public.pt"), device="cpu", dtype="float32")
    src_tokens = model.process_text(["cow", "dog", "elephant"])
    src_images = model.process_image(files[0][:2])
    src_audios, audio_padding_masks = model.process_audio(files[1][:2])
    with torch.no_grad():
        text_features = model.extract_text_features(src_tokens)
        image_features = model.extract_image_features(src_images)
        audio_features = model.extract_audio_features(src_audios, audio_padding_masks)
        i2t_similarity = image_features @ text_features.T
        a2t_similarity = audio_features @ text_features.T
    assert list(i2t_similarity.shape) == list(a2t_similarity.shape) == [2, 3]
    assert list(src_images.shape) == [2, 3, SIDE, SIDE]
    close(text_features, model.embed(text=["cow", "dog", "elephant"]).text)
    close(image_features, model.embed(image=files[0][:2]).image)
    close(audio_features[1], model.embed(audio=files[1][:2]).audio[1])  # the longest has no padding
    (images, _, heights), tokens = model.process_image_text_pairs([(files[0][0], "dog")], return_image_sizes=True)
    assert (list(images.shape), heights.tolist(), len(tokens)) == ([1, 3, SIDE, SIDE], [70], 1)
    refused(lambda: model.extract_vl_features(src_images[:1], tokens), "model: expected a classifier")


def test_a_classifiers_features_are_its_logits():
    from onepeace_fast import ClassifyConfig, OnePeaceClassify

    encoder = small_config(audio=None, decoder={"audio": None}).encoder
    head = {"classes": 5, "head_width": 8, "attention_pooling": False}
    model = OnePeaceClassify(ClassifyConfig(encoder=encoder, vocab_size=30, **head)).eval()
    images, tokens = torch.randn(2, 3, 48, 48), torch.tensor([[5, 6], [7, 1]])
    found = Embedder(model).extract_vl_features(images, tokens)
    assert torch.equal(found, model.classify(image=images, text=tokens)) and list(found.shape) == [2, 5]
    refused(lambda: Embedder(model).embed(text=["a"]), "model: expected one with projections")


def test_a_broken_item_is_named_or_skipped_and_the_rest_done(embedder, files, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = [files[0][0], str(broken), files[0][1], numpy.zeros((4, 4), "uint8")]
    refused(lambda: embedder.embed(image=images), broken)
    refused(lambda: embedder.embed(image=images[2:]), "image[1]")
    empty = numpy.zeros(0, "float32")
    refused(lambda: embedder.embed(audio=[empty]), "audio[0]")
    refused(lambda: embedder.embed(text=["a", "  "]), "text[1]: expected some text")
    refused(lambda: embedder.embed(text=["a", 3]), "text[1]: expected a str")
    with caplog.at_level(logging.WARNING):
        found = embedder.embed(image=images, audio=[empty, files[1][0]], text=["", "a"], broken="skip")
    assert found.places == {"image": [0, 2], "audio": [1], "text": [1]}
    assert [*found.broken["image"]] == [1, 3] and [*found.broken["audio"]] == [*found.broken["text"]] == [0]
    assert [line.removesuffix("; skipped") for line in caplog.messages] == [
        line for name in ("text", "image", "audio") for line in found.broken[name].values()
    ]
    close(found.image, embedder.embed(image=[images[0], images[2]]).image)
    close(found.audio, embedder.embed(audio=[files[1][0]]).audio)
    assert list(embedder.embed(text=["", " "], broken="skip").text.shape) == [0, 48]


def test_a_text_of_ten_thousand_words_keeps_its_first_70_tokens_and_says_so(embedder, caplog):
    with caplog.at_level(logging.WARNING):
        found = embedder.embed(text=["a dog", "dog " * 10000])
    assert caplog.messages == ["text: 1 of 2 have more than 70 tokens and lose their ends, the first is text[1]"]
    close(found.text[1:], embedder.extract_text_features(embedder.process_text(["dog " * 70])).detach())


def test_an_embedding_that_is_not_finite_is_an_items_fault(folder, files):
    embedder = from_pretrained(folder / "public.pt")
    with torch.no_grad():
        embedder.model.get_submodule("image_proj").weight[0, 0] = torch.inf
    found = embedder.embed(image=files[0], broken="skip")
    assert len(found.image) == 0 and [*found.broken["image"]] == [0, 1, 2]
    refused(lambda: embedder.embed(image=files[0]), f"{files[0][0]}: expected a finite embedding")


def test_a_bar_shows_on_long_lists_how_far_they_are(embedder, monkeypatch):
    told = []

    class Bar:
        def update(self, n=1):
            told.append(n)

        def close(self):
            told.append("closed")

    monkeypatch.setattr(embedding, "progress", lambda *_: told.append(_[2]) or Bar())
    embedder.embed(text=["a dog"] * embedding.LONG)
    assert told == []
    embedder.embed(text=["a dog"] * (embedding.LONG + 1))
    assert (told[0], sum(told[1:-1]), told[-1]) == (embedding.LONG + 1, embedding.LONG + 1, "closed")


def test_a_model_of_16_bits_gives_rows_of_length_1(folder, files):
    embedder = from_pretrained(folder / "public.pt", dtype="bf16")
    found = embedder.embed(text=CAPTIONS, image=files[0], audio=files[1])
    for rows in (found.text, found.image, found.audio):
        assert rows.dtype == torch.float32
        close(unit(rows), torch.ones(len(rows)))


def test_what_cannot_be_embedded_is_refused_in_one_line(embedder, folder, tmp_path):
    refused(lambda: embedder.embed(), "text, image, audio: expected at least one list, got none")
    refused(lambda: embedder.embed(text="a dog"), "text: expected a list")
    refused(lambda: embedder.embed(text=["a"], broken="no"), "broken: expected one of fatal, skip")
    refused(lambda: Embedder(embedder.model).embed(text=["a"]), "tokenizer: expected one for texts")
    images = Embedder(embedder.model.branch("image"))
    refused(lambda: images.embed(text=["a"]), "text: expected image for this model")
    model = small_model("reference")
    refused(lambda: Embedder(model.train()), "model: expected it in evaluation mode")
    refused(lambda: Embedder(torch.nn.Linear(1, 1)), "model: expected one with projections", "Linear")
    refused(lambda: from_pretrained(folder / "public.pt", tokenizer=tmp_path), tmp_path, "encoder.json")
    refused(lambda: Batches(images=0), "images: expected a positive number")


def test_projections_that_were_drawn_are_refused(folder, tmp_path):
    values = torch.load(folder / "public.pt", weights_only=False)
    values["model"] = {name: x for name, x in values["model"].items() if not name.startswith("image_proj")}
    torch.save(values, tmp_path / "without.pt")
    refused(lambda: from_pretrained(tmp_path / "without.pt", tokenizer=folder), "", "image_proj", "expected")


def test_a_model_of_another_kind_and_its_own_tokenizer_can_be_put_together(folder):
    model = small_model("reference", small_config(), torch.float32)
    embedder = Embedder(model, Tokenizer.load(folder / "tokenizer.json"), fit="crop", image_size=48)
    assert (embedder.processor.fit, embedder.processor.image_size) == ("crop", 48)
    assert list(embedder.embed(image=[pixels(1)]).image.shape) == [1, 48]
    assert isinstance(from_pretrained(folder / "public.pt").model, OnePeaceRetrieval)
