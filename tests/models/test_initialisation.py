"""What follows from a configuration: initial values, DropPath's rates, dropout's seeds, a softmax's precision."""

import math

import numpy
import pytest
import torch
from models._small import BACKENDS, batch_of, small_config, small_model
from torch import nn

from onepeace_fast import OnePeacePretrain
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers.reference import attend
from onepeace_fast.layers.transformer import SelfAttention, Transformer
from onepeace_fast.models import losses, stack


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return OnePeacePretrain(small_config(layer_scale=0.25, head_scale=True, embed_dim=96, attention_heads=3))


def truncated(value):
    """Whether a tensor looks like a normal of deviation 0.02 cut at one deviation, whose own deviation is 0.0108."""
    value = value.detach()
    assert 0.0195 < value.abs().max() <= 0.02
    assert value.std().item() == pytest.approx(0.0108, rel=0.06)
    assert abs(value.mean()) < 0.001
    return True


def test_the_row_of_padding_is_zero_and_all_others_are_drawn(fresh):
    table = fresh.encoder_wrapper.text_adapter.embed_tokens.weight
    assert not table[1].any()
    others = torch.cat([table[:1], table[2:]])
    assert others.any(dim=1).all() and truncated(others)


def test_linear_layers_positions_and_mask_tokens_are_truncated_normal(fresh):
    encoder = fresh.encoder_wrapper
    assert truncated(torch.cat([m.weight.flatten() for m in fresh.modules() if isinstance(m, nn.Linear)]))
    assert truncated(encoder.text_adapter.embed_positions.weight)
    assert truncated(fresh.decoder_wrapper.audio_adapter.embed_positions.weight)
    assert truncated(encoder.image_adapter.pos_embed)
    single = [p.flatten() for name, p in fresh.named_parameters() if name.endswith(("cls_embedding", "_mask_token"))]
    assert len(single) == 9 and truncated(torch.cat(single))


def test_biases_norms_tables_and_scales_start_where_upstream_s_do(fresh):
    for name, module in fresh.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-5, name
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any(), name
        if "rel_pos_table_list." in name:
            assert not module.weight.any(), name
    convolutions = [m for m in fresh.encoder_wrapper.image_adapter.embed_images if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 3 and not any(module.bias.any() for module in convolutions)
    for layer in fresh.encoder_wrapper.fusion_model.layers:
        assert (layer.gamma_1 == 0.25).all() and (layer.gamma_2 == 0.25).all()
        assert (layer.self_attn.c_attn == 1).all()
        assert layer.self_attn.k_proj.bias is None and layer.self_attn.q_proj.bias is not None
    assert all(layer.gamma_1 is None for layer in fresh.decoder_wrapper.fusion_model.layers)


def test_audio_s_extractor_starts_as_kaiming_s_normal(fresh):
    weight = fresh.encoder_wrapper.audio_adapter.embed_audios[0].conv_layers[1][0].weight.detach()  # [8, 8, 3]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 24), rel=0.2)


def test_temperatures_are_the_papers():
    assert losses.MASK_LOGIT_SCALE == 2.5
    model = small_model("fused")
    model.logit_scale.data.fill_(99.0)
    assert model.logit_scale_exp().item() == pytest.approx(100)
    model.reset_logit_scale()
    assert model.logit_scale_exp().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    ("layers", "rates"), [(1, [0.0]), (2, [0.0, 0.4]), (3, [0.0, 0.2, 0.4]), (5, [0.0, 0.1, 0.2, 0.3, 0.4])]
)
def test_drop_path_grows_in_a_line_from_zero_to_the_configured_rate_at_the_last_layer(layers, rates):
    config = TransformerConfig(embed_dim=8, ffn_embed_dim=8, attention_heads=1, layers=layers, drop_path_rate=0.4)
    assert Transformer(config).drop_path_rates == pytest.approx(rates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pass_draws_by_its_own_stack_s_rates_in_training_alone(backend, monkeypatch):
    asked, draw = [], stack.draw_drop_path
    monkeypatch.setattr(
        stack, "draw_drop_path", lambda rates, samples: asked.append((list(rates), samples)) or draw(rates, samples)
    )
    model = small_model(backend, small_config(decoder={"drop_path_rate": 0.2, "layers": 2}, drop_path_rate=0.4))
    batch = batch_of(text=[5, 4, 3])
    masks = {"text": torch.tensor([[False, True, False, False, False, False]] * 3)}
    model.reconstruct(**batch, masks=masks)
    assert asked == []
    model.train().reconstruct(**batch, masks=masks)
    assert asked == [(pytest.approx([0.0, 0.4]), 3), (pytest.approx([0.0, 0.2]), 3)]


def test_dropout_s_seeds_all_differ_and_are_new_at_every_step():
    transformer = Transformer(
        TransformerConfig(embed_dim=8, ffn_embed_dim=8, attention_heads=1, layers=6, dropout=0.1)
    ).train()
    torch.manual_seed(0)
    seeds = torch.cat([transformer.draw_seeds(torch.device("cpu")) for _ in range(3)])
    assert seeds.shape == (18, 2) and seeds.dtype == torch.int64
    assert len(set(seeds.flatten().tolist())) == 36
    assert transformer.eval().draw_seeds(torch.device("cpu")) is None
    plain = Transformer(TransformerConfig(embed_dim=8, ffn_embed_dim=8, attention_heads=1, layers=6)).train()
    assert plain.draw_seeds(torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_s_softmax_is_float32_s_in_a_model_of_half_precision(dtype):
    config = TransformerConfig(embed_dim=32, ffn_embed_dim=8, attention_heads=2, layers=1, sub_layer_norm=False)
    torch.manual_seed(0)
    attention = SelfAttention(config).to(dtype)
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.normal_(projection.weight)
    nn.init.eye_(attention.v_proj.weight)
    nn.init.eye_(attention.out_proj.weight)
    nn.init.zeros_(attention.out_proj.bias)
    x = torch.randn(200, 1, 32).to(dtype)
    projected = [p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    heads = [each.view(200, 2, 16).transpose(0, 1) for each in projected]
    weights = torch.bmm(heads[0] * 16**-0.5, heads[1].transpose(1, 2)).double().softmax(-1).to(dtype)
    expected = torch.bmm(weights, heads[2]).transpose(0, 1).reshape(200, 1, 32)
    got = attend(*projected, 2, None, None)
    assert (got == expected).double().mean() > 0.97


def test_an_image_of_another_size_has_bicubically_resampled_positions():
    adapter = small_model("fused", dtype=torch.float32).encoder_wrapper.image_adapter
    own, grid = adapter.pos_embed.detach()[1:].view(3, 3, -1).double(), 4

    def cubic(x):
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = torch.zeros(grid, 3, dtype=torch.float64)
    for place in range(grid):
        centre = (place + 0.5) * 3 / grid - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[place, min(max(tap, 0), 2)] += cubic(centre - tap)
    expected = torch.einsum("yi,xj,ijd->yxd", matrix, matrix, own).reshape(grid * grid, -1)
    table = adapter.position_table(grid * grid + 1).detach().double()
    torch.testing.assert_close(table[1:], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(table[0], adapter.pos_embed[0].detach().double())
    assert numpy.isfinite(table.numpy()).all()
