"""Tiny corpora and configurations for runs of the training command."""

from __future__ import annotations

import dataclasses
import math
import struct
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from models._small import small_config

for package in ("yaml", "tensorboard", "tokenizers", "PIL", "soundfile", "scipy", "tqdm"):
    pytest.importorskip(package)  # and so for every file of tests that imports this one

import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

# TensorBoard reads files of one second by a counter in their names, in which 10 comes before 9: start behind both.
event_file_writer._global_uid = event_file_writer.AtomicCounter(100)

FEATURES = [[8, 80, 40], [8, 8, 8]]  # 50 frames a second
COLOURS = ("red", "green", "blue", "yellow", "grey", "white", "black", "brown", "pink", "orange")


def write_images(folder: Path, count: int = 10) -> None:
    """Images of one colour each, and images.tsv."""
    lines = ["image\tcaption"]
    for place in range(count):
        name = f"{place}.png"
        Image.new("RGB", (50, 40), (20 * place % 256, 70 * place % 256, 255 - 20 * place)).save(folder / name)
        lines.append(f"{name}\ta {COLOURS[place % 10]} rectangle seen from the front, number {place}")
    (folder / "images.tsv").write_text("\n".join(lines) + "\n")


def write_clips(folder: Path, count: int = 10) -> None:
    """Tones of a tenth of a second and more, and clips.tsv."""
    lines = ["audio\tcaption"]
    for place in range(count):
        name, samples = f"{place}.wav", 1000 + 40 * place
        tone = [int(9000 * math.sin(0.05 * (place + 1) * i)) for i in range(samples)]
        with wave.open(str(folder / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(struct.pack(f"<{samples}h", *tone))
        lines.append(f"{name}\ta steady {COLOURS[place % 10]} tone, number {place}")
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n")


def small_fields(**encoder: Any) -> dict[str, Any]:
    """The key ``model`` of a model of a few thousand parameters with DropPath and dropout."""
    config = small_config(drop_path_rate=0.3, dropout=0.1, decoder={"dropout": 0.1}, **encoder)
    fields = dataclasses.asdict(config) | {"vocab_size": 300}
    fields["encoder"]["audio"]["feature_layers"] = FEATURES
    fields["encoder"]["added"] = fields["decoder"]["added"] = []
    del fields["decoder"]["audio"]["feature_layers"]
    return fields


def write_config(folder: Path, name: str = "run", **keys: Any) -> Path:
    """A YAML of a short stage-1 run into ``folder/run``; keywords override or add keys, None removes one."""
    values = {
        "stage": "vision_language",
        "manifest": "images.tsv",
        "output": name,
        "model": small_fields(),
        "batch_size": 4,
        "steps": 4,
        "learning_rate": 0.01,
        "warm_up": 2,
        "device": "cpu",
        "workers": 0,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    values = {key: value for key, value in (values | keys).items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def checkpoints(folder: Path) -> list[str]:
    """Names of what stands in a run's folder that begins with step-."""
    return sorted(path.name for path in folder.glob("step-*"))


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of a run's event files, as TensorBoard shows them; no step may stand twice."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    result = {}
    for tag in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(tag)
        result[tag] = {event.step: event.value for event in events}
        assert len(events) == len(result[tag]), tag
    return result


def same_training(folder: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits: weights, moments, generators, settings."""
    if (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        return False
    return _same(*(torch.load(path / "training.pt", weights_only=True) for path in (folder, other)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(_same(value, b[name]) for name, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
