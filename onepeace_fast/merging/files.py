"""Writes an average in the form of the models that it is of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.merging.sources import FOLDER, PICKLE, SAFETENSORS, Source
from onepeace_fast.models.upstream import CONFIG_FILE, WEIGHTS_FILE
from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import TOKENIZER_FILE, TRAINING_FILE


def check_out(sources: list[Source], out: Path) -> None:
    """Raise ``ValueError`` where a file of these models cannot be written under this name."""
    forms = sorted({source.form for source in sources})
    require(len(forms) == 1, f"models: expected files of one form, got {' and '.join(forms)}")
    require(out.parent.is_dir(), f"{out}: expected a name in a folder that exists, got none")
    fits = {FOLDER: not out.is_file(), SAFETENSORS: out.suffix == ".safetensors" and not out.is_dir()}
    fits[PICKLE] = out.suffix in (".pt", ".pkl") and not out.is_dir()
    require(fits[forms[0]], f"{out}: expected {forms[0]}, as the models are, got another name")
    full = out.is_dir() and any(out.iterdir())  # such as the checkpoint that a run goes on from
    require(not full, f"{out}: expected a new folder or an empty one, got one with files in it")


def write(sources: list[Source], merged: Mapping[str, Tensor], out: Path) -> None:
    """Write the average with the first model's settings; each file under another name first, then in one step.

    Optimizers, steps and checksums of the models are not of the average, and left out. Of a training stay its settings,
    by which files are read, and the modalities that one of the models was trained on.
    """
    first = sources[0]
    if first.form == FOLDER:
        out.mkdir(exist_ok=True)
        _replace(out / WEIGHTS_FILE, lambda path: save_file(dict(merged), path))
        settings = json.dumps(first.settings, indent=2) + "\n"
        _replace(out / CONFIG_FILE, lambda path: path.write_text(settings, encoding="utf-8"))
        words = next((source.tokenizer for source in sources if source.tokenizer is not None), None)
        if words is not None:
            _replace(out / TOKENIZER_FILE, lambda path: path.write_bytes(words))
        if trainings := [source.training for source in sources if source.training is not None]:
            state = dict(trainings[0])
            if all("trained" in one for one in trainings):
                state["trained"] = list(dict.fromkeys(name for one in trainings for name in one["trained"]))
            _replace(out / TRAINING_FILE, lambda path: checkpoint.save_state(state, path))
    elif first.form == SAFETENSORS:
        _replace(out, lambda path: save_file(dict(merged), path))
    else:
        whole = dict(merged) if first.settings is None else {**first.settings, "model": dict(merged)}
        _replace(out, lambda path: torch.save(whole, path))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    draft = path.with_name(f"{path.name}.new")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
