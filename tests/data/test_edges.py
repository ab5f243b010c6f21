"""Files at the edge of what is taken: the largest, the longest, the other byte order, and pages of Ogg one by one."""

import struct

import pytest
import torch
from data._refused import taken

numpy = pytest.importorskip("numpy")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")
pytest.importorskip("tokenizers")
Image = pytest.importorskip("PIL.Image")

from onepeace_fast.data import image  # noqa: E402
from onepeace_fast.data._containers import missing_part  # noqa: E402
from onepeace_fast.data.audio import SAMPLE_RATE, read_audio  # noqa: E402
from onepeace_fast.data.batches import PairDataset  # noqa: E402
from onepeace_fast.data.manifest import Entry  # noqa: E402
from onepeace_fast.data.text import Tokenizer  # noqa: E402


def noise(samples):
    return numpy.random.default_rng(0).uniform(-0.5, 0.5, samples)


def test_an_image_of_the_most_pixels_is_taken(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    monkeypatch.setattr(image, "MAX_PIXELS", 1200)
    assert image.read_image(tmp_path / "image.png").size == (40, 30)


def test_a_clip_of_the_highest_rate_is_taken(tmp_path):
    soundfile.write(tmp_path / "clip.wav", noise(76_800), 768_000)
    assert len(read_audio(tmp_path / "clip.wav")) == SAMPLE_RATE // 10


@pytest.mark.parametrize(
    ("form", "endian", "start"), [("WAV", "BIG", b"RIFX"), ("AU", "LITTLE", b"dns."), ("AU", "BIG", b".snd")]
)
def test_a_file_of_either_byte_order_says_how_much_of_it_is_missing(tmp_path, form, endian, start):
    path = tmp_path / "clip"
    soundfile.write(path, noise(8000), SAMPLE_RATE, format=form, endian=endian, subtype="PCM_16")
    content = path.read_bytes()
    assert content.startswith(start) and missing_part(str(path)) is None and len(read_audio(path)) == 8000
    path.write_bytes(content[:-6000])
    assert missing_part(str(path)) == "10,000 of 16,000 bytes of sound"


def page(serial, number, flags=0, body=b"sound"):
    """A page of Ogg with its checksum, computed bit by bit: CRC-32 of polynomial 0x04C11DB7, nothing inverted."""
    whole = bytearray(b"OggS\0" + struct.pack("<BqIIIB", flags, 0, serial, number, 0, 1) + bytes([len(body)]) + body)
    crc = 0
    for byte in whole:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x104C11DB7 if crc >> 31 else 0)
    whole[22:26] = struct.pack("<I", crc)
    return bytes(whole)


BEGIN, END = 2, 4
FIRST = [page(7, 0, BEGIN), page(7, 1), page(7, 2, END)]
SECOND = [page(9, 0, BEGIN), page(9, 1, END)]
BAD_BYTE = page(7, 1).replace(b"sound", b"sOund")


@pytest.mark.parametrize(
    ("pages", "missing"),
    [
        (FIRST, None),
        (FIRST + SECOND, None),
        ([FIRST[0], SECOND[0], FIRST[1], SECOND[1], FIRST[2]], None),
        ([page(7, 2**32 - 1, BEGIN), page(7, 0), page(7, 1, END)], None),
        ([FIRST[0], FIRST[2]], "a damaged or lost page at byte 33"),
        ([FIRST[0], BAD_BYTE, FIRST[2]], "a damaged or lost page at byte 33"),
        ([FIRST[0], FIRST[1]], "no last page of its stream"),
        ([FIRST[0], FIRST[1], *SECOND], "no last page of its stream"),
        ([*FIRST[:2], FIRST[2][:-1]], "an unfinished last page"),
        ([FIRST[0], b"garbage", *FIRST[1:]], "a damaged or lost page at byte 33"),
    ],
    ids=["whole", "chained", "side by side", "numbers begin again", "a page lost", "a byte changed", "no end",
         "one stream without end", "a byte lost", "garbage between"],
)  # fmt: skip
def test_every_page_of_ogg_is_there_and_as_it_was_written(tmp_path, pages, missing):
    path = tmp_path / "clip.ogg"
    path.write_bytes(b"".join(pages))
    assert missing_part(str(path)) == missing


def test_a_page_that_was_cut_out_of_a_recording_is_missed(tmp_path):
    path = tmp_path / "clip.ogg"
    soundfile.write(path, noise(200_000), SAMPLE_RATE, format="OGG", subtype="VORBIS")
    content = path.read_bytes()
    starts = [place for place in range(len(content)) if content.startswith(b"OggS\0", place)]
    middle = len(starts) // 2
    path.write_bytes(content[: starts[middle]] + content[starts[middle + 1] :])
    assert missing_part(str(path)) == f"a damaged or lost page at byte {starts[middle]:,}"


def test_clips_are_cropped_at_another_place_in_every_epoch_where_there_is_a_seed(tmp_path):
    soundfile.write(tmp_path / "clip.wav", noise(16 * SAMPLE_RATE), SAMPLE_RATE)
    entries = [Entry(tmp_path / "clip.wav", "noise of sixteen seconds", 2)]
    tokenizer = Tokenizer.train(["noise of sixteen seconds"], 300)
    seeded, held_out = (PairDataset(entries, tokenizer, "audio", side=None, seed=seed) for seed in (0, None))
    first, again, other = (seeded[epoch, 0]["audio"] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(held_out[0, 0]["audio"], held_out[1, 0]["audio"])


def test_a_vocabulary_of_the_specials_and_bytes_alone_is_enough():
    with taken():
        assert Tokenizer.train(["a red kite"], 260).vocab_size == 260


def test_captions_are_cut_at_the_number_of_tokens_that_is_said(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "image.png")
    entries = [Entry(tmp_path / "image.png", "a b c d e", 2)]
    tokenizer = Tokenizer.train(["a b c d e"], 300)
    lengths = [
        len(PairDataset(entries, tokenizer, "image", side=16, seed=None, **most)[0, 0]["text"])
        for most in ({}, {"max_tokens": 5}, {"max_tokens": 3})
    ]
    assert lengths == [6, 6, 4]  # END is one more


@pytest.mark.parametrize("size", [(21, 16), (16, 19)])
def test_the_centre_is_between_two_pixels_where_an_odd_number_is_left(size):
    pixels = numpy.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype="uint8")
    prepared, turned = (image.prepare_image(Image.fromarray(part), 16) for part in (pixels, pixels[::-1, ::-1].copy()))
    torch.testing.assert_close(turned, prepared.flip(1, 2), atol=0.03, rtol=0)
