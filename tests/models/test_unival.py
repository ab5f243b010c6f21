"""UnIVAL over packed rows: mixed batches, the padded reference, state dicts, losses."""

import pytest
import torch
from models._small import BACKENDS
from models._unival import SAMPLES, SOURCE, TARGET, VOCABULARY, maps, refusal, unival, unival_config

from onepeace_fast.models.unival import Unival, UnivalConfig
from onepeace_fast.models.unival.losses import token_loss
from onepeace_fast.models.unival.state import TABLE, TIED, buffer

CODE = [False, True, False, True]
PREVIOUS = torch.cat([torch.zeros(4, 1, dtype=torch.int64), TARGET[:, :-1]], 1).masked_fill(TARGET == 1, 1)
ALONE = {0: ("video", 0), 1: ("audio", 1), 2: ("image", 0), 3: ("audio", 0)}


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("code", [None, CODE], ids=["texts", "codes"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_of_a_mixed_batch_is_what_it_is_in_a_batch_of_its_own(backend, code):
    model, given = unival(backend), maps()
    mixed = model.logits(SOURCE, PREVIOUS, code=code, samples=SAMPLES, **given)
    for sample, (name, row) in ALONE.items():
        own = None if code is None else [code[sample]]
        rows = slice(sample, sample + 1)
        alone = model.logits(SOURCE[rows], PREVIOUS[rows], code=own, **{name: given[name][row : row + 1]})
        real = PREVIOUS[sample] != 1
        torch.testing.assert_close(mixed[sample][real], alone[0][real], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("code", [None, CODE], ids=["texts", "codes"])
def test_packed_rows_give_the_values_and_gradients_of_padded_ones(code):
    found = []
    for backend in BACKENDS:
        model, given = unival(backend), {name: x.requires_grad_() for name, x in maps().items()}
        loss = model.loss(SOURCE, TARGET, code=code, samples=SAMPLES, smoothing=0.1, encouraging=True, **given)
        found.append({"loss": loss, **gradients(model, loss), **{name: x.grad for name, x in given.items()}})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_a_sample_with_an_image_and_a_video_has_both_before_its_text():
    model, given = unival("reference"), maps()
    both = {"image": given["image"], "video": given["video"]}
    reference = model.encode(SOURCE[:1], **both)
    model.backend = "fused"
    packed = model.encode(SOURCE[:1], **both)
    assert [*packed] == ["image", "video", "text"]
    for name, x in packed.items():
        torch.testing.assert_close(x, reference[name], rtol=1e-10, atol=1e-12)
    alone = model.encode(SOURCE[:1], image=given["image"])
    assert not torch.allclose(packed["text"], alone["text"], rtol=1e-3)


def test_no_padding_is_computed():
    model, rows = unival("fused"), set()
    for name, module in model.named_modules():
        if name.endswith(("fc1", "q_proj")) and ".encoder_attn" not in name:
            module.register_forward_hook(lambda module, given, output, name=name: rows.add((name[:7], len(output))))
    model.loss(SOURCE, TARGET, samples=SAMPLES, **maps())
    tokens = int((SOURCE != 1).sum()) + 6 + 12 + 2 * 5
    assert rows == {("encoder", tokens), ("decoder", int((TARGET != 1).sum()))}


def test_what_a_batch_does_not_read_gets_a_gradient_of_zeros():
    model = unival()
    found = gradients(model, model.loss(SOURCE, TARGET))
    zero = {name for name, gradient in found.items() if gradient is not None and not gradient.any()}
    assert {"encoder.video_proj.weight", "encoder.embed_audio_positions.weight", "encoder.image_proj.bias"} <= zero
    assert {"decoder.code_layernorm_embedding.weight", "decoder.image_rel_pos_table_list.1.weight"} <= zero
    assert all(("image" in name or "video" in name or "audio" in name or "code" in name or "patch" in name)
               for name in zero)  # fmt: skip
    found = gradients(model, model.loss(SOURCE, TARGET, code=[True] * 4))
    assert not found["decoder.layernorm_embedding.weight"].any()
    assert found["decoder.code_layernorm_embedding.weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_are_the_tokens_of_the_map_that_they_name_in_their_order(backend):
    model, given = unival(backend), maps()
    whole = model.encode(SOURCE[:1], video=given["video"])
    order = torch.tensor([[7, 3, 0, 11, 2, 9, 1, 10, 4, 5, 8, 6]])
    drawn = model.encode(SOURCE[:1], video=given["video"], patches={"video": order})
    torch.testing.assert_close(drawn["text"], whole["text"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(drawn["video"], whole["video"][:, order[0]], rtol=1e-10, atol=1e-12)
    fewer = model.encode(SOURCE[:1], video=given["video"], patches={"video": order[:, :4]})
    assert fewer["video"].shape == (1, 4, 16)


def test_where_a_text_is_padded_to_does_not_matter():
    model = unival()
    wide = torch.nn.functional.pad(SOURCE, (0, 4), value=1)
    expected, found = model.encode(SOURCE)["text"], model.encode(wide)["text"]
    torch.testing.assert_close(found[:, :5], expected, rtol=1e-10, atol=1e-12)
    assert not found[:, 5:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_and_changes_little(backend):
    model, given = unival(backend, torch.float32), maps(torch.float32)
    exact = model.logits(SOURCE, PREVIOUS, code=CODE, samples=SAMPLES, **given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.logits(SOURCE, PREVIOUS, code=CODE, samples=SAMPLES, **given)
        loss = model.loss(SOURCE, TARGET, code=CODE, samples=SAMPLES, **given)
    assert 1e-5 < ((rounded.float() - exact).abs().max() / exact.abs().max()).item() < 0.05
    assert rounded.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def test_upstream_s_state_dict_goes_both_ways():
    model, other = unival(), unival("reference")
    state = model.to_upstream_state_dict()
    assert all(torch.equal(state[name], state[TABLE]) for name in TIED)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    buffers = [f"{stack}.{kind}" for stack in ("encoder", "decoder") for kind in ("version", "token_rp_bucket")]
    buffers += ["encoder.image_rp_bucket", "decoder.image_rp_bucket", "decoder.image_position_idx"]
    other.load_upstream_state_dict({**state, **{name: buffer(model.config, name) for name in buffers}})
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert set(state) == {*other.state_dict(), *TIED}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (TIED[0], torch.ones(VOCABULARY, 16), "decoder.embed_tokens.weight differs from encoder.embed_tokens.weight"),
        ("encoder.version", torch.tensor([2.0]), "encoder.version differs from the one that follows"),
        ("encoder.image_position_idx", torch.zeros(3), "encoder.image_position_idx differs from the one that follows"),
        ("decoder.image_rp_bucket", torch.zeros(17, 17), "decoder.image_rp_bucket differs from the one that follows"),
        ("encoder.more.weight", torch.zeros(3), "unexpected: encoder.more.weight"),
        ("encoder.pos_ln.weight", torch.zeros(3), "encoder.pos_ln.weight [3] instead of [16]"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(name, value, says):
    model = unival()
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    state = {key: torch.zeros_like(tensor) for key, tensor in model.to_upstream_state_dict().items()}
    line = refusal(lambda: model.load_upstream_state_dict({**state, name: value}))
    assert line.startswith("state_dict: expected ") and says in line and "\n" not in line
    assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())


def test_the_encouraging_loss_is_the_cross_entropy_where_probabilities_are_small():
    logits = torch.randn(6, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.arange(6)
    plain, bonus = (token_loss(logits, target, 0.1, encouraging) for encouraging in (False, True))
    assert 0 < plain - bonus < 1e-2
    sure = torch.zeros(1, 3, dtype=torch.float64)
    sure[0, 1] = 12.0
    x = sure.requires_grad_()
    token_loss(x, torch.tensor([1]), encouraging=True).backward()
    # The slope of the tangent, -4, beside that of the cross-entropy, -1, by dp = p (1 - p).
    p = sure.detach().softmax(1)[0, 1]
    assert x.grad[0, 1] == pytest.approx(float(-(1 - p) - 4 * p * (1 - p)), rel=1e-9)


def test_parameters_start_as_upstream_s():
    torch.manual_seed(0)
    model = Unival(unival_config(embed_dim=64, ffn_dim=96))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            wanted = 1.0 if name.endswith("weight") or name.endswith("c_attn") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, wanted)), name
        elif parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
    assert not model.encoder.embed_tokens.weight[1].any()


def test_the_defaults_are_upstream_s_base_model():
    args = {"encoder_embed_dim": 768, "decoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072,
            "decoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
            "video_encoder_name": "all_resnext101", "audio_encoder_name": "pann_cnn14"}  # fmt: skip
    flags = ("encoder_normalize_before", "decoder_normalize_before", "share_decoder_input_output_embed",
             "share_all_embeddings", "layernorm_embedding", "patch_layernorm_embedding", "code_layernorm_embedding",
             "add_type_embedding", "scale_attn", "scale_fc", "scale_heads", "disable_entangle",
             "no_scale_embedding")  # fmt: skip
    args |= dict.fromkeys(flags, True)
    assert UnivalConfig.from_upstream(args, 59457) == UnivalConfig(vocab_size=59457)
    assert UnivalConfig.from_upstream({**args, "audio_encoder_name": None}, 9).modalities == ("image", "video")
