"""Samples and batches are the same whatever torch's default dtype and device are in this process."""

import numpy
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")
pytest.importorskip("tokenizers")
Image = pytest.importorskip("PIL.Image")

from models.test_process_defaults import DEFAULTS, same_under  # noqa: E402

from onepeace_fast.data.batches import BatchSampler, PairDataset, collate  # noqa: E402
from onepeace_fast.data.manifest import Entry  # noqa: E402
from onepeace_fast.data.text import Tokenizer  # noqa: E402


@DEFAULTS
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_batch_is_the_same_whatever_the_defaults_are(tmp_path, modality, value):
    noise, entries = numpy.random.default_rng(0), []
    for place, seconds in enumerate((0.5, 15.5)):
        entries.append(Entry(tmp_path / f"{place}", f"number {place} of two", place))
        if modality == "image":
            pixels = noise.integers(0, 256, (20, 28, 3), dtype="uint8")
            Image.fromarray(pixels).save(entries[-1].path, format="PNG")
        else:
            soundfile.write(entries[-1].path, noise.uniform(-0.9, 0.9, int(seconds * 16000)), 16000, format="WAV")
    tokenizer = Tokenizer.train([entry.caption for entry in entries], 300)

    def made():
        side = 16 if modality == "image" else None
        pairs = PairDataset(entries, tokenizer, modality, side=side, seed=3, broken="skip")
        keys = next(iter(BatchSampler(2, 2, seed=1)))
        return collate([pairs[key] for key in keys], frames=lambda samples: samples // 320)

    same_under(value, made)
