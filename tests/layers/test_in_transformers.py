"""``RelativeBias`` in Hugging Face's T5, Swin and BEiT with random weights: equal in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

from onepeace_fast import RelativeBias, relative_bias_attention, shifted_windows

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


def assert_same(bias, got, want, table):
    """Two biases of all pairs: the same values, and the same gradient in their tables."""
    assert torch.equal(got, want)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(bias.table.grad, table.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("buckets, distance, length", [(32, 128, 300), (16, 24, 50)])
def test_t5(is_decoder, buckets, distance, length):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=32, d_kv=8, num_heads=4, relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance, is_decoder=is_decoder,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    bias = RelativeBias.t5(4, buckets, distance, bidirectional=not is_decoder).double()
    state = {name: value for name, value in theirs.state_dict().items() if name.startswith("relative")}
    bias.load_state_dict(state)
    want = theirs.compute_bias(length, length)[0]
    assert_same(bias, bias.dense(length), want, theirs.relative_attention_bias.weight)


def test_t5_s_attention():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, dropout_rate=0.0)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    bias = RelativeBias.t5(4).double()
    bias.load_state_dict({"relative_attention_bias.weight": theirs.relative_attention_bias.weight})
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    mask = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    want = theirs(x, mask=mask)[0]
    qkv = torch.stack([part(x[0]).view(40, 4, 8) for part in (theirs.q, theirs.k, theirs.v)], 1)
    codes = bias.codes(40)
    out = relative_bias_attention(
        qkv, cu_seqlens=torch.tensor([[0, 40]], dtype=torch.int32), modality=torch.zeros_like(codes), code=codes,
        is_cls=bias.is_cls(40), bias=[bias.vector(40)], code_offsets=[bias.code_offset(40)], scale=1.0,
    )  # fmt: skip
    got = theirs.o(out.flatten(1))[None]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # their softmax is float32
    weight = torch.randn_like(want)
    table = theirs.relative_attention_bias.weight
    (wanted,) = torch.autograd.grad((want * weight).sum(), table)
    (gradient,) = torch.autograd.grad((got * weight).sum(), bias.table)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [(4, 4), (4, 6)])
def test_beit(window):
    from transformers import BeitConfig
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    config = BeitConfig(image_size=[16 * side for side in window], patch_size=16, num_attention_heads=3)
    theirs = BeitRelativePositionBias(config).double()
    table = theirs.relative_position_bias_table
    torch.nn.init.normal_(table)
    bias = RelativeBias.beit(window, 3).double()
    bias.load_state_dict(theirs.state_dict())
    # Their resampling mixes a table that is not square, even where its size stays. Their index is BEiT's own.
    square = window[0] == window[1]
    want = theirs(window)[0] if square else table[theirs.generate_relative_position_index(window)].permute(2, 0, 1)
    assert_same(bias, bias.dense(), want, table)


@pytest.mark.parametrize("window", [(7, 7), (3, 5)])
def test_swin(window):
    from transformers.models.swin.modeling_swin import SwinRelativePositionBias

    theirs = SwinRelativePositionBias(3, window).double()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    bias = RelativeBias.swin(window, 3).double()
    bias.load_state_dict(theirs.state_dict())
    assert_same(bias, bias.dense(), theirs()[0], theirs.relative_position_bias_table)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_swin_s_layer_attends_to_the_segments_of_its_shifted_windows(shift):
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    torch.manual_seed(0)
    size, window, heads, images = (8, 12), 4, 2, 2
    config = SwinConfig(window_size=window, attn_implementation="eager")
    theirs = SwinLayer(config, 16, size, heads, shift_size=shift).double().eval()
    attention = theirs.attention
    table = attention.relative_position_bias.relative_position_bias_table
    torch.nn.init.normal_(table)
    bias = RelativeBias.swin(window, heads).double()
    bias.load_state_dict(attention.relative_position_bias.state_dict())
    x = torch.randn(images, size[0] * size[1], 16, dtype=torch.float64)

    want = theirs(x, size)[0]
    windows = shifted_windows(size, window, shift, images=images)
    rows = F.embedding(windows.order, theirs.layernorm_before(x).flatten(0, 1))
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    nothing = torch.zeros_like(windows.codes)
    out = relative_bias_attention(
        torch.stack([part(rows).unflatten(1, (heads, 8)) for part in projections], 1), cu_seqlens=windows.cu_seqlens,
        modality=nothing, code=windows.codes, is_cls=nothing.bool(), bias=[bias.vector()],
        code_offsets=[bias.code_offset()],
    )  # fmt: skip
    y = x + F.embedding(windows.order.argsort(), attention.o_proj(out.flatten(1))).view_as(x)
    got = theirs.mlp(theirs.layernorm_after(y)) + y
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # their softmax is float32
    weight = torch.randn_like(want)
    (wanted,) = torch.autograd.grad((want * weight).sum(), table)
    (gradient,) = torch.autograd.grad((got * weight).sum(), bias.table)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
