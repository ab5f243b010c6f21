"""Whole pretraining steps, forward and backward, from waveforms, pixels and token ids to every gradient.

The fused backend runs all gradient-carrying passes of a step as one packed call and embeds each input once; the
reference runs upstream's passes one after another and embeds for each. Both take the same masks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support import shapes
from benchmarks.support.report import Report
from benchmarks.support.shapes import Sizes
from benchmarks.support.timing import backends, paired
from onepeace_fast import OnePeaceConfig, OnePeacePretrain
from onepeace_fast.config import AudioAdapterConfig, TransformerConfig
from onepeace_fast.training.masks import audio_language_masks, vision_language_masks

pytestmark = pytest.mark.full

SIZES = Sizes(width=256, hidden=1024, heads=4, layers=4)
SAMPLES, CHANNELS, VOCABULARY, PADDING, END = 4, 32, 1000, 1, 2
SECONDS = 8
TASKS = ("vision_language_loss", "audio_language_loss")
TITLE = (
    f"Pretraining step, forward + backward, adapters and decoder included: {SIZES.layers} layers, width {SIZES.width},"
    f" hidden {SIZES.hidden}, {SIZES.heads} heads, batch {SAMPLES}, float32"
)


def build(task: str) -> OnePeacePretrain:
    """A small ONE-PEACE with the modalities of a task."""
    other = "image" if task == "vision_language_loss" else "audio"
    layers = ((CHANNELS, 10, 5), *((CHANNELS, 3, 2),) * 4, *((CHANNELS, 2, 2),) * 2)
    audio = AudioAdapterConfig(feature_layers=layers) if other == "audio" else None
    decoder = OnePeaceConfig().decoder
    sections = {"text": decoder.text, "image": None, "audio": None, other: getattr(decoder, other)}
    encoder = SIZES.config(["text", other])
    if audio is not None:
        encoder = TransformerConfig(**{**vars(encoder), "audio": audio})
    small = TransformerConfig(
        embed_dim=128, ffn_embed_dim=512, layers=2, attention_heads=2, layer_scale=None, **sections
    )  # fmt: skip
    torch.manual_seed(0)
    return OnePeacePretrain(OnePeaceConfig(encoder=encoder, decoder=small, vocab_size=VOCABULARY)).train()


def inputs(task: str, model: OnePeacePretrain, samples: int) -> dict[str, Tensor]:
    """Ragged captions with images of 257 tokens, or with clips of 3 to 8 seconds."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length - 1 for length in shapes.text(samples)]
    text = torch.randint(4, VOCABULARY, (samples, max(lengths)), generator=generator)
    ends = torch.tensor(lengths)[:, None] - 1
    place = torch.arange(max(lengths))
    text = text.masked_fill(place == ends, END).masked_fill(place > ends, PADDING)
    if task == "vision_language_loss":
        masks = vision_language_masks(text, text > END, 256, generator)
        return {"text": text, "image": torch.randn(samples, 3, 256, 256, generator=generator), "masks": masks}
    frames = [length - 1 for length in shapes.audio(samples, high=50 * SECONDS - 1)]
    audio = torch.randn(samples, 16_000 * SECONDS, generator=generator)
    width = model.encoder_wrapper.adapter("audio").frames(audio.shape[1])
    padding = torch.arange(width + 1) > torch.tensor(frames)[:, None]
    audio = audio.masked_fill(torch.arange(audio.shape[1]) >= torch.tensor(frames)[:, None] * 320 + 80, 0)
    masks = audio_language_masks(text, text > END, frames, generator, width=width)
    return {"text": text, "audio": audio, "audio_padding": padding, "masks": masks}


class PretrainingStep:
    """A model and a batch; a step leaves every gradient behind."""

    def __init__(self, task: str, samples: int) -> None:
        self.task, self.model = task, build(task)
        self.inputs = inputs(task, self.model, samples)

    def run(self, backend: str) -> Tensor:
        """One step with a backend; returns the loss."""
        for stack in (self.model.encoder_wrapper, self.model.decoder_wrapper):
            stack.backend = backend
        self.model.zero_grad()
        loss = self.model(self.task, **self.inputs)["loss"]
        loss.backward()
        return loss.detach()

    def check(self) -> None:
        """Raise unless both backends compute the same loss and gradients."""
        results = []
        for backend in ("reference", "fused"):
            loss = self.run(backend)
            results.append((loss, [p.grad for p in self.model.parameters() if p.grad is not None]))
        (loss, expected), (other, found) = results
        assert abs(other - loss) < 1e-5 * loss
        scale = max(value.norm() for value in expected)
        assert max((b - a).norm() for a, b in zip(expected, found, strict=True)) < 1e-4 * scale


@pytest.mark.parametrize("task", TASKS)
def test_pretraining_step(task: str, benchmark: Any, report: Report, case_seconds: float, threads: int) -> None:
    """One task: a timed reference step before every timed step of the fused backend."""
    PretrainingStep(task, samples=2).check()  # the time of a wrong result is worth nothing
    step = PretrainingStep(task, SAMPLES)
    fused, reference = paired(
        benchmark, lambda: step.run("fused"), lambda: step.run("reference"), seconds=case_seconds, rounds=9
    )
    measured, shown = backends(reference, fused, threads)
    measured = {"task": task, **measured}
    benchmark.extra_info.update(measured)
    shown = {"task": task.removesuffix("_loss"), **shown}
    report.add(TITLE, shown, measured)
    report.footers[TITLE] = f"Wall-clock medians (min-max), {threads} threads, both backends in turn."
