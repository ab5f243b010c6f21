"""Audio's convolutions against their formulas, on values so small that epsilon counts."""

import math

import pytest
import torch

from onepeace_fast.layers.adapters.audio import FeatureExtractor, PositionConvolutions


def normalised(x):
    """LayerNorm of the last dimension with epsilon 1e-5, then GELU."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))


def convolved(x, weight, bias, stride, padding, groups):
    """A convolution of [frames, channels] by its definition."""
    wide, width = weight.shape[0] // groups, weight.shape[2]
    x = torch.cat([x.new_zeros(padding, x.shape[1]), x, x.new_zeros(padding, x.shape[1])])
    frames = (x.shape[0] - width) // stride + 1
    out = torch.zeros(frames, weight.shape[0], dtype=x.dtype)
    for frame in range(frames):
        window = x[frame * stride : frame * stride + width]
        for channel in range(weight.shape[0]):
            first = channel // wide * weight.shape[1]
            out[frame, channel] = (window[:, first : first + weight.shape[1]] * weight[channel].t()).sum()
    return out + (0 if bias is None else bias)


@pytest.mark.parametrize("loudness", [1.0, 1e-3])
@pytest.mark.parametrize(("width", "kernel"), [(10, 5), (8, 4)])
def test_positions_are_grouped_convolutions_each_normalised_and_cut_to_the_frames(loudness, width, kernel):
    torch.manual_seed(0)
    positions = PositionConvolutions(8, layers=2, width=width, groups=4).double()
    for parameter in positions.parameters():
        parameter.data *= loudness
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    expected = x[0]
    for layer in ("1", "2"):
        convolution = positions.get_submodule(layer)[0]
        assert convolution.weight.shape == (8, 2, kernel)
        expected = convolved(expected, convolution.weight, convolution.bias, 1, kernel // 2, 4)[:6]
        expected = normalised(expected)
    torch.testing.assert_close(positions(x)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loudness", [1.0, 1e-3])
def test_features_are_strided_convolutions_each_normalised(loudness):
    torch.manual_seed(0)
    extractor = FeatureExtractor(((6, 5, 3), (4, 3, 2))).double()
    x = loudness * torch.randn(1, 40, dtype=torch.float64)
    expected = x[0, :, None]
    for (convolution, *_), stride in zip(extractor.conv_layers, (3, 2), strict=True):
        convolution.weight.data *= loudness
        expected = normalised(convolved(expected, convolution.weight, None, stride, 0, 1))
    torch.testing.assert_close(extractor(x)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("layers", "width", "kernel"), [(5, 95, 19), (2, 10, 5), (5, 10, 3), (1, 2, 3)])
def test_the_width_of_positions_is_shared_out_to_layers_of_three_frames_at_least(layers, width, kernel):
    positions = PositionConvolutions(8, layers, width, groups=4)
    weights = [parameter for parameter in positions.parameters() if parameter.dim() == 3]
    assert [weight.shape for weight in weights] == [(8, 2, kernel)] * layers
