"""Image files: every kind of pixel comes out as RGB, upright and on white."""

import multiprocessing
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest

pytest.importorskip("PIL")

from data._images import RED, WHITE, colours, png, read_pixels, saved
from PIL import Image

from onepeace_fast.data._image_files import without_warnings
from onepeace_fast.data.image import read_image


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


def test_threads_that_read_images_leave_the_filters_of_warnings_as_they_are(tmp_path):
    path = saved(Image.new("RGB", (400, 400)), tmp_path / "image.png")
    with warnings.catch_warnings():  # so that what they leave is no other test's
        before = list(warnings.filters)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(read_image, [path] * 50))
        assert warnings.filters == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of a process with threads, as loaders' are
def test_a_process_that_is_forked_while_another_thread_reads_can_read(tmp_path):
    path = saved(Image.new("RGB", (4, 4)), tmp_path / "image.png")
    begun, process = threading.Event(), multiprocessing.get_context("fork").Process(target=read_image, args=(path,))

    def read_slowly():
        with without_warnings():
            begun.set()
            time.sleep(0.2)

    thread = threading.Thread(target=read_slowly)
    thread.start()
    begun.wait()
    process.start()
    process.join(20)
    process.kill()
    thread.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_damaged_exif_is_no_reason_to_warn(tmp_path, extension):
    exif = Image.Exif()
    exif[0x0112], exif[0x8298] = 6, "its second half is missing"
    damaged = exif.tobytes()[:-13]
    path = saved(Image.new("RGB", (24, 16)), tmp_path / f"image.{extension}", exif=damaged)
    with pytest.warns(UserWarning), Image.open(path) as image:
        image.getexif()
    assert read_pixels(path).shape == (24, 16, 3)
