"""Tiny manifests and configurations of UnIVAL runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import yaml

CHANNELS = 6
MODEL = {
    "embed_dim": 16, "ffn_dim": 24, "attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1,
    "token_bucket_size": 8, "image_bucket_size": 4, "max_source_positions": 64, "max_target_positions": 32,
    "code_image_size": 16, "feature_channels": CHANNELS, "vocab_size": 320,
}  # fmt: skip
STAGES = [
    {"tasks": ["caption", "vqa", "grounding", "matching"], "steps": 3},
    {"tasks": ["caption", "video_caption"], "steps": 4},
]
WORDS = ("red", "green", "blue")
SHAPES = {"image": (CHANNELS, 2, 2), "video": (CHANNELS, 2, 1, 2), "audio": (CHANNELS, 3, 1)}


def write_tasks(folder: Path, name: str = "tasks.jsonl") -> Path:
    """Maps, each of one colour's feature, and a few samples of every task, of unlike numbers."""
    for modality, shape in SHAPES.items():
        for place, _ in enumerate(WORDS):
            values = numpy.zeros(shape, "float32")
            values[place] = 3.0
            numpy.save(folder / f"{modality}{place}.npy", values)
    rows: list[dict[str, Any]] = []
    for place, word in enumerate(WORDS):
        image = {"image": f"image{place}.npy"}
        rows += [
            {"task": "caption", **image, "caption": f"a {word} wall"},
            {"task": "vqa", **image, "question": "what colour is the wall?", "answer": word},
            {"task": "vqa", **image, "question": "of what colour is it?", "answer": word},
            {"task": "grounding", **image, "text": f"the {word} one", "box": [0, place / 4, 0.5, 1]},
            {"task": "matching", **image, "caption": f"a {word} wall", "answer": "yes"},
            {"task": "matching", **image, "caption": f"a {WORDS[place - 1]} wall", "answer": "no"},
            {"task": "video_caption", "video": f"video{place}.npy", "caption": f"a {word} light goes on and off"},
            {"task": "audio_caption", "audio": f"audio{place}.npy", "caption": f"a {word} sound"},
        ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_unival(folder: Path, name: str = "run", **keys: Any) -> Path:
    """A YAML of a run of seven steps into ``folder/name``; keywords override or add keys, None removes one."""
    values = {
        "family": "unival", "manifest": "tasks.jsonl", "output": name, "model": MODEL, "stages": STAGES, "bins": 11,
        "batch_size": 8, "learning_rate": 0.01, "warm_up": 1, "device": "cpu", "backend": "reference",
        "workers": 0, "log_every": 1, "checkpoint_every": 2,
    }  # fmt: skip
    values = {key: value for key, value in (values | keys).items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
