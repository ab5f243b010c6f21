"""Audio files: what is read comes out as mono at 16 kHz, and what cannot be used is refused in one line."""

import math
import struct

import numpy
import pytest
import torch
import torch.nn.functional as F
from data._refused import refused

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")

from onepeace_fast.data.audio import SAMPLE_RATE, pad_waveforms, prepare_waveform, read_audio  # noqa: E402


def tone(seconds, rate=SAMPLE_RATE, hertz=440.0, loudness=0.5):
    """A sine, float64 [samples]."""
    return loudness * numpy.sin(2 * math.pi * hertz * numpy.arange(round(seconds * rate)) / rate)


def write(path, samples, rate=SAMPLE_RATE, **form):
    soundfile.write(path, samples, rate, **form)
    return path


def write_header(path, seconds, rate=SAMPLE_RATE):
    """A 16-bit WAV whose samples are a hole in the file: nothing is stored."""
    size = seconds * rate * 2
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    with path.open("wb") as file:
        file.write(struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + fmt + struct.pack("<4sI", b"data", size))
        file.truncate(44 + size)
    return path


@pytest.mark.parametrize("form", ["SDS", "NIST", "CAF", "VOC"])
def test_a_format_whose_lost_end_goes_unseen_is_refused_by_its_name(tmp_path, form):
    path = write(tmp_path / "clip.sound", tone(1), format=form)
    refused(lambda: read_audio(path), str(path), form)


@pytest.mark.parametrize(
    "form",
    [
        {"subtype": "PCM_U8"},
        {"subtype": "PCM_16"},
        {"subtype": "PCM_24"},
        {"subtype": "FLOAT"},
        {"subtype": "DOUBLE"},
        {"subtype": "ULAW"},
        {"format": "FLAC"},
        {"format": "AIFF"},
    ],
    ids=lambda form: "-".join(form.values()),
)
def test_samples_of_every_format_come_out_the_same(tmp_path, form):
    samples = tone(0.5)
    read = read_audio(write(tmp_path / "clip.wav", samples, **form))
    assert read.dtype == torch.float32
    assert read.shape == samples.shape
    steps = 2.0**-7 if form.get("subtype") in ("PCM_U8", "ULAW") else 2.0**-15
    assert (read.double() - torch.from_numpy(samples)).abs().max() <= 3 * steps


@pytest.mark.parametrize("form", ["OGG", "MP3"])
def test_lossy_formats_keep_the_length_and_the_tone(tmp_path, form):
    samples = tone(1.0)
    read = read_audio(write(tmp_path / "clip", samples, format=form)).numpy()
    assert len(read) == len(samples)
    assert abs(numpy.fft.rfft(read)).argmax() == 440


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 44101])
def test_other_sample_rates_are_resampled_to_16_khz(tmp_path, rate):
    read = read_audio(write(tmp_path / "clip.wav", tone(0.5, rate), rate, subtype="FLOAT"))
    assert read.dtype == torch.float32
    assert len(read) == SAMPLE_RATE // 2
    middle = slice(1000, -1000)  # the filter rings where the tone starts and ends
    assert (read[middle].double() - torch.from_numpy(tone(0.5))[middle]).abs().max() < 2e-3


def test_frequencies_that_16_khz_cannot_hold_are_removed_and_not_folded_down(tmp_path):
    kept, gone = tone(0.5, 96000, 1000), tone(0.5, 96000, 15000)
    read = read_audio(write(tmp_path / "clip.wav", (kept + gone) / 2, 96000, subtype="FLOAT"))
    assert (read[1000:-1000].double() - torch.from_numpy(tone(0.5, hertz=1000) / 2)[1000:-1000]).abs().max() < 2e-3


def test_channels_are_averaged(tmp_path):
    left, middle, right = tone(0.2), tone(0.2, hertz=900), tone(0.2, hertz=300)
    read = read_audio(write(tmp_path / "clip.wav", numpy.stack([left, middle, right], 1), subtype="FLOAT"))
    torch.testing.assert_close(read.double(), torch.from_numpy((left + middle + right) / 3), atol=1e-6, rtol=0)


def test_a_clip_longer_than_a_block_of_the_decoder_is_read_whole(tmp_path):
    samples = numpy.random.default_rng(0).uniform(-1, 1, 600_000)
    read = read_audio(write(tmp_path / "clip.wav", samples, subtype="FLOAT"))
    assert torch.equal(read, torch.from_numpy(samples).float())


def test_an_hour_is_refused_from_its_header_alone(tmp_path, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("samples were decoded")

    for name in ("read", "blocks", "buffer_read", "buffer_read_into"):
        monkeypatch.setattr(soundfile.SoundFile, name, decode)
    path = write_header(tmp_path / "hour.wav", 3600)
    refused(lambda: read_audio(path), str(path), "at most 600 s of audio, got 3,600.0 s", "cut it")
    with pytest.raises(AssertionError, match="were decoded"):
        read_audio(write_header(tmp_path / "minutes.wav", 600))


def test_the_longest_clip_that_is_taken_is_a_setting(tmp_path):
    path = write(tmp_path / "clip.wav", tone(1.0))
    assert len(read_audio(path, max_seconds=1)) == SAMPLE_RATE
    refused(lambda: read_audio(path, max_seconds=0.99), str(path), "at most 0.99 s")


def test_a_header_without_a_length_is_refused(tmp_path):
    path = write(tmp_path / "clip.flac", tone(0.5))
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples: 0 stands for unknown
    content[22:26] = bytes(4)
    path.write_bytes(content)
    refused(lambda: read_audio(path), str(path), "expected a header with a length")


def broken_files(folder):
    """Path, and a part of the line."""
    whole = write(folder / "whole.flac", numpy.random.default_rng(0).uniform(-1, 1, 40_000)).read_bytes()
    contents = {
        "note.wav": (b"this is a text" * 50, "got what does not decode as audio"),
        "zero.wav": (b"", "got what does not decode as audio"),
        "samples.raw": (bytes(1000), "got what does not decode as audio"),
        "half.flac": (whole[: len(whole) // 2], "got what does not decode as audio"),
        "more in the header.flac": (whole[:21] + struct.pack(">BI", whole[21], 50_000) + whole[26:], "a whole file"),
    }
    for name, (content, part) in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name, part
    nan, huge = tone(0.1), tone(0.1)
    nan[100], huge[100] = math.nan, 1e30
    clips = {
        "no samples": ([], "samples of audio, got none"),
        "silence": (numpy.zeros(1000), "silence"),
        "a constant": (numpy.full(44100, 0.25), "every sample is 0.25"),
        "channels that cancel": (numpy.stack([tone(0.1), -tone(0.1)], 1), "silence"),
        "not a number": (nan, "finite samples, got some that are not"),
        "infinite": (numpy.where(nan > 0, math.inf, 0), "finite samples, got some that are not"),
        "too large": (huge, "too large"),
        "one sample at 16 kHz": ([0.5, -0.5], "silence"),
    }
    for case, (samples, part) in clips.items():
        yield write(folder / f"{case}.wav", samples, 44100, subtype="FLOAT"), part
    yield write(folder / "eight-bit silence.wav", numpy.zeros(900), subtype="PCM_U8"), "silence"
    yield folder / "absent.wav", "no file there"
    yield folder, "no file there"


def test_a_file_that_cannot_be_used_is_refused_in_one_line_that_names_it(tmp_path):
    for path, part in broken_files(tmp_path):
        refused(lambda path=path: read_audio(path), f"{path}: expected ", part)


WHOLE = [
    *(("wav", kind) for kind in ("PCM_16", "PCM_U8", "FLOAT", "ULAW", "IMA_ADPCM", "GSM610", "G721_32")),
    *(("aiff", kind) for kind in ("PCM_16", "FLOAT", "GSM610")),
    *(("au", kind) for kind in ("PCM_16", "ALAW", "G723_24", "G723_40")),
    ("rf64", "PCM_16"),
    ("w64", "PCM_16"),
    ("flac", "PCM_16"),
    ("ogg", "VORBIS"),
    ("ogg", "OPUS"),
    ("mp3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize(("form", "subtype"), WHOLE)
def test_of_a_file_that_was_cut_off_or_lost_its_middle_no_sample_is_read(tmp_path, form, subtype):
    path = tmp_path / "clip"
    write(path, numpy.random.default_rng(0).uniform(-0.3, 0.3, 48_000), format=form, subtype=subtype)
    assert 48_000 <= len(read_audio(path)) < 49_100  # some codecs fill their last block
    content = path.read_bytes()
    cuts = [content[: int(len(content) * share)] for share in (0.5, 0.9, 0.99)]
    if form in ("flac", "ogg", "mp3"):
        middle = len(content) // 2
        cuts += [content[:middle] + gap + content[middle + lost :] for gap, lost in ((bytes(1000), 1000), (b"", 2000))]
    for part in cuts:
        path.write_bytes(part)
        refused(lambda: read_audio(path), f"{path}: expected ")


def test_an_mp3_that_was_cut_off_brings_no_memory_of_others_into_a_clip(tmp_path):
    path = write(tmp_path / "clip.mp3", tone(3.0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(lambda: read_audio(path), str(path), "of 48,000 samples decoded", "fetch it again")


def test_a_piece_before_a_hole_is_not_heard_twice(tmp_path):
    path = write(tmp_path / "clip.mp3", numpy.random.default_rng(0).uniform(-0.3, 0.3, 600_000))
    content = bytearray(path.read_bytes())
    content[100_000:100_900] = bytes(900)
    path.write_bytes(content)
    refused(lambda: read_audio(path), str(path))


@pytest.mark.parametrize("size", [b"\xff" * 4, b"\x00\xff\xff\xff"])
def test_a_header_that_does_not_know_its_length_is_no_promise_and_one_that_says_too_much_is(tmp_path, size):
    path = write(tmp_path / "clip.wav", tone(0.5))
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 4 + content[8:40] + size + content[44:])
    if size == b"\xff" * 4:
        assert len(read_audio(path)) == SAMPLE_RATE // 2
    else:
        refused(lambda: read_audio(path), str(path), "got 16,000 of 4,294,967,040 bytes of sound")


@pytest.mark.parametrize("form", ["wav", "au", "aiff"])
@pytest.mark.parametrize("subtype", ["PCM_16", "ULAW", "a codec of blocks"])
def test_without_a_length_no_sample_of_a_block_that_was_cut_off_is_made_up(tmp_path, form, subtype):
    whole = subtype != "a codec of blocks"
    subtype = subtype if whole else {"wav": "IMA_ADPCM", "au": "G721_32", "aiff": "GSM610"}[form]
    path = write(tmp_path / "clip", numpy.random.default_rng(0).uniform(-0.3, 0.3, 4000), format=form, subtype=subtype)
    content, read = path.read_bytes(), read_audio(path)
    place = {"wav": content.find(b"data") + 4, "au": 8, "aiff": content.find(b"SSND") + 4}[form]
    path.write_bytes((content[:place] + b"\xff" * 4 + content[place + 4 :])[: len(content) * 2 // 3])
    if whole:
        part = read_audio(path)
        assert 2000 < len(part) < 3000 and part.equal(read[: len(part)])
    else:
        refused(lambda: read_audio(path), str(path), f"a length, got none ({subtype})")


def test_what_stands_before_and_behind_the_samples_is_no_loss(tmp_path):
    path = write(tmp_path / "clip.wav", tone(0.5))
    content = path.read_bytes()
    note = struct.pack("<4sI", b"note", 5001) + b"data" * 1250 + b"\0\0"
    path.write_bytes(content[:36] + note + content[36:] + b"LIST" + bytes(100))
    assert torch.equal(read_audio(path), read_audio(write(tmp_path / "plain.wav", tone(0.5))))
    ogg = write(tmp_path / "clip.ogg", tone(0.5))
    ogg.write_bytes(ogg.read_bytes() * 2 + b"TAG" + bytes(125))  # chained streams and a tag
    assert len(read_audio(ogg)) >= SAMPLE_RATE // 2


def test_telephone_codecs_keep_the_tone(tmp_path):
    names = {"GSM610": ("wav", "aiff"), "G721_32": ("wav", "au"), "G723_24": ("au",), "G723_40": ("au",)}
    names |= {law: ("wav", "au", "aiff") for law in ("ALAW", "ULAW")}
    for subtype, form in ((subtype, form) for subtype, forms in names.items() for form in forms):
        path = write(tmp_path / f"clip.{form}", tone(1.0, 8000), 8000, subtype=subtype)
        assert abs(numpy.fft.rfft(read_audio(path).numpy()[:SAMPLE_RATE])).argmax() == 440, (subtype, form)


def test_a_file_whose_name_is_no_utf_8_is_read(tmp_path):
    path = tmp_path / "clip.wav"
    name = str(write(path, tone(0.1)).rename(tmp_path / "t\udcf6n.wav"))
    assert torch.equal(read_audio(name), read_audio(write(path, tone(0.1))))


def test_a_sample_rate_that_no_recorder_has_is_refused(tmp_path):
    path = write_header(tmp_path / "clip.wav", 1)
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", 2**31 - 1)
    path.write_bytes(content)
    refused(lambda: read_audio(path), str(path), "2147483647 Hz", "at most 768000 Hz")


def test_a_clip_is_normalised_as_a_whole_and_then_cropped():
    loud_end = torch.cat([0.01 * torch.randn(16 * SAMPLE_RATE), 3 + torch.randn(14 * SAMPLE_RATE)])
    whole = (loud_end - loud_end.mean()) / loud_end.std(correction=0)
    prepared = prepare_waveform(loud_end)
    assert prepared.shape == (15 * SAMPLE_RATE,)
    torch.testing.assert_close(prepared, whole[: 15 * SAMPLE_RATE], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loudness", [1.0, 1e-3])
def test_normalisation_is_upstreams_also_for_a_quiet_clip(loudness):
    clip = loudness * torch.randn(20_000) + 0.1
    torch.testing.assert_close(prepare_waveform(clip), F.layer_norm(clip, clip.shape, eps=1e-5))


def test_a_random_crop_is_a_stretch_of_the_clip_and_reaches_both_ends():
    clip = torch.randn(320)
    whole = prepare_waveform(clip, crop_seconds=1, minimum_seconds=0.01)
    starts = set()
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        crop = prepare_waveform(clip, crop_seconds=318 / SAMPLE_RATE, minimum_seconds=0.01, generator=generator)
        starts.add(next(start for start in range(3) if torch.equal(crop, whole[start : start + 318])))
    assert starts == {0, 1, 2}


def test_a_cropped_clip_does_not_keep_the_whole_one_in_memory():
    crop = prepare_waveform(torch.randn(60_000), crop_seconds=1)
    assert crop.untyped_storage().nbytes() == 4 * SAMPLE_RATE


@pytest.mark.parametrize("samples", [1 + 1, 5_000, 15_999])
def test_a_short_clip_is_repeated_to_a_second(samples):
    clip = torch.randn(samples)
    prepared = prepare_waveform(clip)
    own = F.layer_norm(clip, clip.shape)
    assert prepared.shape == (SAMPLE_RATE,)
    assert torch.equal(prepared, own[torch.arange(SAMPLE_RATE) % samples])


@pytest.mark.parametrize("samples", [SAMPLE_RATE, SAMPLE_RATE + 1, 15 * SAMPLE_RATE])
def test_a_clip_between_a_second_and_fifteen_keeps_its_length(samples):
    assert prepare_waveform(torch.randn(samples), generator=torch.Generator()).shape == (samples,)


@pytest.mark.parametrize(
    ("waveform", "part"),
    [
        (torch.zeros(0), "samples of audio, got none"),
        (torch.ones(9), "silence"),
        (torch.tensor([0.0, math.inf]), "expected finite"),
        (torch.randn(2, 9), "float32 [2, 9]"),
        (torch.randn(9).double(), "float64 [9]"),
        ([0.1, 0.2], "list"),
    ],
)
def test_a_waveform_that_does_not_fit_is_refused(waveform, part):
    refused(lambda: prepare_waveform(waveform), "waveform: expected ", part)


def test_clips_are_padded_with_zeros_at_the_end():
    first, second = torch.randn(5), torch.randn(3)
    audio, samples = pad_waveforms([first, second])
    assert samples == [5, 3]
    assert torch.equal(audio, torch.stack([first, torch.cat([second, torch.zeros(2)])]))
