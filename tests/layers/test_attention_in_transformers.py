"""Hugging Face's models with ``attn_implementation="onepeace_fast"`` equal their eager selves, random weights."""

import pytest
import torch

from onepeace_fast import register_attention, transformers_attention

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

MASK = torch.arange(12) < torch.tensor([5, 12, 9])[:, None]
MASKS = {"none": None, "right": MASK, "left": MASK.flip(1).long(), "no": torch.ones_like(MASK)}
SERIES = {
    "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 3, "vocab_size": 50, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
BEIT = {
    "image_size": [32, 48], "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "drop_path_rate": 0.0, "use_relative_position_bias": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()
    register_attention()


def new_model(name, config=None, **fields):
    """With random weights, also where a model would begin with zeros."""
    torch.manual_seed(0)
    settings = config or {"T5": SERIES, "MT": SERIES, "UM": SERIES, "Sw": SWIN, "Be": BEIT}[name[:2]]
    kind = {"T5": "T5", "MT": "MT5", "UM": "UMT5", "Sw": "Swin", "Be": "Beit"}[name[:2]]
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**{**settings, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def ids():
    return torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


def images(*size, dtype=torch.float64):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(model, implementation, weigh=None, **inputs):
    """Outputs at real tokens, and every parameter's gradient."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(**inputs)[0]
    out = out[-1] if isinstance(out, tuple) else out  # a backbone's maps
    out = out if weigh is None else out * weigh[..., None]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weight).sum().backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return out.detach(), gradients


def assert_same(model, tolerance, **inputs):
    model.train()
    out, gradients = run(model, "onepeace_fast", **inputs)
    want, wanted = run(model, "eager", **inputs)
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == wanted.keys() and len(wanted) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=tolerance, atol=tolerance * 10, msg=name)
    tables = [name for name in wanted if "relative" in name]
    assert all(wanted[name].abs().max() > 1e-3 for name in tables)
    return tables


@pytest.mark.parametrize("name", ["T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"])
@pytest.mark.parametrize(
    "mask", [None, MASK, MASK.flip(1).long(), torch.ones_like(MASK)], ids=["none", "right", "left", "full"]
)
def test_encoders_of_text(name, mask):
    tables = assert_same(new_model(name), 1e-10, weigh=mask, input_ids=ids(), attention_mask=mask)
    assert len(tables) == (3 if name.startswith("U") else 1)


@pytest.mark.parametrize("size", [(32, 32), (32, 56), (28, 44)])
def test_swin_with_shifts_and_padded_windows(size):
    assert len(assert_same(new_model("SwinModel"), 1e-5, pixel_values=images(*size))) == 4  # their softmax is float32


def test_a_backbone_that_shifts_a_window_as_large_as_the_image():
    model = new_model("SwinBackbone", image_size=16, out_features=["stage1", "stage2"])
    assert len(assert_same(model, 1e-5, pixel_values=images(16, 16))) == 4


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_beit(shared, own):
    model = new_model("BeitModel", use_shared_relative_position_bias=shared, use_relative_position_bias=own)
    tables = assert_same(model, 1e-5, pixel_values=images(32, 48))
    assert len(tables) == shared + 2 * own


def test_beit_of_other_images():
    model = new_model("BeitModel")
    assert_same(model, 1e-5, pixel_values=images(64, 64), interpolate_pos_encoding=True)
    model.set_attn_implementation("onepeace_fast")
    with pytest.raises(ValueError, match="bias: expected numbers that depend on the distance in"):
        model(images(24, 64))
    with pytest.raises(ValueError, match="attention_mask: expected None for beit"):
        model(images(32, 48), attention_mask=torch.ones(2, 25))


@pytest.mark.parametrize("name, inputs", [
    ("T5EncoderModel", {"input_ids": ids(), "attention_mask": MASK}),
    ("UMT5EncoderModel", {"input_ids": ids(), "attention_mask": MASK}),
    ("SwinModel", {"pixel_values": images(32, 32, dtype=torch.bfloat16)}),
    ("BeitModel", {"pixel_values": images(32, 48, dtype=torch.bfloat16)}),
])  # fmt: skip
def test_half_precision_is_as_near_to_double_as_eager_is(name, inputs):
    exact = new_model(name)
    doubles = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    weigh = inputs.get("attention_mask")
    want, _ = run(exact, "eager", weigh, **doubles)
    model = new_model(name).bfloat16()
    errors = []
    for implementation in ("onepeace_fast", "eager"):
        out, gradients = run(model, implementation, weigh, **inputs)
        assert out.dtype == torch.bfloat16 and all(x.isfinite().all() for x in gradients.values())
        errors.append((out.double() - want).norm())
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel"])
def test_checkpointed_layers_have_the_same_gradients(name, reentrant):
    model = new_model(name).train()
    inputs = {"weigh": MASK, "attention_mask": MASK}

    def gradients(implementation):
        embedded = torch.nn.Parameter(model.shared(ids()).detach())
        return run(model, implementation, inputs_embeds=embedded, **inputs)

    want = gradients("eager")
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients("onepeace_fast")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_compiled_model_computes_the_same():
    model = new_model("T5EncoderModel").eval()
    model.set_attn_implementation("onepeace_fast")
    want = model(ids(), attention_mask=MASK)[0]
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(ids(), attention_mask=MASK)[0], want)


def test_a_batch_has_one_plan_and_one_read_of_lengths_for_all_layers(monkeypatch):
    reads, checks = [], []
    read, check = transformers_attention.RoutePlan.from_masks, transformers_attention.is_relative
    monkeypatch.setattr(transformers_attention.RoutePlan, "from_masks", lambda x: reads.append(1) or read(x))
    monkeypatch.setattr(transformers_attention, "is_relative", lambda *x: checks.append(1) or check(*x))
    mask = MASK.clone()
    for name, biases in (("T5EncoderModel", 1), ("UMT5EncoderModel", 3)):
        reads.clear(), checks.clear()
        model = new_model(name)
        run(model, "onepeace_fast", input_ids=ids(), attention_mask=mask)
        assert len(reads) == 1 and len(checks) == biases
        run(model, "onepeace_fast", input_ids=ids(), attention_mask=mask)
        assert len(reads) == 2 and len(checks) == 2 * biases


def test_a_mask_that_its_owner_changes_is_read_again():
    model, mask = new_model("T5EncoderModel").eval(), MASK.clone()
    model.set_attn_implementation("onepeace_fast")
    model(ids(), attention_mask=mask)
    mask[0, 5:] = True
    want = run(model, "eager", input_ids=ids(), attention_mask=mask, weigh=mask)
    torch.testing.assert_close(run(model, "onepeace_fast", input_ids=ids(), attention_mask=mask, weigh=mask), want)


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_an_encoder_alone_takes_it_and_a_decoder_says_that_it_does_not(kind):
    model = new_model(f"{kind}ForConditionalGeneration").eval()
    inputs = {"input_ids": ids(), "attention_mask": MASK, "decoder_input_ids": ids()[:, :4]}
    want, tokens = model(**inputs).logits, model.generate(ids(), attention_mask=MASK, max_new_tokens=4)
    model.encoder.set_attn_implementation("onepeace_fast")
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.generate(ids(), attention_mask=MASK, max_new_tokens=4), tokens)
    model.set_attn_implementation("onepeace_fast")
    with pytest.raises(ValueError, match="expected self-attention of an encoder, got a decoder's or another mask"):
        model(**inputs)
    with pytest.raises(ValueError, match="expected self-attention of an encoder, got a decoder's or"):
        model.decoder(input_ids=ids(), encoder_hidden_states=torch.zeros(3, 12, 16, dtype=torch.float64))


def test_what_it_does_not_serve_is_refused_in_one_line():
    model = new_model("T5EncoderModel")
    model.set_attn_implementation("onepeace_fast")
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(ids(), output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask: expected one of tokens"):
        model(ids(), attention_mask=torch.zeros(3, 1, 1, 12))
    model = new_model("T5EncoderModel", dropout_rate=0.1)
    model.set_attn_implementation("onepeace_fast")
    with pytest.raises(ValueError, match=r"dropout: expected 0, got 0\.1"):
        model.train()(ids())
    model.eval()(ids())
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(**small, attn_implementation="onepeace_fast"))
    vit = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, attn_implementation="onepeace_fast"))
    for model, given in ((bert, ids()), (vit, images(32, 32, dtype=torch.float32))):
        with pytest.raises(ValueError, match="expected a model of t5, mt5, umt5, swin, beit, got"):
            model(given)
