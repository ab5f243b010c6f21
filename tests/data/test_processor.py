"""Inputs under the names of ONE-PEACE's public interface, against each step by hand."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from data._refused import refused

pytest.importorskip("tokenizers")
pytest.importorskip("PIL")
soundfile = pytest.importorskip("soundfile")

from PIL import Image  # noqa: E402

from onepeace_fast.data.image import DEVIATION, MEAN, prepare_image  # noqa: E402
from onepeace_fast.data.processor import Processor  # noqa: E402
from onepeace_fast.data.text import Tokenizer  # noqa: E402

TEXTS = ["a cat sat", "A dog", "dog " * 100]


@pytest.fixture(scope="module")
def processor():
    return Processor(Tokenizer.train(["a cat sat on a mat", "the dog ran"], 290), 32)


def noise(width, height, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)


def sound(path, samples, rate=16000):
    soundfile.write(path, numpy.random.default_rng(samples).uniform(-0.5, 0.5, samples), rate, subtype="FLOAT")
    return path


def squashed(pixels, side=32):
    resized = numpy.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255 - mean) / deviation


def test_texts_are_padded_ids_with_an_end(processor):
    ids = processor.process_text(TEXTS)
    assert (ids.dtype, ids.shape) == (torch.int64, (3, 71))
    for row, text in zip(ids.tolist(), TEXTS, strict=True):
        own = processor.tokenizer.encode(text)[0]
        assert row == own + [1] * (71 - len(own))


def test_images_are_squashed_to_a_square_unless_a_crop_is_asked_for(processor, tmp_path):
    pixels = [noise(40, 70), noise(64, 20, 1), noise(32, 32, 2)]
    Image.fromarray(pixels[0]).save(tmp_path / "one.png")
    images = [str(tmp_path / "one.png"), Image.fromarray(pixels[1]), pixels[2]]
    found, widths, heights = processor.process_image(images, return_image_sizes=True)
    assert torch.equal(found, torch.stack([squashed(one) for one in pixels]))
    assert torch.equal(found, processor.process_image(images))
    assert (widths.tolist(), heights.tolist()) == ([40, 64, 32], [70, 20, 32])
    assert (widths.dtype, heights.dtype) == (torch.int64, torch.int64)
    cropped = Processor(None, 32, fit="crop").process_image(images)
    assert torch.equal(cropped, torch.stack([prepare_image(Image.fromarray(one), 32) for one in pixels]))
    assert not torch.equal(cropped[:2], found[:2]) and torch.equal(cropped[2], found[2])


def test_an_image_of_another_mode_becomes_rgb_on_white(processor):
    see_through = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert torch.equal(processor.process_image([see_through])[0], squashed(numpy.full((4, 4, 3), 255, numpy.uint8)))


def test_clips_are_normalised_as_a_whole_cut_to_15_seconds_and_tiled_to_one(processor, tmp_path):
    counts = [5000, 16 * 16000, 20000]
    paths = [sound(tmp_path / f"{count}.wav", count) for count in counts]
    audio, padding = processor.process_audio(paths)
    expected = []
    for path in paths:
        clip = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        clip = F.layer_norm(clip, clip.shape)[: 15 * 16000]
        expected.append(clip.repeat(math.ceil(16000 / len(clip)))[:16000] if len(clip) < 16000 else clip)
    assert [len(clip) for clip in processor.clips(paths)] == [16000, 240000, 20000]
    for row, clip in zip(audio, expected, strict=True):
        assert torch.equal(row[: len(clip)], clip)
        assert not row[len(clip) :].any()
    assert (audio.dtype, padding.dtype, list(padding.shape)) == (torch.float32, torch.bool, [3, 750])
    assert (~padding).sum(1).tolist() == [50, 750, 63]  # CLS, and 49, 749 and 62 frames
    assert not padding[0, :50].any() and padding[0, 50:].all()
    samples = torch.from_numpy(soundfile.read(paths[2], dtype="float32")[0])
    assert torch.equal(processor.process_audio([samples])[0], processor.process_audio([samples.numpy()])[0])
    assert torch.equal(processor.process_audio([samples])[0][0], expected[2])


def test_pairs_are_their_images_and_their_texts(processor):
    pairs = [(noise(40, 70), "a cat"), (noise(20, 30), "the dog ran")]
    images, text = processor.process_image_text_pairs(pairs)
    (again, widths, heights), also = processor.process_image_text_pairs(pairs, return_image_sizes=True)
    assert torch.equal(images, processor.process_image([pairs[0][0], pairs[1][0]])) and torch.equal(images, again)
    assert torch.equal(text, processor.process_text(["a cat", "the dog ran"])) and torch.equal(text, also)
    assert (widths.tolist(), heights.tolist()) == ([40, 20], [70, 30])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_images_and_sounds_and_leaves_ids_and_padding(processor, tmp_path, dtype):
    half = Processor(processor.tokenizer, 32, dtype=dtype)
    images, text = half.process_image_text_pairs([(noise(40, 70), "a cat")])
    audio, padding = half.process_audio([sound(tmp_path / "a.wav", 20000)])
    assert (images.dtype, audio.dtype, text.dtype, padding.dtype) == (dtype, dtype, torch.int64, torch.bool)


def test_frames_are_those_of_the_models_convolutions(tmp_path):
    padding = Processor(None, frames=lambda samples: samples // 1000).process_audio([sound(tmp_path / "a.wav", 20000)])[
        1
    ]
    assert list(padding.shape) == [1, 21]


def truncated(path):
    Image.fromarray(noise(90, 90)).save(path)
    path.write_bytes(path.read_bytes()[:-9000])
    return Image.open(path)


@pytest.mark.parametrize(
    ("call", "start"),
    [
        (lambda p, f: p.process_text("a cat"), "text_list: expected a list with at least one, got str 'a cat'"),
        (lambda p, f: p.process_text([]), "text_list: expected a list with at least one, got list []"),
        (lambda p, f: p.process_text(["a", None]), "text_list[1]: expected a str, got NoneType None"),
        (lambda p, f: p.process_text(["a", " "]), "text_list[1]: caption: expected some text, got ' '"),
        (lambda p, f: Processor(None).process_text(["a"]), "tokenizer: expected one for texts, got None"),
        (lambda p, f: p.process_image([f / "no.png"]), "{}/no.png: expected an image file, got no file there"),
        (lambda p, f: p.process_image([3]), "image_list[0]: expected a path, a Pillow image or a uint8 array"),
        (lambda p, f: p.process_image([noise(4, 0)]), "image_list[0]: expected pixels, got tuple (0, 4, 3)"),
        (lambda p, f: p.process_image([truncated(f / "a.png")]), "image_list[0]: expected an image that decodes"),
        (lambda p, f: p.process_image([Image.new("F", (2, 2), -1)]), "image_list[0]: expected pixels of 8 or 16 bits"),
        (lambda p, f: p.process_audio([f / "no.wav"]), "{}/no.wav: expected an audio file, got no file there"),
        (lambda p, f: p.process_audio([torch.zeros(9)]), "audio_list[0]: waveform: expected sound, got silence"),
        (lambda p, f: p.process_audio([0.5]), "audio_list[0]: expected a path, or float32 samples at 16 kHz, got"),
        (lambda p, f: p.process_image_text_pairs(["ab"]), "image_text_list[0]: expected (image, text), got str 'ab'"),
        (lambda p, f: Processor(None, 40), "image_size: expected a positive multiple of 16, got 40"),
        (lambda p, f: Processor(None, fit="pad"), "fit: expected one of crop, squash, got 'pad'"),
        (lambda p, f: Processor(None, dtype="float16"), "dtype: expected a floating point torch.dtype, got str"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line_by_its_file_or_place(processor, tmp_path, call, start):
    refused(lambda: call(processor, tmp_path), start.format(tmp_path))


def test_a_squash_is_not_random():
    image = Image.new("RGB", (4, 4))
    refused(lambda: prepare_image(image, 16, fit="squash", generator=torch.Generator()), "generator: expected None")
    refused(lambda: prepare_image(image, 16, fit="stretch"), "fit: expected one of crop, squash, got 'stretch'")
