"""What a batch of each stage costs by each backend: time, peak memory, and the tokens that padding adds."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from onepeace_fast import memory
from onepeace_fast.backend import BACKENDS, ENVIRONMENT_VARIABLE, use_backend
from onepeace_fast.demo import data, experiment
from onepeace_fast.demo.data import Digits, Vocabulary
from onepeace_fast.demo.result import Cost, TokenCount
from onepeace_fast.demo.speech import Speech
from onepeace_fast.models.pretrain import OnePeacePretrain

AUTOMATIC = "automatic"
COUNTED = 20  # batches of each stage whose tokens are counted
ROUNDS = 9  # of timing, a batch each; all backends take turns


class Stage(NamedTuple):
    """Batches as one stage draws them, and the contrast of one of them as a scalar to differentiate."""

    batches: list[dict[str, Tensor]]
    contrast: Callable[[Mapping[str, Tensor]], Tensor]


def stages(
    model: OnePeacePretrain, digits: Digits, speech: Speech, vocabulary: Vocabulary, seed: int
) -> dict[str, Stage]:
    """Both stages of a trained model, on its device."""
    generator = torch.Generator().manual_seed(seed)
    device = model.logit_scale.device
    captions = experiment.caption_embeddings(model, data.SOUND_TEMPLATES[:1], vocabulary)[0]
    pairs = [experiment.image_text_batch(digits, vocabulary, generator) for _ in range(COUNTED)]
    sounds = [experiment.audio_batch(speech, generator) for _ in range(COUNTED)]
    (_, labels), *_ = sounds  # every batch holds the digits in the same order

    def of(batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [{name: value.to(device) for name, value in batch.items()} for batch in batches]

    return {
        "image-text": Stage(of(pairs), lambda batch: experiment.image_text_contrast(model, **batch)),
        "audio-text": Stage(
            of([batch for batch, _ in sounds]),
            lambda batch: experiment.contrast(model, model.embed(**batch), captions[labels]),
        ),
    }


def count_tokens(model: OnePeacePretrain, parts: Mapping[str, Stage]) -> list[TokenCount]:
    """Real and padded tokens of all batches, CLS included."""
    adapters = model.encoder_wrapper.adapters
    counts = []
    for name, stage in parts.items():
        for modality in stage.batches[0]:
            masks = [adapters[modality].valid(modality, batch[modality], None) for batch in stage.batches]
            real, padded = (sum(numbers) for numbers in zip(*((int(m.sum()), m.numel()) for m in masks), strict=True))
            counts.append(TokenCount(name, modality, real, padded))
    return counts


def measure(model: OnePeacePretrain, parts: Mapping[str, Stage]) -> list[Cost]:
    """Median time and peak memory of a batch, forward and backward, with what trains in its stage."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    costs = []
    model.train()
    with torch.random.fork_rng():
        for name, stage in parts.items():
            for key, parameter in model.named_parameters():  # stage 2 left its own frozen
                parameter.requires_grad_(trained[key] or name == "image-text")
            costs += _measure(model, name, stage)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trained[key])
    model.eval()
    return costs


def _measure(model: OnePeacePretrain, name: str, stage: Stage) -> list[Cost]:
    def step(backend: str, batch: Mapping[str, Tensor]) -> None:
        with chosen(backend):
            stage.contrast(batch).backward()

    # Where the environment names a backend, nothing is automatic.
    backends = BACKENDS if os.environ.get(ENVIRONMENT_VARIABLE) else (*BACKENDS, AUTOMATIC)
    device = model.logit_scale.device
    peaks = {}
    for backend in backends:
        step(backend, stage.batches[0])  # the first call of all is slower
        model.zero_grad()
        peaks[backend] = peak_bytes(partial(step, backend, stage.batches[0]), device)
        model.zero_grad()
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for batch in stage.batches[:ROUNDS]:
        for backend in backends:
            times[backend].append(_seconds(partial(step, backend, batch), device))
            model.zero_grad()
    return [Cost(name, backend, statistics.median(times[backend]), peaks[backend]) for backend in backends]


def chosen(backend: str) -> contextlib.AbstractContextManager[Any]:
    """Run by a backend, or by what a model takes when nobody says which."""
    return contextlib.nullcontext() if backend == AUTOMATIC else use_backend(backend)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The highest sum of a call's allocations less what it freed."""
    if device.type == "cuda":
        return memory.peak_bytes(call, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print two lines each time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start
