"""What the demo does: train a small ONE-PEACE by image-text contrast, name held-out digits, compare the backends."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from onepeace_fast.backend import BACKENDS, use_backend
from onepeace_fast.config import ImageAdapterConfig, OnePeaceConfig, TextAdapterConfig, TransformerConfig
from onepeace_fast.demo import data
from onepeace_fast.demo.data import END, PADDING, SIDE, Digits, Vocabulary, caption, draw_batch
from onepeace_fast.models.losses import contrastive_loss
from onepeace_fast.models.pretrain import OnePeacePretrain

WIDTH = 128
GROUPS = 4  # of ten digits each in a training batch
LEARNING_RATE = 1e-3
ROWS = 60  # image-caption pairs in a batch of the comparison
ROUNDS = 5
PATCHES = (SIDE // 16) ** 2

Pair = tuple[Tensor, Tensor]


def configuration(vocabulary_size: int) -> OnePeaceConfig:
    """A ONE-PEACE of text and image, small enough for a CPU. The decoder, of no use to contrast, is tiny."""
    image = ImageAdapterConfig(position_grid=SIDE // 16, bias_grid=SIDE // 16)
    encoder = TransformerConfig(
        embed_dim=WIDTH, ffn_embed_dim=2 * WIDTH, layers=4, attention_heads=4, drop_path_rate=0.1, layer_scale=None,
        image=image, audio=None,
    )  # fmt: skip
    decoder = TransformerConfig(
        embed_dim=16, ffn_embed_dim=16, layers=1, attention_heads=1, layer_scale=None,
        text=TextAdapterConfig(use_bias=False), image=None, audio=None,
    )  # fmt: skip
    return OnePeaceConfig(encoder=encoder, decoder=decoder, vocab_size=vocabulary_size)


def build(vocabulary_size: int) -> OnePeacePretrain:
    """The untrained model. Its initial weights suit the width of 1536; a narrow one needs larger ones to start."""
    model = OnePeacePretrain(configuration(vocabulary_size))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= (1536 / WIDTH) ** 0.5
    return model


def contrast(model: OnePeacePretrain, text: Tensor, image: Tensor) -> Tensor:
    """Image-text contrast inside each group of ten pairs, averaged over the groups."""
    scale = model.logit_scale_exp()
    groups = zip(model.embed(image=image).split(10), model.embed(text=text).split(10), strict=True)
    return torch.stack([contrastive_loss(a, b, scale)[0] for a, b in groups]).mean()


def train(model: OnePeacePretrain, digits: Digits, vocabulary: Vocabulary, steps: int, seed: int) -> list[float]:
    """Train in place and return the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    device = model.logit_scale.device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    parameters = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses = []
    model.train()
    for _ in (progress := tqdm(range(steps), desc="Training", unit="step", mininterval=1.0)):
        text, image = draw_batch(digits, GROUPS, vocabulary, generator)
        loss = contrast(model, text.to(device), image.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{statistics.mean(losses[-20:]):.3f}", refresh=False)
    model.eval()
    return losses


@torch.no_grad()
def accuracies(model: OnePeacePretrain, digits: Digits, vocabulary: Vocabulary) -> dict[str, float]:
    """For each held-out template: how many digits find, among its ten captions, their own as the nearest by cosine."""
    device = model.logit_scale.device
    images = torch.cat([model.embed(image=part) for part in digits.images.to(device).split(ROWS)])
    result = {}
    for template in data.HELD_OUT_TEMPLATES:
        captions = vocabulary.encode([caption(template, digit) for digit in range(10)])
        nearest = (images @ model.embed(text=captions.to(device)).t()).argmax(1).cpu()
        result[template] = (nearest == digits.labels).float().mean().item()
    return result


def pair_batches(digits: Digits, vocabulary: Vocabulary) -> list[Pair]:
    """Every image with a caption of its own, templates in turn: batches of texts and images."""
    templates = data.TRAINING_TEMPLATES + data.HELD_OUT_TEMPLATES
    captions = [caption(templates[row % len(templates)], d) for row, d in enumerate(digits.labels.tolist())]
    starts = range(0, len(captions), ROWS)
    return [(vocabulary.encode(captions[i : i + ROWS]), digits.images[i : i + ROWS]) for i in starts]


def token_counts(batches: Sequence[Pair]) -> tuple[int, int]:
    """Tokens that the padded layout computes, and real ones, CLS of each modality included."""
    padded = sum(len(text) * (1 + text.shape[1] + 1 + PATCHES) for text, _ in batches)
    real = sum(int((text != PADDING).sum()) + len(text) * (2 + PATCHES) for text, _ in batches)
    return padded, real


class Comparison(NamedTuple):
    """The two backends on one device: largest differences, largest values they belong to, and seconds of each."""

    differences: dict[str, float]
    magnitudes: dict[str, float]
    seconds: dict[str, float]


def compare(model: OnePeacePretrain, batches: Sequence[Pair], rounds: int = ROUNDS) -> Comparison:
    """Run the same pairs through both backends: embeddings, pair outputs, gradients, and the time of the outputs."""
    device = model.logit_scale.device
    batches = [(text.to(device), image.to(device)) for text, image in batches]
    results = {name: _results(model, batches, name) for name in BACKENDS}
    differences, magnitudes = {}, {}
    for what, expected in results["reference"].items():
        got = results["fused"][what]
        differences[what] = max((a - b).abs().max().item() for a, b in zip(expected, got, strict=True))
        magnitudes[what] = max(a.abs().max().item() for a in expected)
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(rounds):
        for name in BACKENDS:
            times[name].append(_seconds(model, batches, name))
    return Comparison(differences, magnitudes, {name: statistics.median(values) for name, values in times.items()})


def _results(model: OnePeacePretrain, batches: Sequence[Pair], backend: str) -> dict[str, list[Tensor]]:
    embeddings, outputs = [], []
    with use_backend(backend):
        for text, image in batches:
            with torch.no_grad():
                embeddings += [model.embed(text=text), model.embed(image=image)]
                encoded = model.encode(text=text, image=image)
            # What stands at padding means nothing; column 0 is CLS.
            real = torch.cat([torch.full_like(text[:, :1], END), text], dim=1) != PADDING
            outputs += [encoded["text"][real], encoded["image"]]
        model.zero_grad()
        text, image = batches[0]
        # Each image against its neighbour's caption: on the right pairs a trained model's gradients are next to zero.
        contrast(model, text.roll(1, 0), image).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return {"embeddings": embeddings, "encoder outputs": outputs, "gradients": gradients}


@torch.no_grad()
def _seconds(model: OnePeacePretrain, batches: Sequence[Pair], backend: str) -> float:
    wait = torch.cuda.synchronize if model.logit_scale.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    with use_backend(backend):
        for text, image in batches:
            model.encode(text=text, image=image)
    wait()
    return time.perf_counter() - start
