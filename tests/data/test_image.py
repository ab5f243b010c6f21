"""Image files: every kind of pixel comes out as RGB, crops are square, what cannot be used is refused in one line."""

import struct
import warnings
import zlib

import numpy
import pytest
import torch

PIL = pytest.importorskip("PIL")

from PIL import Image  # noqa: E402

from onepeace_fast.data import image as module  # noqa: E402
from onepeace_fast.data.image import DEVIATION, MAX_PIXELS, MEAN, prepare_image, read_image  # noqa: E402

RED, WHITE = (200, 30, 10), (255, 255, 255)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def read_pixels(path):
    """Read a file with warnings as errors; its pixels, uint8 [height, width, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(path)
    assert image.mode == "RGB"
    return numpy.asarray(image)


def png(width, height, depth, kind, rows=b"", *, interlace=0, chunks=()):
    """A PNG of these rows, each with its filter's byte; without rows it has no pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows) if rows else b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_header(width, height):
    """A PNG of this size with no pixels."""
    return png(width, height, 8, 2)


def refused(call, *parts):
    """The call raises one line in the common form that holds every part."""
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in (": got ", "takes ", *parts)), line


def colours():
    """A small image of many colours, without noise."""
    x, y = numpy.meshgrid(numpy.arange(24), numpy.arange(16))
    return Image.fromarray(numpy.stack([x * 10, y * 15, 255 - x * 5], 2).astype("uint8"))


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_rgb_is_read_bit_by_bit(tmp_path, extension):
    options = {"lossless": True} if extension == "webp" else {}
    path = saved(colours(), tmp_path / f"image.{extension}", **options)
    assert numpy.array_equal(read_pixels(path), numpy.asarray(colours()))


@pytest.mark.parametrize(
    ("mode", "extension"), [("RGB", "jpg"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("P", "png")]
)
def test_colours_survive_other_modes(tmp_path, mode, extension):
    path = saved(
        Image.new("RGB", (16, 8), RED).convert(mode, palette=Image.Palette.ADAPTIVE), tmp_path / f"image.{extension}"
    )
    with Image.open(path) as image:
        assert image.mode == ("RGB" if mode == "YCbCr" else mode)
    pixels = read_pixels(path)
    assert pixels.shape == (8, 16, 3)
    assert abs(pixels.astype(int) - numpy.array(RED)).max() <= 8


def test_a_png_whose_end_was_never_written_is_refused(tmp_path):
    path = tmp_path / "preallocated.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10].ljust(len(data), b"\0"))
    refused(lambda: read_image(path), str(path))


@pytest.mark.parametrize(("mode", "value"), [("L", 77), ("1", 255), ("LA", (77, 255))])
def test_grey_becomes_three_equal_channels(tmp_path, mode, value):
    path = saved(Image.new(mode, (4, 4), value), tmp_path / "image.png")
    assert (read_pixels(path) == (255 if mode == "1" else 77)).all()


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path, extension):
    grey = (numpy.arange(256).reshape(16, 16) * 257).astype("uint16")
    path = saved(Image.fromarray(grey), tmp_path / f"image.{extension}")
    assert numpy.array_equal(read_pixels(path), numpy.arange(256).reshape(16, 16, 1).repeat(3, 2))


def test_transparency_is_laid_on_white(tmp_path):
    half = Image.new("RGBA", (3, 1), (*RED, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    half.putpixel((2, 0), (0, 0, 0, 51))
    pixels = read_pixels(saved(half, tmp_path / "image.png"))
    assert pixels[0].tolist() == [list(RED), list(WHITE), [204] * 3]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_of_a_palette_or_a_plain_image_is_white(tmp_path, mode):
    image = Image.new("RGB", (2, 1), RED).convert(mode)
    black = 255 if mode == "P" else image.getpixel((0, 0))
    if mode == "P":
        image.putpalette([0, 0, 0] * 255 + [9, 9, 9])
        image.putpixel((0, 0), 255)
    path = saved(image, tmp_path / "image.png", transparency=black)
    assert read_pixels(path)[0, 0].tolist() == list(WHITE)


def packed(samples, depth):
    """A PNG's row of samples of so many bits, behind the byte of filter 0."""
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    return bytes([0, *(int(bits[place : place + 8].ljust(8, "0"), 2) for place in range(0, len(bits), 8))])


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white_in_every_depth_and_no_other_grey(tmp_path, depth):
    path, top = tmp_path / "image.png", 2**depth - 1
    steps = range(top + 1) if depth <= 8 else [0, 1, 255, 256, 257, 0x3200, 0x3201, 0x32FF, 0x6432, top]
    for key in {0, 1, steps[len(steps) // 2], top}:
        path.write_bytes(png(len(steps), 1, depth, 0, packed(steps, depth), chunks=[(b"tRNS", struct.pack(">H", key))]))
        grey = [255 if value == key else value * 255 // top if depth < 16 else value >> 8 for value in steps]
        assert read_pixels(path)[0].tolist() == [[value] * 3 for value in grey], key


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_is_white_in_every_depth_and_no_other_colour(tmp_path, depth):
    path, unit = tmp_path / "image.png", 2 ** (depth - 8)
    key = (200 * unit, 30 * unit + unit - 1, 10 * unit)
    # Also what agrees in two channels, in the upper bytes alone, and in the lower ones alone.
    near = [(200 * unit, 30 * unit + unit - 1, 11 * unit), (200 * unit, 30 * unit, 10 * unit), (200, 30, 10)]
    near = [colour for colour in near if colour != key]
    row = packed([value for colour in (key, *near) for value in colour], depth)
    path.write_bytes(png(1 + len(near), 1, depth, 2, row, chunks=[(b"tRNS", struct.pack(">HHH", *key))]))
    assert read_pixels(path)[0].tolist() == [[255] * 3, *([value // unit for value in colour] for colour in near)]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_entries_of_a_palette_are_white_in_every_depth(tmp_path, depth):
    path, palette = tmp_path / "image.png", [(10, 20, 30), (40, 50, 60), (70, 80, 90), (100, 110, 120)]
    palette = palette[: 2**depth]
    chunks = [(b"PLTE", bytes(value for colour in palette for value in colour)), (b"tRNS", bytes([255, 0]))]
    path.write_bytes(png(len(palette), 1, depth, 3, packed(range(len(palette)), depth), chunks=chunks))
    expected = [[255] * 3 if place == 1 else list(colour) for place, colour in enumerate(palette)]
    assert read_pixels(path)[0].tolist() == expected


def test_a_transparent_colour_of_16_bits_is_turned_upright_with_its_image(tmp_path):
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112] = 6
    colours = [(1, 2, 3), (0x1234, 0x5678, 0x9ABC), (0x1200, 0x5600, 0x9A00)]
    row = packed([value for colour in colours for value in colour], 16)
    chunks = [(b"tRNS", struct.pack(">HHH", *colours[1])), (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))]
    path.write_bytes(png(3, 1, 16, 2, row, chunks=chunks))
    pixels = read_pixels(path)
    assert pixels.shape == (3, 1, 3)
    assert pixels[:, 0].tolist() == [[0, 0, 0], [255] * 3, [0x12, 0x56, 0x9A]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(tmp_path, orientation):
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    transpose = Image.Transpose
    # What a camera stores so that the given orientation shows the upright image.
    stored = {
        1: None,
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    saved(upright if stored is None else upright.transpose(stored), path, exif=exif)
    assert numpy.array_equal(read_pixels(path), numpy.asarray(upright))


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    path = saved(frames[0], tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert (read_pixels(path) == numpy.array(RED)).all()


def broken_files(folder):
    """Name of the case, path, and a part of the line."""
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8"))
    for extension in ("jpg", "png", "webp", "gif", "tif"):
        path = saved(noise, folder / f"half.{extension}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        yield f"half a {extension}", path, "does not decode as an image"
    contents = {
        "no image": (b"this is a text" * 50, "not an image"),
        "zero bytes": (b"", "not an image"),
        "a header alone": (png_header(10, 10), "does not decode"),
        "damaged header": (png_header(10, 10).replace(b"IHDR", b"IHDX"), "does not decode"),
        "huge": (png_header(9000, 10_000), "9000 x 10000 pixels"),
        "far too huge": (png_header(100_000, 100_000), "too large an image"),
        "beyond all sizes": (png_header(2**31 - 1, 2**31 - 1), "too large an image"),
    }
    for case, (content, part) in contents.items():
        path = folder / f"{case}.png"
        path.write_bytes(content)
        yield case, path, part
    yield "floats", saved(Image.fromarray(numpy.ones((4, 4), "float32")), folder / "f.tif"), "mode F"
    yield "32 bits", saved(Image.new("I", (4, 4), 70_000), folder / "i.tif"), "to 70000"
    yield "negative", saved(Image.new("I", (4, 4), -1), folder / "n.tif"), "from -1"
    yield "no file", folder / "absent.png", "no file there"
    yield "a folder", folder, "no file there"


def test_a_file_that_cannot_be_used_is_refused_in_one_line_that_names_it(tmp_path):
    for case, path, part in broken_files(tmp_path):
        with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
            warnings.simplefilter("error")
            read_image(path)
        line = str(caught.value)
        assert line.startswith(f"{path}: got "), (case, line)
        assert part in line, (case, line)
        assert "takes " in line and "\n" not in line, (case, line)


@pytest.mark.parametrize(
    ("extension", "options"),
    [("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("webp", {}), ("webp", {"lossless": True}), ("gif", {})],
)
def test_of_an_image_that_was_cut_off_no_pixel_is_read(tmp_path, monkeypatch, extension, options):
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype="uint8"))
    path = saved(noise, tmp_path / f"image.{extension}", **options)
    whole, content = read_pixels(path), path.read_bytes()
    for size in {*range(0, len(content), len(content) // 20), *range(len(content) - 25, len(content))}:
        path.write_bytes(content[:size])
        try:
            pixels = read_pixels(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: got ")
        else:  # only what marks the end is missing
            assert len(content) - size < 25 and numpy.array_equal(pixels, whole)
    path.write_bytes(content[: len(content) // 2])
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    refused(lambda: read_image(path), str(path), "LOAD_TRUNCATED_IMAGES")


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(Image.new("RGB", (40, 30)), tmp_path / "image.png")
    monkeypatch.setattr(module, "MAX_PIXELS", 1199)

    def decode(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    refused(lambda: read_image(path), str(path), "40 x 30 pixels", "at most 1,199", "make it smaller")
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS, "a size that Pillow warns about would be taken"


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


def test_the_same_generator_gives_the_same_crop():
    crops = [prepare_image(gradient(90, 60), 16, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*crops)


@pytest.mark.parametrize("side", [0, -16, 16.0, None])
def test_a_side_that_is_no_number_of_pixels_is_refused(side):
    refused(lambda: prepare_image(colours(), side), "side: got ", repr(side))


@pytest.mark.parametrize("image", [Image.new("L", (4, 4)), "image.png"])
def test_what_is_not_an_rgb_image_is_refused(image):
    refused(lambda: prepare_image(image, 16), "image: got ", "RGB")


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
