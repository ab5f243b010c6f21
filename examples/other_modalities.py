"""Signals and other modalities that the library has adapters for: a tiny training of each, in seconds on a CPU.

    python examples/other_modalities.py            # all of them
    python examples/other_modalities.py signal     # one, or some

Each is added to a small model of text and trained by contrast with captions alone. What counts is how many of the
samples that it never saw find the caption of their class. docs/new_modality.md explains each step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import OnePeaceConfig, OnePeacePretrain
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers.adapters import (
    Adapter,
    DepthAdapter,
    GraphAdapter,
    NormalAdapter,
    PointAdapter,
    SignalAdapter,
    TableAdapter,
)

SMALL = TransformerConfig(
    embed_dim=32, ffn_embed_dim=64, layers=2, attention_heads=2, layer_scale=None, image=None, audio=None
)


class Samples(NamedTuple):
    """The model's inputs of some samples, and the class of each."""

    inputs: dict[str, Tensor]
    labels: Tensor


class Task(NamedTuple):
    """A modality, samples to train with, others to hold out, and how many classes there are."""

    adapter: Adapter
    training: Samples
    held_out: Samples
    classes: int


def signal() -> Task:
    """Which of three frequencies a noisy tone has; training is at 50 and 100 readings a second, the test at 200."""
    adapter = SignalAdapter(SMALL, channels=1, rate=50.0, patch=10)

    def tones(count: int, rates: Sequence[float]) -> Samples:
        labels, found = torch.arange(count) % 3, []
        for place, label in enumerate(labels.tolist()):
            rate = rates[place // 3 % len(rates)]
            seconds = torch.arange(round((0.8 + torch.rand(()).item()) * rate)) / rate
            angle = 2 * torch.pi * ((1.0, 4.0, 10.0)[label] * seconds + torch.rand(()))
            found.append((angle.sin() + 0.3 * torch.randn(len(seconds)))[:, None])
        used = [rates[place // 3 % len(rates)] for place in range(count)]
        return Samples(adapter.batch("signal", found, used), labels)

    return Task(adapter, tones(240, [50.0, 100.0]), tones(90, [200.0]), classes=3)


def table() -> Task:
    """Whether a number is above the limit of its row's category; another column is noise, in part missing."""
    limits = {"low": 10.0, "middle": 20.0, "high": 30.0}
    adapter = TableAdapter(SMALL, {"level": (20.0, 10.0), "noise": (0.0, 1.0)}, {"kind": list(limits)})

    def rows(count: int) -> Samples:
        found, labels = [], []
        for place in range(count):
            kind = [*limits][place % 3]
            above = int(torch.rand(()) < 0.5)
            level = limits[kind] + (2 * above - 1) * (2 + 8 * torch.rand(()).item())
            noise = torch.randn(()).item() if place % 4 else None
            labels.append(above)
            found.append({"level": level, "noise": noise, "kind": kind})
        return Samples(adapter.batch("table", found), torch.tensor(labels))

    return Task(adapter, rows(3000), rows(200), classes=2)


def depth() -> Task:
    """Whether a bumpy wall is at arm's length, across a room or across a street; one pixel in ten is not known."""
    adapter = DepthAdapter(SMALL, position_grid=2, bias_grid=2)

    def maps(count: int) -> Samples:
        labels = torch.arange(count) % 3
        metres = torch.tensor([0.5, 3.0, 20.0])[labels, None, None] * (0.7 + 0.6 * torch.rand(count, 32, 32))
        known = torch.rand(count, 32, 32) > 0.1
        return Samples({"depth": (metres * known)[:, None]}, labels)

    return Task(adapter, maps(400), maps(100), classes=3)


def normals() -> Task:
    """Whether a surface bends towards the viewer or away: normals that point away from its middle, or to it."""
    adapter = NormalAdapter(SMALL, position_grid=2, bias_grid=2)

    def maps(count: int) -> Samples:
        labels = torch.arange(count) % 2
        side = torch.linspace(-1, 1, 32)
        plane = torch.stack(torch.meshgrid(side, side, indexing="ij"))[None] + 0.5 * torch.randn(count, 2, 1, 1)
        bent = (2 * labels - 1)[:, None, None, None] * plane
        vectors = torch.cat([bent, torch.ones(count, 1, 32, 32)], dim=1)
        return Samples({"normals": F.normalize(vectors, dim=1)}, labels)

    return Task(adapter, maps(400), maps(100), classes=2)


def points() -> Task:
    """Along which axis a stick lies that is somewhere in space, seen as 20 to 120 points of its surface."""
    adapter = PointAdapter(SMALL, groups=8, members=8, bias_grid=4)

    def clouds(count: int) -> Samples:
        labels, found = torch.arange(count) % 3, []
        for label in labels.tolist():
            sizes = torch.full((3,), 0.05).index_fill(0, torch.tensor(label), 0.5)
            cloud = sizes * (2 * torch.rand(int(torch.randint(20, 120, ())), 3) - 1)
            found.append(cloud + 0.8 * torch.rand(3) - 0.4)
        return Samples(adapter.batch("points", found), labels)

    return Task(adapter, clouds(240), clouds(60), classes=3)


def graph() -> Task:
    """Whether a graph is a chain, a star or a binary tree, of 6 to 20 nodes in any order behind the root."""
    adapter = GraphAdapter(SMALL, features=1, deepest=7)

    def graphs(count: int) -> Samples:
        labels, found = torch.arange(count) % 3, []
        for label in labels.tolist():
            nodes = int(torch.randint(6, 21, ()))
            before = [[node, (node - 1, 0, (node - 1) // 2)[label]] for node in range(1, nodes)]
            order = F.pad(1 + torch.randperm(nodes - 1), (1, 0))  # the root stays node 0
            found.append((torch.randn(nodes, 1), order[torch.tensor(before)]))
        return Samples(adapter.batch("graph", found), labels)

    return Task(adapter, graphs(300), graphs(90), classes=3)


TASKS: dict[str, Callable[[], Task]] = {
    "signal": signal,
    "table": table,
    "depth": depth,
    "normals": normals,
    "points": points,
    "graph": graph,
}


def learn(name: str, steps: int = 60) -> dict[str, float]:
    """Train one modality; the first and the last loss, and the accuracy on what was held out beside that of chance."""
    torch.manual_seed(0)
    adapter, training, held_out, classes = TASKS[name]()
    model = OnePeacePretrain(OnePeaceConfig(encoder=SMALL, decoder=SMALL, vocab_size=100))
    model.add_modality(name, adapter, init_from="text")
    model.train_only(name)
    with torch.no_grad():
        captions = model.embed(text=torch.randint(4, 100, (classes, 8)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(len(training.labels))[:48]
        batch = {key: value[chosen] for key, value in training.inputs.items()}
        scores = model.logit_scale_exp() * model.embed(**batch) @ captions.t()
        loss = F.cross_entropy(scores, training.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        found = (model.eval().embed(**held_out.inputs) @ captions.t()).argmax(1)
    right = (found == held_out.labels).float().mean().item()
    return {"first": losses[0], "last": losses[-1], "right": right, "chance": 1 / classes}


def main(names: Sequence[str]) -> None:
    """Train each and print a line."""
    if unknown := set(names) - set(TASKS):
        raise SystemExit(f"NAME: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    for name in names or TASKS:
        found = learn(name)
        print(
            f"{name}: loss {found['first']:.2f} to {found['last']:.2f}; {found['right']:.0%} of samples held out find "
            f"their caption, by chance {found['chance']:.0%}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
