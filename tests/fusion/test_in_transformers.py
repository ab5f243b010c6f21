"""``fuse`` on models of Hugging Face's transformers with random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from fusion import _checks as checks
from fusion import _t5, _windows
from torch import nn

from onepeace_fast import fuse, use_backend

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SERIES = {
    "d_model": 32, "d_kv": 12, "num_heads": 2, "d_ff": 40, "num_layers": 2, "vocab_size": _t5.WORDS,
    "dropout_rate": 0.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}  # fmt: skip
# mT5 and UMT5 are gated by default.
TEXT = {"T5": {}, "gated T5": {"feed_forward_proj": "gated-gelu"}, "MT5": {}, "UMT5": {}}


def new_text(kind, name="EncoderModel", **settings):
    torch.manual_seed(0)
    family = kind.split()[-1]
    config = getattr(transformers, f"{family}Config")(**{**SERIES, **TEXT[kind], **settings})
    return _t5.randomised(getattr(transformers, f"{family}{name}")(config))


class OfRealTokens(nn.Module):
    """A text model's hidden states, with zeros at padding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, attention_mask, **inputs):
        out = self.model(attention_mask=attention_mask, output_hidden_states=True, **inputs)
        assert len(out.hidden_states) == SERIES["num_layers"] + 1
        assert out.hidden_states[-1] is out.last_hidden_state
        return [x * attention_mask[..., None].bool() for x in out.hidden_states]


@pytest.fixture(params=TEXT)
def text_case(request):
    return checks.Case(lambda: OfRealTokens(new_text(request.param)), _t5.batch, ("model.encoder",))


def test_texts(text_case):
    checks.check_values_and_undo(text_case)


def test_training_on_texts(text_case):
    checks.check_training(text_case)


def test_copies_of_text_models(text_case):
    checks.check_copies(text_case)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "onepeace_fast"])
def test_any_implementation_of_attention_is_replaced_and_none_is_changed(implementation):
    from onepeace_fast import register_attention

    register_attention()
    model, given = new_text("T5"), _t5.batch()
    model.set_attn_implementation(implementation)
    real = given["attention_mask"][..., None]
    want = model(**given).last_hidden_state * real
    fuse(model)
    with use_backend("fused"):
        found = model(**given).last_hidden_state
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["T5", "UMT5"])
def test_gradient_checkpointing(kind, reentrant):
    plain, model = new_text(kind).double().train(), new_text(kind).double().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    handle = fuse(model)
    mask = _t5.batch()["attention_mask"]
    embedded = torch.randn(*mask.shape, SERIES["d_model"], dtype=torch.float64)
    case = checks.Case(lambda: OfRealTokens(model), _t5.batch, ("model.encoder",))
    given = {"inputs_embeds": embedded, "attention_mask": mask}
    want = checks.run(case, OfRealTokens(plain), given)
    with use_backend("fused"):
        found = checks.run(case, OfRealTokens(model), given)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert handle.report().parts[0].fused_calls == 1


@pytest.mark.parametrize("kind", TEXT)
def test_an_encoder_and_decoder_train_and_write_the_same(kind):
    plain, model = (new_text(kind, "ForConditionalGeneration").double() for _ in range(2))
    handle, given = fuse(model), _t5.batch()
    written = _t5.mask_of([3, 7, 1, 5])
    labels = torch.randint(_t5.WORDS, (4, 7)).masked_fill(~written, -100)
    given |= {"labels": labels, "num_items_in_batch": torch.tensor(16)}
    for more in ({}, {"decoder_attention_mask": written.long()}):
        found = []
        for one in (plain, model):
            one.zero_grad()
            with use_backend("fused"):
                out = one(**given, **more)
            out.loss.backward()
            found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
            found[-1] |= {"loss": out.loss, "logits": out.logits * written[..., None]}
            layers = [*out.cache.self_attention_cache.layers, *out.cache.cross_attention_cache.layers]
            masks = [written] * 2 + [given["attention_mask"]] * 2
            found[-1] |= {
                f"{name} of layer {i}": getattr(layer, name) * mask[:, None, :, None]
                for i, (layer, mask) in enumerate(zip(layers, masks, strict=True)) for name in ("keys", "values")
            }  # fmt: skip
        assert found[0].keys() == found[1].keys() and len(found[0]) > 30
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-11, msg=name)
    assert [(part.path, part.fused_calls) for part in handle.report().parts] == [("encoder", 2), ("decoder", 2)]
    given = _t5.batch()
    for settings in ({"num_beams": 2}, {"use_cache": False}, {"do_sample": True}):
        tokens = []
        for one in (plain, model):
            torch.manual_seed(1)
            with use_backend("fused"):
                tokens.append(one.generate(**given, max_new_tokens=8, **settings))
        assert torch.equal(*tokens), settings
    (decoder,) = (part for part in handle.report().parts if part.path == "decoder")
    assert set(decoder.own_calls) == {"cache: it is filled token by token"} and not handle.report().refused


def test_hidden_states_of_some_layers_as_tuples():
    model, given = new_text("T5"), _t5.batch()
    real = given["attention_mask"][..., None]
    want = model(**given, output_hidden_states=[1], return_dict=False)
    fuse(model)
    with use_backend("fused"):
        found = model(**given, output_hidden_states=[1], return_dict=False)
    assert type(found) is tuple and len(found) == len(want)
    torch.testing.assert_close(found[0], want[0] * real, rtol=1e-4, atol=1e-4)
    assert [x is None for x in found[1]] == [x is None for x in want[1]]
    torch.testing.assert_close(found[1][1], want[1][1] * real, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_loaded_into_computes_with_its_new_parameters():
    model, other, given = new_text("T5"), new_text("T5"), _t5.batch()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    fuse(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    with use_backend("fused"):
        found = model(**given).last_hidden_state
    want = other(**given).last_hidden_state * given["attention_mask"][..., None]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
BEIT = {
    "image_size": [32, 48], "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "drop_path_rate": 0.0, "use_relative_position_bias": True,
}  # fmt: skip
WINDOWS = [f"encoder.layers.{i}.blocks.{j}.attention" for i in range(2) for j in range(2)]


def new_images(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**({"Swin": SWIN, "Beit": BEIT}[kind] | settings))
    return _windows.randomised(getattr(transformers, f"{kind}Model")(config))


def images(seed, size):
    return {"pixel_values": torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))}


IMAGES = {
    "Swin": checks.Case(lambda: new_images("Swin"), lambda seed: images(seed, (32, 32)), tuple(WINDOWS)),
    "Swin, padded": checks.Case(lambda: new_images("Swin"), lambda seed: images(seed, (28, 44)), tuple(WINDOWS)),
    "BEiT": checks.Case(lambda: new_images("Beit"), lambda seed: images(seed, (32, 48)), ("layers.0", "layers.1")),
}


@pytest.fixture(params=IMAGES)
def image_case(request):
    return IMAGES[request.param]


def test_images(image_case):
    checks.check_values_and_undo(image_case)


def test_training_on_images(image_case):
    checks.check_training(image_case)


def test_copies_of_image_models(image_case):
    checks.check_copies(image_case)


@pytest.mark.parametrize("size", [(64, 64), (24, 64)])
def test_resampled_positions_of_other_images(size):
    model, given = new_images("Beit").double(), images(0, size)["pixel_values"].double()
    want = model(given, interpolate_pos_encoding=True).last_hidden_state
    handle = fuse(model)
    with use_backend("fused"):
        found = model(given, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    assert all(part.fused_calls == 1 for part in handle.report().parts)


@pytest.mark.parametrize("kind", ["Swin", "Beit"])
def test_checkpointed_images_and_their_hidden_states(kind):
    plain, model = new_images(kind).double().train(), new_images(kind).double().train()
    model.activation_checkpointing_enable()
    handle = fuse(model)
    given = {"pixel_values": images(0, (32, 48))["pixel_values"].double(), "output_hidden_states": True}
    case = checks.Case(lambda: model, lambda seed: given, ())
    want = checks.run(case, plain, given)
    with use_backend("fused"):
        found = checks.run(case, model, given)
    assert len(want) == len(found) > 40
    for name, value in want.items():
        assert (value is None) == (found[name] is None)
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert all(part.fused_calls and not part.own_calls for part in handle.report().parts)


@pytest.mark.parametrize("kind", ["Swin", "Beit"])
def test_attentions_are_the_model_s_own_and_its_configuration_stays(kind):
    model, given = new_images(kind), images(0, (32, 48))
    model.set_attn_implementation("eager")
    want = model(**given, output_attentions=True).attentions
    other = type(model)(model.config)  # which shares it
    handle = fuse(model)
    with use_backend("fused"):
        found = model(**given, output_attentions=True).attentions
        model(**given)
    assert len(found) == len(want) and all(map(torch.equal, found, want))
    assert all(part.fused_calls == 1 and len(part.own_calls) == 1 for part in handle.report().parts)
    assert other.config is model.config and model.config._attn_implementation == "eager"
    assert not any("forward" in module.__dict__ for module in other.modules())


def test_a_bias_of_all_layers_keeps_the_model_s_own_code():
    model = new_images("Beit", use_shared_relative_position_bias=True)
    given = images(0, (32, 48))
    want = model(**given).last_hidden_state
    handle = fuse(model)
    with use_backend("fused"):
        assert torch.equal(model(**given).last_hidden_state, want)
    reason = "attention_mask: a mask or a bias of all layers is not known to a layer"
    assert all(part.own_calls == {reason: 1} for part in handle.report().parts)
