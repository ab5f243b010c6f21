"""What networks take: images, clips and frames as UnIVAL's data sets give them."""

import pytest
import torch
from data._refused import refused

numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")

from onepeace_fast.data.task_files import Files  # noqa: E402

RAW = Files(5, networks=True, image_size=32, audio_seconds=0.5)


def test_an_image_is_squashed_whole_and_its_pixels_go_from_minus_one_to_one(tmp_path):
    image = Image.new("RGB", (60, 40), (255, 0, 51))
    image.paste((0, 255, 51), (30, 0, 60, 40))
    image.save(tmp_path / "a.png")
    found = RAW.read(tmp_path / "a.png", "image")
    assert found.shape == (3, 32, 32)
    assert found[:, 5, 3].tolist() == pytest.approx([1, -1, -0.6]) and found[:, 5, 28].tolist() == pytest.approx(
        [-1, 1, -0.6]
    )


@pytest.mark.parametrize(("seconds", "rate"), [(0.2, 48000), (0.75, 48000), (0.2, 24000)])
def test_a_clip_is_repeated_or_cut_to_its_length_at_48_khz(tmp_path, seconds, rate):
    samples = numpy.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * rate))
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    found = RAW.read(tmp_path / "a.wav", "audio")
    assert found.shape == (24000,) and found.dtype == torch.float32
    count = min(round(seconds * 48000), 24000)
    if rate == 48000:
        assert torch.equal(found[:count], torch.tensor(samples[:count], dtype=torch.float32))
    assert torch.equal(found[count:], found[: 24000 - count])


def test_arrays_are_pixels_frames_and_waveforms_with_networks_and_maps_without(tmp_path):
    for name, shape in {"frames": (3, 2, 4, 4), "wave": (9,), "map": (5, 2, 2)}.items():
        numpy.save(tmp_path / f"{name}.npy", numpy.ones(shape, "float32"))
    assert RAW.read(tmp_path / "frames.npy", "video").shape == (3, 2, 4, 4)
    assert RAW.read(tmp_path / "wave.npy", "audio").shape == (9,)
    assert Files(5).read(tmp_path / "map.npy", "image").shape == (5, 2, 2)
    line = refused(lambda: RAW.read(tmp_path / "map.npy", "image"), tmp_path / "map.npy", "networks take of image")
    assert "[3, height, width], got float32 [5, 2, 2]" in line
    (tmp_path / "a.png").touch()
    refused(lambda: Files(5).read(tmp_path / "a.png", "image"), tmp_path / "a.png", "for a model without networks")
    refused(lambda: RAW.read(tmp_path / "a.png", "video"), tmp_path / "a.png", "frames [3, frames, height, width]")
