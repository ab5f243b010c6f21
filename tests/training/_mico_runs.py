"""Tiny manifests, tokenizers and configurations of MiCo runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from PIL import Image

SIDE = 8
WORDS = ("red", "green", "blue", "grey")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "a", "wall", "it", "sounds", "##s", "light", "on")
MODEL = {
    "vision": {"image_size": SIDE, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8, "ffn_dim": 20,
               "output_dim": 6},
    "text": {"width": 12, "ffn_dim": 20, "layers": 2, "heads": 3, "max_positions": 9, "mask_id": 4, "first_word": 5},
    "contra_dim": 6, "frames": {"vision": 3, "audio": 2, "depth": 2, "normal": 2},
}  # fmt: skip


def write_tokenizer(path: Path, words: Sequence[str] = VOCABULARY) -> None:
    """A tokenizer.json of a few word pieces, as Hugging Face's files of BERT are."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: place for place, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer()
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    model.decoder = tokenizers.decoders.WordPiece()
    model.save(str(path))


def write_samples(folder: Path, side: int = SIDE) -> Path:
    """Images, frames, maps and spectrograms of four colours, and eight samples with unlike modalities."""
    generator = numpy.random.default_rng(5)
    rows: list[dict[str, Any]] = []
    for place, word in enumerate(WORDS):
        for frame in range(2):
            Image.new("RGB", (12, 10), word).point(lambda value, frame=frame: value // (frame + 1)).save(
                folder / f"{word}{frame}.png"
            )
        numpy.save(folder / f"{word}.npy", generator.normal(size=(1 + place % 2, side, side)).astype("float32"))
        both = [f"{word}0.png", f"{word}1.png"]
        rows += [
            {"caption": f"a {word} wall", "image": both[0], "depth": both[1]},
            {"caption": f"{word} light on", "video": both, "audio": f"{word}.npy", "subtitle": f"it sounds {word}"},
        ]
    rows[2] = {"caption": "a green wall", "normal": "green1.png", "image": None}
    rows[4] = {"caption": "a blue wall", "subtitle": "blue walls"}
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tokenizer(folder / "bert.json")
    return path


def write_mico(folder: Path, name: str = "run", **keys: Any) -> Path:
    """A YAML of a run of five steps into ``folder/name``; keywords override or add keys, None removes one."""
    values = {
        "family": "mico", "manifest": "samples.jsonl", "output": name, "tokenizer": "bert.json", "model": MODEL,
        "batch_size": 4, "steps": 5, "learning_rate": 0.01, "warm_up": 1, "device": "cpu", "backend": "reference",
        "workers": 0, "log_every": 1, "checkpoint_every": 2,
    }  # fmt: skip
    values = {key: value for key, value in (values | keys).items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
