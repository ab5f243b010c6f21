"""MP3 files that do not say how long they are, as streams and editors write them."""

import math

import numpy
import pytest
from data._refused import refused

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")

from onepeace_fast.data.audio import read_audio  # noqa: E402

SECONDS = 3
KINDS = [(rate, channels, mode) for rate, channels in ((44100, 2), (48000, 1), (16000, 1)) for mode in "CV"]
KINDS += [(16000, 2, "V"), (8000, 1, "C")]


def without_count(path, rate, channels, mode):
    """Write a tone and noise; drop the first frame, which has the count. Returns the content and the second frame's."""
    time = numpy.arange(SECONDS * rate) / rate
    sound = 0.3 * numpy.sin(2 * math.pi * 440 * time)[:, None].repeat(channels, 1)
    sound += numpy.random.default_rng(0).uniform(-0.05, 0.05, sound.shape)
    mode = {"C": "CONSTANT", "V": "VARIABLE"}[mode]
    soundfile.write(path, sound, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
    content = path.read_bytes()
    return content[content.index(content[:2], 4) :]


@pytest.mark.parametrize(("rate", "channels", "mode"), KINDS)
def test_all_of_a_whole_one_is_read(tmp_path, rate, channels, mode):
    path = tmp_path / "clip.mp3"
    content = without_count(path, rate, channels, mode)
    counted = read_audio(path)
    path.write_bytes(content)
    read = read_audio(path)
    assert len(counted) <= len(read) < len(counted) + 0.2 * 16000  # an encoder fills the first frame and the last
    assert abs(numpy.fft.rfft(read[-16000:].numpy())).argmax() == 440
    picture = (b"\xff\xfb\x90\x00" + bytes(413)) * 2 + bytes(170)  # which looks like frames
    path.write_bytes(b"ID3\x04\x00\x00\x00\x00\x07\x6c" + picture + content + b"TAG" + bytes(125))
    assert read_audio(path).equal(read)


@pytest.mark.parametrize(("rate", "channels", "mode"), KINDS)
def test_of_one_that_was_cut_off_or_lost_its_middle_no_sample_is_read(tmp_path, rate, channels, mode):
    path = tmp_path / "clip.mp3"
    content = without_count(path, rate, channels, mode)
    middle = len(content) // 2 + 3  # not between two frames, where nobody could tell
    parts = {
        "half": content[:middle],
        "all but a byte": content[:-1],
        "zeros": content[:middle].ljust(len(content), b"\0"),
        "a hole": content[:middle] + bytes(1000) + content[middle + 1000 :],
        "a gap": content[:middle] + content[middle + 1000 :],
    }
    for part in parts.values():
        path.write_bytes(part)
        refused(lambda: read_audio(path), f"{path}: expected ")


@pytest.mark.parametrize("name", [b"VBRI", b"Xing", b"Info"])
def test_a_first_frame_that_gives_no_count_of_its_own_is_no_sound(tmp_path, name):
    path = tmp_path / "clip.mp3"
    content = without_count(path, 44100, 1, "C")
    path.write_bytes(content)
    read = read_audio(path)
    second = content.index(content[:2], 4)
    place = 36 if name == b"VBRI" else 21
    path.write_bytes((content[:4] + bytes(place - 4) + name).ljust(second, b"\0") + content)
    assert read_audio(path).equal(read)
