"""Models without a decoder: retrieval, classification with its head, and an encoder alone; both backends agree."""

import pytest
import torch
from data._refused import refused
from models._encoder_only import classify, encoder_of, retrieval, vision
from models._small import BACKENDS, VOCABULARY, audio_batch, batch_of, image_batch, small_model, text_batch
from torch.nn.functional import gelu, layer_norm

from onepeace_fast import ClassifyConfig, EncoderConfig, OnePeaceClassify, OnePeacePretrain, RetrievalConfig
from onepeace_fast.config import ImageAdapterConfig, TextAdapterConfig, read_config

TYPED = {
    "text": TextAdapterConfig(bucket_size=6, type_embedding=True),
    "image": ImageAdapterConfig(position_grid=3, bias_grid=4, type_embedding=True),
}


def by_hand(head, sequences, masks):
    """Upstream's head over lists of [length, dim], in plain loops over samples and heads."""
    rows = []
    for features, mask in zip(sequences, masks, strict=True):
        pooled = []
        for one in features:
            x = one[0]
            if head.attn_pooling_func is not None:
                pool, real = head.attn_pooling_func, one[1:][mask[1:]]
                keys, values = real @ pool.k_proj.weight.T, real @ pool.v_proj.weight.T + pool.v_proj.bias
                size, heads = pool.q.shape[-1], []
                for h in range(pool.q.shape[2]):
                    part = slice(h * size, (h + 1) * size)
                    heads.append((keys[:, part] @ pool.q[0, 0, h]).softmax(0) @ values[:, part])
                x = torch.cat(heads) @ pool.out_proj.weight.T + pool.out_proj.bias
                x = layer_norm(x, x.shape, head.norm.weight, head.norm.bias)
            if head.pooler is not None:
                x = torch.tanh(head.pooler[1](x))
            pooled.append(x)
        first, norm, _, last = head.classifier
        hidden = layer_norm(first(torch.cat(pooled)), norm.normalized_shape, norm.weight, norm.bias)
        rows.append(last(gelu(hidden)))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("pooler", [True, False])
def test_the_head_pools_the_text_of_image_and_text(backend, pooling, pooler):
    model = classify("text", "image", backend=backend, head={"attention_pooling": pooling, "pooler": pooler})
    batch = batch_of(text=[3, 7, 1], image=(3, 3))
    features = model.encode(**batch)["text"]
    mask = torch.cat([torch.ones(3, 1, dtype=torch.bool), batch["text"] != 1], dim=1)
    expected = by_hand(model.classify_head, [[one] for one in features], mask)
    torch.testing.assert_close(model.classify(**batch), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_use_image_features_pools_the_image(backend):
    model = classify("text", "image", backend=backend, head={"use_image_features": True})
    batch = batch_of(text=[3, 7], image=(2, 3))
    features = model.encode(**batch)["image"]
    expected = by_hand(model.classify_head, [[one] for one in features], torch.ones(features.shape[:2]).bool())
    torch.testing.assert_close(model.classify(**batch), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_are_classified_without_their_padding(backend):
    model = classify("audio", backend=backend)
    audio, padding = audio_batch([5, 9])
    features = model.encode(audio=audio, audio_padding=padding)["audio"]
    expected = by_hand(model.classify_head, [[one] for one in features], ~padding)
    torch.testing.assert_close(model("classify", audio=audio, audio_padding=padding), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_of_images_is_two_sequences_with_one_text(backend):
    model = classify("text", "image", backend=backend, head={"two_images": True})
    text, first, second = text_batch([3, 7]), image_batch(2, 3), image_batch(2, 3, seed=9)
    features = [model.encode(text=text, image=image)["text"] for image in (first, second)]
    mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), text != 1], dim=1)
    expected = by_hand(model.classify_head, list(zip(*features, strict=True)), mask)
    actual = model.classify(text=text, image=first, second_image=second)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_type_embeddings_shift_every_token_and_the_second_image_by_one_more(backend):
    typed = classify("text", "image", backend=backend, head={"two_images": True}, **TYPED)
    plain = classify("text", "image", backend=backend, head={"two_images": True})
    plain.load_state_dict(typed.state_dict(), strict=False)
    adapters, first = typed.encoder.adapters, image_batch(2, 3)
    types = {name: adapter.type_embedding for name, adapter in adapters.items()}
    with torch.no_grad():  # what is added to every token may as well be added to the positions
        plain.encoder.text_adapter.embed_positions.weight += types["text"][0]
        plain.encoder.image_adapter.pos_embed += types["image"][0]
    inputs = {"text": text_batch([3, 7]), "image": first}
    torch.testing.assert_close(typed.encode(**inputs), plain.encode(**inputs), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        alone = plain.encode(**inputs)["text"]
        plain.encoder.image_adapter.pos_embed += adapters["image"].type_embedding_2[0]
        shifted = plain.encode(**inputs)["text"]
    mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), inputs["text"] != 1], dim=1)
    expected = by_hand(typed.classify_head, list(zip(alone, shifted, strict=True)), mask)
    torch.testing.assert_close(typed.classify(**inputs, second_image=first), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_retrieval_model_embeds_as_a_pretraining_model_with_its_parameters(backend):
    whole = small_model(backend)
    model = retrieval("text", "image", "audio", backend=backend)
    model.load_state_dict({name: whole.state_dict()[name] for name in model.state_dict()})
    assert not any("decoder" in name or "mask_head" in name for name in model.state_dict())
    audio, padding = audio_batch([5, 9])
    for inputs in (
        {"text": text_batch([3, 7])},
        {"image": image_batch(2, 3)},
        {"audio": audio, "audio_padding": padding},
    ):
        assert torch.equal(model.embed(**inputs), whole.embed(**inputs))


def test_an_encoder_without_final_norms_gives_what_its_last_layer_gives():
    models = {backend: vision(backend) for backend in BACKENDS}
    image, seen = image_batch(2, 3), []
    last = models["reference"].encoder.fusion_model.layers[-1]
    last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    outputs = {backend: model.encode(image=image)["image"] for backend, model in models.items()}
    assert torch.equal(outputs["reference"], seen[0].transpose(0, 1))
    torch.testing.assert_close(outputs["fused"], outputs["reference"], rtol=1e-10, atol=1e-10)
    assert "encoder_wrapper.fusion_model.image_layer_norm.weight" not in models["fused"].state_dict()


def test_models_of_every_kind_are_saved_and_loaded_unchanged(tmp_path):
    made = (retrieval("text", "audio"), classify("text", "image", head={"two_images": True}, **TYPED), vision())
    for number, model in enumerate(made):
        folder = tmp_path / str(number)
        model.save(folder)
        loaded = type(model).load(folder)
        assert loaded.config == model.config == read_config(folder / "config.json")
        assert type(read_config(folder / "config.json")) is type(model.config)
        pairs = zip(loaded.named_parameters(), model.named_parameters(), strict=True)
        assert all(m == n and torch.equal(p, q) for (m, p), (n, q) in pairs)


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path):
    retrieval("text").save(tmp_path)
    refused(lambda: OnePeaceClassify.load(tmp_path), "config: ", "classify model", "retrieval model")
    refused(lambda: OnePeacePretrain.load(tmp_path), "config: ", "pretrain model", "retrieval model")
    (tmp_path / "config.json").write_text('{"model": "bert"}')
    refused(lambda: read_config(tmp_path / "config.json"), tmp_path / "config.json", "retrieval", "'bert'")


@pytest.mark.parametrize(
    "call, parts",
    [
        (lambda model: model.classify(text=text_batch([3])), ("text, image: expected one of each, got text alone",)),
        (lambda model: model.classify(**batch_of(text=[3], image=(1, 3))), ("second_image: expected one, got none",)),
        (
            lambda model: model.classify(**batch_of(text=[0, 3], image=(2, 3)), second_image=image_batch(2, 3)),
            ("text: expected a token beside CLS",),
        ),
    ],
)
def test_what_a_head_cannot_classify_is_refused(call, parts):
    refused(lambda: call(classify("text", "image", head={"two_images": True})), "", *parts)


def test_a_second_image_without_need_is_refused():
    model, image = classify("image"), image_batch(2, 3)
    refused(lambda: model.classify(image=image, second_image=image), "second_image: expected none, got one")


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"classes": 0}, ("classes: expected a positive integer",)),
        ({"pooler_dropout": 1.0}, ("pooler_dropout: expected a probability",)),
        ({"two_images": True}, ("two_images: expected False without images",)),
        ({"encoder": encoder_of("text", final_norm=False)}, ("final_norm: expected True",)),
    ],
)
def test_a_head_that_cannot_be_is_refused(fields, parts):
    base = {"encoder": encoder_of("text"), "vocab_size": VOCABULARY, "classes": 3, "head_width": 8}
    refused(lambda: ClassifyConfig(**{**base, **fields}), "", *parts)


def test_a_configuration_says_what_it_lacks():
    refused(lambda: ClassifyConfig.from_dict({"classes": 3}), "config: expected classes, head_width, got no head_width")
    assert RetrievalConfig.from_dict({"model": "retrieval"}) == RetrievalConfig() != EncoderConfig()
