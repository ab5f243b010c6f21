"""Samples and batches are the same whatever torch's default dtype and device are in this process."""

import numpy
import pytest
import torch

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")
pytest.importorskip("tokenizers")
Image = pytest.importorskip("PIL.Image")

from models.test_process_defaults import DEFAULTS, same_under  # noqa: E402
from training._mico_runs import SIDE, write_samples, write_tokenizer  # noqa: E402

from onepeace_fast.data.batches import BatchSampler, PairDataset, collate  # noqa: E402
from onepeace_fast.data.manifest import Entry  # noqa: E402
from onepeace_fast.data.sample_batches import SampleDataset, collate_samples  # noqa: E402
from onepeace_fast.data.samples import read_samples  # noqa: E402
from onepeace_fast.data.text import Tokenizer  # noqa: E402
from onepeace_fast.data.word_pieces import BertTokenizer  # noqa: E402


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


@DEFAULTS
def test_samples_of_any_modalities_are_the_same_whatever_the_defaults_are(tmp_path, value):
    write_samples(tmp_path)
    samples = read_samples(tmp_path / "samples.jsonl", ("vision", "audio", "depth", "normal"))
    write_tokenizer(tmp_path / "bert.json")
    words = BertTokenizer.load(tmp_path / "bert.json")

    def hide(ids, generator):
        return ids, ids == 4

    def made():
        data = SampleDataset(samples, words, side=SIDE, longest=9, hide=hide, seed=0)
        batch = collate_samples([data[0, place] for place in range(len(samples))])
        return {name: value for name, value in batch.items() if torch.is_tensor(value)}

    same_under(value, made)
