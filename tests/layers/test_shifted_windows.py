"""Attention over the segments of shifted windows is Swin's masked attention over the whole image."""

import pytest
import torch
import torch.nn.functional as F
from layers import _formulas as formulas

from onepeace_fast import RelativeBias, relative_bias_attention, shifted_windows

SHAPES = {
    "not shifted": ((4, 6), (2, 3), (0, 0)),
    "shifted": ((4, 6), (2, 3), (1, 1)),
    "shifted unequally": ((6, 6), (3, 3), (1, 2)),
    "one window": ((4, 4), (4, 4), (2, 2)),
    "one axis": ((4, 4), (2, 4), (1, 0)),
    "video": ((4, 2, 4), (2, 2, 2), (1, 0, 1)),
}


def segments_of(windows) -> torch.Tensor:
    """The segment of each token, in the image's order."""
    lengths = torch.tensor(windows.lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return segment[windows.order.argsort()]


@pytest.mark.parametrize("name", SHAPES)
def test_two_tokens_share_a_segment_exactly_where_the_mask_lets_them_attend(name):
    size, window, shift = SHAPES[name]
    windows = shifted_windows(size, window, shift)
    tokens = torch.Size(size).numel()
    assert windows.order.dtype == torch.int64 and windows.order.sort().values.tolist() == list(range(tokens))
    assert windows.codes.dtype == windows.cu_seqlens.dtype == torch.int32
    assert windows.cu_seqlens[0].diff().tolist() == list(windows.lengths) and 0 not in windows.lengths
    segment = segments_of(windows)
    assert torch.equal(segment[:, None] == segment, formulas.shifted_window_pairs(size, window, shift))


@pytest.mark.parametrize("name", SHAPES)
def test_attention_over_the_segments_is_masked_attention_over_the_image(name):
    size, window, shift = SHAPES[name]
    heads, images, tokens = 2, 2, torch.Size(size).numel()
    torch.manual_seed(0)
    bias = (RelativeBias.swin if len(size) == 2 else RelativeBias.video_swin)(window, heads).double()
    torch.nn.init.normal_(bias.table)
    qkv = torch.randn(images * tokens, 3, heads, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(images * tokens, heads, 8, dtype=torch.float64)

    windows = shifted_windows(size, window, shift, images=images)
    nothing = torch.zeros_like(windows.codes)
    packed = relative_bias_attention(
        F.embedding(windows.order, qkv.flatten(1)).view_as(qkv), cu_seqlens=windows.cu_seqlens, modality=nothing,
        code=windows.codes, is_cls=nothing.bool(), bias=[bias.vector()], code_offsets=[bias.code_offset()],
        max_length=max(windows.lengths),
    )  # fmt: skip
    got = F.embedding(windows.order.argsort(), packed.flatten(1)).view_as(weight)
    (got * weight).sum().backward()

    table, plain = (x.detach().clone().requires_grad_() for x in (bias.table, qkv))
    dense = formulas.shifted_window_bias(size, window, shift, table)
    want = torch.cat([formulas.attention(*x.unbind(1), dense, 8**-0.5) for x in plain.split(tokens)])
    (want * weight).sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(qkv.grad, plain.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(bias.table.grad, table.grad, rtol=1e-11, atol=1e-12)


def test_an_int_stands_for_all_axes_and_the_device_is_obeyed():
    numbers = shifted_windows((8, 4), 4, 2)
    sides = shifted_windows([8, 4], [4, 4], [2, 2])
    assert all(map(torch.equal, numbers[:3], sides[:3])) and numbers.lengths == sides.lengths
    assert all(x.device.type == "meta" for x in shifted_windows((4, 4), 2, device="meta")[:3])


@pytest.mark.parametrize(
    "arguments, line",
    [
        (((4, 6), (2, 4)), "size: expected multiples of the window [2, 4], got [4, 6]; pad the tokens first"),
        (((0, 4), 4), "size: expected multiples of the window [4, 4], got [0, 4]; pad the tokens first"),
        (((4, 4), 0), "window: expected positive sides, got [0, 0]"),
        (((4, 4), (2, 2, 2)), "window: expected a whole number, or one for each of 2 axes, got (2, 2, 2)"),
        (((4, 4), 4.0), "window: expected a whole number, or one for each of 2 axes, got 4.0"),
        (((4, 4), (4, 2.0)), "window: expected a whole number, or one for each of 2 axes, got (4, 2.0)"),
        (((4, 4), 2, (1, 2)), "shift: expected from 0 to less than the window [2, 2], got [1, 2]"),
        (((4, 4), 2, -1), "shift: expected from 0 to less than the window [2, 2], got [-1, -1]"),
        (((4, 4), 2, (1,)), "shift: expected a whole number, or one for each of 2 axes, got (1,)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, line):
    with pytest.raises(ValueError) as error:
        shifted_windows(*arguments)
    assert str(error.value) == line
