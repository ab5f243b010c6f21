"""What an image becomes for the model: a square crop, resampled and normalised."""

import numpy
import pytest
import torch

pytest.importorskip("PIL")

from data._images import RED, colours
from data._refused import refused
from PIL import Image

from onepeace_fast.data import image as module
from onepeace_fast.data.image import DEVIATION, MEAN, prepare_image


def gradient(width, height):
    """Red grows with x and green with y, both in 256 steps, so that a crop can be read off the corners."""
    x = numpy.broadcast_to(numpy.linspace(0, 255, width), (height, width))
    y = numpy.broadcast_to(numpy.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(numpy.stack([x, y, 0 * x], 2).round().astype("uint8"))


def spans(prepared):
    """Left, right, top and bottom of a gradient's crop, as shares of the whole image."""
    pixels = prepared * torch.tensor(DEVIATION).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    side = pixels.shape[-1]
    along_x, along_y = pixels[0].mean(0), pixels[1].mean(1)
    result = []
    for line in (along_x, along_y):
        inner = slice(side // 4, side - side // 4)  # away from the edges, where resampling sees less
        step = (line[inner][-1] - line[inner][0]) / (side - 2 * (side // 4) - 1)
        start = line[inner][0] - step * (side // 4 + 0.5)
        result += [start.item(), (start + step * side).item()]
    return result


@pytest.mark.parametrize(("size", "expected"), [((120, 80), (1 / 6, 5 / 6, 0, 1)), ((80, 160), (0, 1, 1 / 4, 3 / 4))])
def test_without_a_generator_the_centre_is_cropped_as_wide_as_the_shorter_side(size, expected):
    prepared = prepare_image(gradient(*size), 32)
    assert prepared.dtype == torch.float32
    assert prepared.shape == (3, 32, 32)
    assert spans(prepared) == pytest.approx(expected, abs=0.012)


def test_colours_are_normalised_with_clips_statistics():
    prepared = prepare_image(Image.new("RGB", (20, 20), RED), 8)
    expected = (torch.tensor(RED) / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(prepared, expected.view(3, 1, 1).expand(3, 8, 8))
    assert MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert DEVIATION == (0.26862954, 0.26130258, 0.27577711)


def test_an_image_of_the_right_size_is_not_resampled():
    prepared = prepare_image(colours().crop((0, 0, 16, 16)), 16)
    pixels = prepared * torch.tensor(DEVIATION).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    expected = torch.from_numpy(numpy.array(colours().crop((0, 0, 16, 16)))).permute(2, 0, 1) / 255
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "largest", "ratios"), [((300, 240), 1.0, (3 / 4, 4 / 3)), ((180, 320), 3 / 4, (3 / 4, 9 / 8))]
)
def test_random_crops_take_half_of_the_area_or_more_anywhere_and_are_never_mirrored(size, largest, ratios):
    image, boxes = gradient(*size), []
    for seed in range(200):
        left, right, top, bottom = spans(prepare_image(image, 32, generator=torch.Generator().manual_seed(seed)))
        assert -0.02 < left < right < 1.02
        assert -0.02 < top < bottom < 1.02
        boxes.append((left, right, top, bottom))
    left, right, top, bottom = torch.tensor(boxes).unbind(1)
    area = (right - left) * (bottom - top)
    ratio = (right - left) * size[0] / ((bottom - top) * size[1])
    assert area.min() == pytest.approx(0.5, abs=0.04)
    assert area.max() == pytest.approx(largest, abs=0.06)
    assert (ratio.min(), ratio.max()) == pytest.approx(ratios, abs=0.05)
    assert max(left.max(), top.max()) > 0.2
    assert min(right.min(), bottom.min()) < 0.8


@pytest.mark.parametrize("size", [(400, 10), (10, 400), (1, 1), (2, 1), (1, 5000)])
def test_a_long_or_tiny_image_is_cropped_inside_itself_and_not_squashed(size):
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        left, top, right, bottom = module._random_box(*size, generator)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert 0.74 < (right - left) / (bottom - top) < 1.34
        prepared = prepare_image(Image.new("RGB", size, RED), 8, generator=generator)
        assert prepared.std(dim=(1, 2)).max() < 1e-6
    assert prepare_image(Image.new("RGB", size), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("side", [0, -16, 16.0, None])
def test_a_side_that_is_no_number_of_pixels_is_refused(side):
    refused(lambda: prepare_image(colours(), side), "side: expected a positive number of pixels, got ", repr(side))


@pytest.mark.parametrize("image", [Image.new("L", (4, 4)), "image.png"])
def test_what_is_not_an_rgb_image_is_refused(image):
    refused(lambda: prepare_image(image, 16), "image: expected an RGB Pillow image, got ")


def bicubic(values, size, start, stop):
    """The first axis resampled as Pillow's filter is defined: Keys' cubic with a = -1/2, widened where it shrinks."""
    scale = (stop - start) / size
    stretch, result = max(scale, 1.0), []
    for place in range(size):
        centre = start + (place + 0.5) * scale
        taps = numpy.arange(max(round(centre - 2 * stretch), 0), min(round(centre + 2 * stretch), len(values)))
        x = abs((taps + 0.5 - centre) / stretch)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = numpy.where(x < 1, near, numpy.where(x < 2, far, 0))
        result.append(numpy.tensordot(weights / weights.sum(), values[taps], 1))
    return numpy.clip(numpy.stack(result), 0, 255)


@pytest.mark.parametrize(("width", "height", "side"), [(40, 40, 24), (90, 60, 16), (12, 20, 32)])
def test_images_are_resampled_bicubically_with_antialiasing(width, height, side):
    noise = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype="uint8")
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    across = bicubic(noise.swapaxes(0, 1).astype(float), side, left, left + shorter).swapaxes(0, 1)
    expected = bicubic(across, side, top, top + shorter)
    prepared = prepare_image(Image.fromarray(noise), side).permute(1, 2, 0).double().numpy()
    pixels = (prepared * numpy.array(DEVIATION) + numpy.array(MEAN)) * 255
    assert abs(pixels - expected).max() < 2.5


def test_wide_and_tall_crops_are_as_likely():
    boxes = [module._random_box(1000, 1000, torch.Generator().manual_seed(seed)) for seed in range(3000)]
    ratios = numpy.log([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    assert abs(ratios.mean()) < 0.01
    areas = numpy.array([(right - left) * (bottom - top) for left, top, right, bottom in boxes]) / 1e6
    assert areas.mean() == pytest.approx(0.75, abs=0.01)
    middles = numpy.array([((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes])
    assert middles.mean(0) == pytest.approx([500, 500], abs=8)
