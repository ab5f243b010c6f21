"""What a fresh model starts with: upstream's initial values, temperatures, and positions of images of another size."""

import math

import numpy
import pytest
import torch
from models._small import small_config, small_model
from torch import nn

from onepeace_fast import OnePeacePretrain
from onepeace_fast.models import losses


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    parts = {"layer_scale": 0.25, "head_scale": True, "attention_layer_norm": True}
    return OnePeacePretrain(small_config(**parts, embed_dim=96, attention_heads=3))


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
    assert len(single) == 9 and all(p.any() for p in single) and truncated(torch.cat(single))


def test_biases_norms_tables_and_scales_start_where_upstream_s_do(fresh):
    for name, module in fresh.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-5, name
        if isinstance(module, nn.Linear):
            assert module.weight.any() and (module.bias is None or not module.bias.any()), name
        if "rel_pos_table_list." in name:
            assert not module.weight.any(), name
    norms = [m for m in fresh.encoder_wrapper.fusion_model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * (4 + 3) + 3
    convolutions = [m for m in fresh.encoder_wrapper.image_adapter.embed_images if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 3 and not any(module.bias.any() for module in convolutions)
    for layer in fresh.encoder_wrapper.fusion_model.layers:
        assert (layer.gamma_1 == 0.25).all() and (layer.gamma_2 == 0.25).all() and layer.gamma_1 is not layer.gamma_2
        assert (layer.self_attn.c_attn == 1).all()
        assert layer.self_attn.k_proj.bias is None and layer.self_attn.q_proj.bias is not None
    assert all(layer.gamma_1 is None for layer in fresh.decoder_wrapper.fusion_model.layers)


def test_audio_s_extractor_starts_as_kaiming_s_normal(fresh):
    weight = fresh.encoder_wrapper.audio_adapter.embed_audios[0].conv_layers[1][0].weight.detach()  # [8, 8, 3]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 24), rel=0.2)


def test_temperatures_are_the_papers():
    assert losses.MASK_LOGIT_SCALE == 2.5
    model = small_model("fused")
    assert model.logit_scale_exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    model.logit_scale.data.fill_(99.0)
    assert model.logit_scale_exp().item() == pytest.approx(100)
    model.reset_logit_scale()
    assert model.logit_scale_exp().item() == pytest.approx(1 / 0.07)


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
