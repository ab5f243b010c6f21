"""What more modalities are worth: in a context, and in pretraining (MiCo, arXiv 2406.09412), whatever comes out.

Context: one model of all four; held-out samples have one, two, three or four of them, in every combination.
Pretraining: models that were pretrained with one to four of them, by as many samples, measured with images alone.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.demo.mico import views
from onepeace_fast.demo.mico.views import FIRST, MODALITIES, SIDE, Sets
from onepeace_fast.demo.training import fit, timed
from onepeace_fast.models.mico import EvaConfig, Mico, MicoConfig, TextConfig

WIDTH = 64
GROUPS = 3  # of ten digits in a batch
MEASURED = 20  # groups of ten held-out samples
RETRIEVAL, MATCHING = "retrieval", "classification"
SETS = tuple(names for count in range(1, 5) for names in combinations(MODALITIES, count))


@dataclasses.dataclass
class Result:
    """One run; shares of right digits throughout.

    Attributes:
        seed: of weights and batches.
        steps: of each pretraining.
        samples: that were measured with.
        seconds: of each part.
        context: {modalities, joined by +: {"retrieval": share, "classification": share}} of the model of all four.
        pretraining: {number of modalities: {"images alone", "all of them": {...}}}.
    """

    seed: int
    steps: int
    samples: int
    seconds: dict[str, float]
    context: dict[str, dict[str, float]]
    pretraining: dict[str, dict[str, dict[str, float]]]

    def of_size(self, count: int, measure: str) -> list[float]:
        """The shares of each combination of so many modalities."""
        return [found[measure] for name, found in self.context.items() if len(name.split("+")) == count]

    def figures(self) -> dict[str, float]:
        """The figures that a reader compares."""
        found: dict[str, float] = {}
        for measure in (RETRIEVAL, MATCHING):
            for count in range(1, 5):
                found[f"{measure}, {count} in the context"] = statistics.mean(self.of_size(count, measure))
            for known, of in self.pretraining.items():
                found |= {f"{measure}, {what}, pretrained with {known}": one[measure] for what, one in of.items()}
        return found


def fresh(modalities: Sequence[str], seed: int) -> Mico:
    """An untrained model of these modalities."""
    torch.manual_seed(seed)
    model = Mico(
        MicoConfig(
            vision=EvaConfig(
                image_size=SIDE, patch_size=4, width=WIDTH, head_width=32, layers=2, ffn_dim=2 * WIDTH, output_dim=8
            ),
            text=TextConfig(
                vocab_size=FIRST + 10, width=WIDTH, ffn_dim=2 * WIDTH, layers=2, heads=2, max_positions=4, mask_id=1,
                first_word=views.WORDS[0],
            ),
            contra_dim=32,
            frames=dict.fromkeys(modalities, 1),
            matching_weight=1.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= (768 / WIDTH) ** 0.5  # the initial weights suit the width of 768
    return model


def pretrain(model: Mico, sets: Sets, steps: int, seed: int) -> Mico:
    """Train in place by VAST's losses, and return the model; each sample has some of its modalities."""
    modalities = [*model.config.frames]
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        batch = views.draw(sets.training, modalities, GROUPS, generator)
        return model.losses(batch.text, samples=batch.samples, generator=generator, **batch.frames)["loss"]

    fit(model, loss, steps, f"pretraining with {', '.join(modalities)}")
    return model


@torch.no_grad()
def measure(model: Mico, frames: Mapping[str, Any], digits: Tensor) -> dict[str, float]:
    """The share of samples that find their caption among ten: by features, and by matching it with the context."""
    text = views.captions(range(10))
    found = model.embed(text=text, **frames)
    nearest = (found["union"] @ found["text"].t()).argmax(1)
    of = torch.arange(len(digits), device="cpu").repeat_interleave(10).tolist()
    likeliest = model.match(text.repeat(len(digits), 1), of=of, **frames).view(-1, 10).argmax(1)
    return {name: (one == digits).double().mean().item() for name, one in
            ((RETRIEVAL, nearest), (MATCHING, likeliest))}  # fmt: skip


def run(sets: Sets, seed: int, steps: int) -> Result:
    """Everything of one seed."""
    frames, digits = views.held_out(sets.held_out, MEASURED)
    seconds: dict[str, float] = {}
    pretraining: dict[str, dict[str, dict[str, float]]] = {}
    for count in range(1, 5):
        with timed(seconds, f"pretraining with {count}"):
            model = pretrain(fresh(MODALITIES[:count], seed), sets, steps, seed)
            known = {name: frames[name] for name in MODALITIES[:count]}
            pretraining[str(count)] = {
                "images alone": measure(model, {"vision": frames["vision"]}, digits),
                "all of them": measure(model, known, digits),
            }  # fmt: skip
    with timed(seconds, "contexts"):
        context = {"+".join(names): measure(model, {n: frames[n] for n in names}, digits) for names in SETS}
    return Result(seed, steps, len(digits), seconds, context, pretraining)
