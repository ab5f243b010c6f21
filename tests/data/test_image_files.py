"""Image files that are no images, damaged, cut off or too large: each is refused in one line that names it."""

import numpy
import pytest

pytest.importorskip("PIL")

from data._images import png, read_pixels, saved
from data._refused import refused
from PIL import Image, features

from onepeace_fast.data import image as module
from onepeace_fast.data.image import MAX_PIXELS, read_image


def png_header(width, height):
    """A PNG of this size with no pixels."""
    return png(width, height, 8, 2)


def test_a_png_whose_end_was_never_written_is_refused(tmp_path):
    path = tmp_path / "preallocated.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10].ljust(len(data), b"\0"))
    refused(lambda: read_image(path), str(path))


def broken_files(folder):
    """Path, and a part of the line."""
    contents = {
        "no image": (b"this is a text" * 50, "not an image"),
        "zero bytes": (b"", "not an image"),
        "a header alone": (png_header(10, 10), "does not decode"),
        "damaged header": (png_header(10, 10).replace(b"IHDR", b"IHDX"), "does not decode"),
        "huge": (png_header(9000, 10_000), "pixels, got 9000 x 10000"),
        "far too huge": (png_header(100_000, 100_000), "pixels, got more"),
        "beyond all sizes": (png_header(2**31 - 1, 2**31 - 1), "pixels, got more"),
    }
    for case, (content, part) in contents.items():
        path = folder / f"{case}.png"
        path.write_bytes(content)
        yield path, part
    yield saved(Image.fromarray(numpy.ones((4, 4), "float32")), folder / "f.tif"), "mode F"
    yield saved(Image.new("I", (4, 4), 70_000), folder / "i.tif"), "to 70000"
    yield saved(Image.new("I", (4, 4), -1), folder / "n.tif"), "got -1 to"
    yield folder / "absent.png", "no file there"
    yield folder, "no file there"


def test_a_file_that_cannot_be_used_is_refused_in_one_line_that_names_it(tmp_path):
    for path, part in broken_files(tmp_path):
        refused(lambda path=path: read_pixels(path), f"{path}: expected ", part)


@pytest.mark.parametrize(
    ("extension", "options"),
    [
        *((extension, {}) for extension in ("jpg", "png", "webp", "gif", "tif", "bmp")),
        *(("jpg", {"progressive": True}), ("webp", {"lossless": True}), ("tif", {"compression": "tiff_lzw"})),
        pytest.param("avif", {}, marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow reads no AVIF")),
    ],
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
            assert str(error).startswith(f"{path}: expected ") and "does not decode as an image (" in str(error)
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
    refused(lambda: read_image(path), str(path), "at most 1,199 pixels, got 40 x 30", "make it smaller")
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS, "a size that Pillow warns about would be taken"


def scene(side):
    """Shapes and noise."""
    x, y = numpy.meshgrid(numpy.arange(side), numpy.arange(side))
    pixels = numpy.stack([x * 7 % 256, y * 5 % 256, x * y % 256], 2).astype("uint8")
    pixels[::3] = numpy.random.default_rng(0).integers(0, 256, pixels[::3].shape, dtype="uint8")
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("MPO", "RGB")])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"progressive": True}], ids=str)
def test_of_a_jpeg_whose_end_or_data_are_missing_no_pixel_is_read(tmp_path, form, options, mode):
    if form == "MPO":
        options = {**options, "save_all": True, "append_images": [scene(16).convert(mode)]}
    path = saved(scene(100).convert(mode), tmp_path / "image.jpg", format=form, **options)
    content = path.read_bytes()
    with Image.open(path) as whole:
        assert whole.format == form
        assert numpy.array_equal(read_pixels(path), numpy.asarray(whole.convert("RGB")))
    end = content.index(b"\xff\xd9\xff\xd8") if form == "MPO" else len(content) - 2
    parts = {
        "no end marker": content[:end],
        "zeros": content[: end // 2] + bytes(len(content) - end // 2),
        "some bytes": content[: end - 500] + content[end:],
        "half of it": content[: end // 2] + content[end:],
    }
    if "progressive" in options:
        parts["no last scan"] = content[: content.rindex(b"\xff\xda", 0, end)] + content[end:]
        scan = content.index(b"\xff\xc4", content.index(b"\xff\xda"))
        parts["a scan ends early"] = content[: scan - 60] + content[scan:]
    for part in parts.values():
        path.write_bytes(part)
        refused(lambda: read_pixels(path), f"{path}: ")


def test_what_stands_behind_the_end_of_a_jpeg_or_looks_like_it_in_a_preview_is_no_damage(tmp_path):
    path = saved(scene(40), tmp_path / "image.jpg")
    pixels, content = read_pixels(path), path.read_bytes()
    path.write_bytes(
        content[:2] + b"\xff\xe1\x00\x08\xff\xd9\xff\xda\x00\x00" + content[2:] + bytes(999) + b"\xff\xd8\xff"
    )
    assert numpy.array_equal(read_pixels(path), pixels)


def test_a_gif_whose_end_was_never_written_is_refused(tmp_path):
    path = saved(scene(100), tmp_path / "image.gif")
    content = path.read_bytes()
    for length in (len(content) // 2, len(content) * 9 // 10, len(content) - 20):
        path.write_bytes(content[:length].ljust(len(content), b"\0"))
        refused(lambda: read_image(path), path)
