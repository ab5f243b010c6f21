"""The trained model through both backends: whether they agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.backend import BACKENDS, use_backend
from onepeace_fast.demo import data
from onepeace_fast.demo.data import Digits, Vocabulary, caption, enlarge
from onepeace_fast.demo.experiment import contrast
from onepeace_fast.demo.result import Comparison
from onepeace_fast.demo.speech import Speech
from onepeace_fast.demo.waveform import waveforms
from onepeace_fast.models.pretrain import OnePeacePretrain

AGREEMENT = 1e-4  # of the largest value: float32 rounding stays far below, a mistake far above
ROWS = 60  # pairs in a batch
PAIRS = 120

Inputs = dict[str, Any]  # tensors by modality


def pair_batches(digits: Digits, speech: Speech, vocabulary: Vocabulary, pairs: int = PAIRS) -> list[Inputs]:
    """The first images and the first sounds, each with its caption; the templates take turns."""
    batches: list[Inputs] = []
    kinds: list[tuple[str, Sequence[str], list[int], Any, Callable[[Any], Tensor]]] = [
        ("image", data.IMAGE_TEMPLATES + data.HELD_OUT_TEMPLATES, digits.labels.tolist(), digits.images, enlarge),
        ("audio", data.SOUND_TEMPLATES, speech.labels, speech.sounds, waveforms),
    ]
    for kind, templates, labels, others, prepare in kinds:
        texts = [caption(templates[row % len(templates)], digit) for row, digit in enumerate(labels[:pairs])]
        for start in range(0, len(texts), ROWS):
            rows = slice(start, min(start + ROWS, pairs))
            batches.append({"text": vocabulary.encode(texts[rows]), kind: prepare(others[rows])})
    return batches


def compare(model: OnePeacePretrain, device: str, batches: Sequence[Inputs]) -> Comparison:
    """Run the same pairs through both backends on a device: embeddings, outputs, all gradients."""
    model.to(device).requires_grad_()
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    results = {name: _results(model, batches, name) for name in BACKENDS}
    compared = [_difference(results["reference"][what], results["fused"][what]) for what in results["reference"]]
    # Not "greater than", so that NaN disagrees and is the largest.
    agree = all(difference <= AGREEMENT * value for difference, value in compared)
    worst = max(compared, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / max(pair[1], 1e-30))
    return Comparison(device, agree, *worst)


def _difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference and the largest value of two lists of tensors; NaN wherever one is."""
    largest = [[(a - b).abs().max(), a.abs().max()] for a, b in zip(expected, got, strict=True)]
    difference, value = torch.tensor(largest, dtype=torch.float64, device="cpu").numpy().max(0).tolist()
    return difference, value


def _results(model: OnePeacePretrain, batches: Sequence[Inputs], backend: str) -> dict[str, list[Tensor]]:
    embeddings, outputs = [], []
    model.zero_grad()
    with use_backend(backend):
        for batch in batches:
            with torch.no_grad():
                embeddings += [model.embed(**{name: value}) for name, value in batch.items()]
                encoded = model.encode(**batch)
            # What stands at padding means nothing.
            outputs += [encoded[name][mask] for name, mask in _real(model, batch).items()]
        for kind in ("image", "audio"):
            batch = next(batch for batch in batches if kind in batch)
            # With the neighbour's caption: on the right pairs a trained model's gradients are almost zero.
            text, other = batch["text"].roll(1, 0), batch[kind]
            contrast(model, model.embed(**{kind: other}), model.embed(text=text)).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return {"embeddings": embeddings, "encoder outputs": outputs, "gradients": gradients}


def _real(model: OnePeacePretrain, batch: Inputs) -> dict[str, Tensor]:
    """Which tokens are real, CLS first: bool [rows, length] of each modality."""
    adapters = model.encoder_wrapper.adapters
    return {name: adapters[name].valid(name, value, None) for name, value in batch.items()}
