"""A small model in upstream's form with a tokenizer beside it, and files to embed."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from models._small import randomise, small_config
from pretrained._files import checkpoint_of, write

from onepeace_fast import OnePeaceRetrieval, RetrievalConfig
from onepeace_fast.config import AudioAdapterConfig
from onepeace_fast.data.text import Tokenizer

CAPTIONS = ["a cat sat on a mat", "the dog ran", "rain on a roof", "a dog", "a cat on the roof in the rain"]
# A frame each 20 ms, as the 4 B model's.
AUDIO = AudioAdapterConfig(
    feature_layers=((8, 10, 5), *((8, 3, 2),) * 4, *((8, 2, 2),) * 2),
    position_layers=2, position_width=10, position_groups=4, bucket_size=8,
)  # fmt: skip
SIDE = 64  # 16 times the grid of the model's table


def write_model(folder: Path) -> Path:
    """``public.pt`` and ``tokenizer.json`` of a model for retrieval with random numbers."""
    tokenizer = Tokenizer.train(CAPTIONS, 280)
    tokenizer.save(folder / "tokenizer.json")
    encoder = small_config(audio=AUDIO).encoder
    model = OnePeaceRetrieval(RetrievalConfig(encoder=encoder, vocab_size=tokenizer.vocab_size), backend="reference")
    randomise(model.double())
    return write(folder / "public.pt", checkpoint_of(model.float()))


def pixels(seed: int, width: int = 50, height: int = 70) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)


def write_sound(path: Path, seconds: float, seed: int) -> Path:
    import soundfile

    samples = numpy.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * 16000))
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    return path


def write_files(folder: Path, images: int = 3, sounds: int = 3) -> tuple[list[str], list[str]]:
    """Random images and sounds of different lengths; their paths."""
    from PIL import Image

    pictures = [str(folder / f"{seed}.png") for seed in range(images)]
    for seed, path in enumerate(pictures):
        Image.fromarray(pixels(seed)).save(path)
    heard = [str(write_sound(folder / f"{seed}.wav", 1.0 + 0.25 * seed, seed)) for seed in range(sounds)]
    return pictures, heard


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows.norm(dim=1)
