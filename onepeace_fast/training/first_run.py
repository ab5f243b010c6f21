"""The data set and the configuration of ``onepeace-fast train --first-run``: drawn shapes with captions."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

from onepeace_fast.checks import require

FOLDER = Path("first_run")
CONFIGURATION, TRAINING, HELD_OUT = "first_run.yaml", "train.tsv", "held_out.tsv"
SIDE = 64  # pixels: the configuration's grid of 4 x 4 patches
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "grey", "brown")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 7, "large": 14}  # pixels from the centre
PLACES = {"top left": (18, 18), "top right": (45, 18), "bottom left": (18, 45), "bottom right": (45, 45)}
HELD_OUT_COUNT = 48
WORDINGS = ("a {size} {colour} {shape} at the {place}", "at the {place} there is a {shape}, {colour} and {size}")

# It learns in under a minute on a CPU; examples/ has a configuration for real files.
CONFIGURATION_TEXT = f"""\
# Stage 1 on {{pairs}} drawn pictures; written by onepeace-fast train --first-run. docs/training.md explains every key.
stage: vision_language
manifest: {TRAINING}
output: run

model:
  vocab_size: 400
  encoder:
    embed_dim: 64
    ffn_embed_dim: 128
    layers: 2
    attention_heads: 4
    layer_scale: null
    checkpoint_activations: false
    text: {{{{bucket_size: 32}}}}
    image: {{{{position_grid: 4, bias_grid: 4}}}}
    audio: null
  decoder:
    embed_dim: 64
    ffn_embed_dim: 128
    layers: 1
    attention_heads: 2
    text: {{{{bucket_size: 32, use_bias: false}}}}
    image: {{{{position_grid: 4, bias_grid: 4}}}}
    audio: null

initial_scale: 5                   # narrow models need larger weights to start
batch_size: 32
steps: 200
warm_up: 30
learning_rate: 3e-3
workers: 0
"""


def prepare(folder: Path = FOLDER) -> Path:
    """Write pictures, two manifests and a configuration where there are none yet; returns the configuration.

    Raises:
        ValueError: the folder is there and holds something else.
    """
    path = folder / CONFIGURATION
    if path.is_file():  # of an earlier first run, which goes on as its file now says
        return path
    require(
        not folder.exists(),
        f"{folder}: expected no such folder, or one with {CONFIGURATION} in it, got another; move it or change folders",
    )
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "pictures").mkdir(parents=True)
    kinds = [dict(zip(("size", "colour", "shape", "place"), kind, strict=True)) for kind in _kinds()]
    lines: dict[str, list[str]] = {TRAINING: [], HELD_OUT: []}
    for number, kind in enumerate(kinds):
        name = f"pictures/{'_'.join(kind.values()).replace(' ', '_')}.png"
        _draw(draft / name, **kind)
        captions = [wording.format(**kind) for wording in WORDINGS]
        # A picture that is held out has both captions, either of which is right; in training one is drawn for each.
        if number < HELD_OUT_COUNT:
            lines[HELD_OUT] += [f"{name}\t{caption}" for caption in captions]
        else:
            lines[TRAINING].append(f"{name}\t{captions[number % len(captions)]}")
    for manifest, rows in lines.items():
        (draft / manifest).write_text("\n".join(["image\tcaption", *rows]) + "\n", encoding="utf-8")
    text = CONFIGURATION_TEXT.format(pairs=len(lines[TRAINING]))
    (draft / CONFIGURATION).write_text(text, encoding="utf-8")
    os.rename(draft, folder)
    return path


def _kinds() -> list[tuple[str, ...]]:
    """Every combination once, shuffled, the same way each time."""
    kinds: list[tuple[str, ...]] = list(itertools.product(SIZES, COLOURS, SHAPES, PLACES))
    random.Random(0).shuffle(kinds)
    return kinds


def _draw(path: Path, *, size: str, colour: str, shape: str, place: str) -> None:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    (x, y), reach = PLACES[place], SIZES[size]
    box = (x - reach, y - reach, x + reach, y + reach)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - reach), (x - reach, y + reach), (x + reach, y + reach)], fill=colour)
    else:
        pen.line(box, fill=colour, width=4)
        pen.line((x - reach, y + reach, x + reach, y - reach), fill=colour, width=4)
    image.save(path)
