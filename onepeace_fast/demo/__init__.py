"""The demo: handwritten digits and written captions, matched by a small ONE-PEACE (`onepeace-fast demo`)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from onepeace_fast.backend import BACKENDS
from onepeace_fast.demo import data, experiment
from onepeace_fast.info import command, format_table
from onepeace_fast.models.pretrain import OnePeacePretrain

STEPS = 300
AGREEMENT = 1e-4  # of the largest value: float32 rounding stays far below, a mistake far above


class NoSuchDevice(Exception):
    """The device asked for is not here."""


def run(seed: int = 0, steps: int | None = None, device: str | None = None) -> int:
    """Run the demo and print what it finds; returns 0, or 1 where the two backends disagree."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NoSuchDevice("--device cuda: torch sees no CUDA device here; leave the option out, or take cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    with one_thread():
        agree = _run(seed, steps or STEPS, device)
    print(f"\nThe demo took {time.perf_counter() - start:.0f} seconds.")
    return 0 if agree else 1


def _run(seed: int, steps: int, device: str) -> bool:
    training, held_out = data.load()
    vocabulary = data.Vocabulary()
    torch.manual_seed(seed)
    model = experiment.build(len(vocabulary)).to(device)
    _print_setup(model, len(training.labels), len(held_out.labels), steps, seed, device)

    losses = experiment.train(model, training, vocabulary, steps, seed)
    found = experiment.accuracies(model, held_out, vocabulary)
    last = statistics.mean(losses[-10:])
    print(f"Training loss: {losses[0]:.2f} at first, {last:.2f} at last; guessing among ten gives {math.log(10):.2f}.")
    accuracy = _print_accuracies(found)

    batches = experiment.pair_batches(held_out, vocabulary)
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    comparisons = {kind: experiment.compare(model.to(kind), batches) for kind in kinds}
    agree = _print_comparison(comparisons, experiment.token_counts(batches), len(held_out.labels))
    _print_conclusion(accuracy, agree, comparisons)
    return agree


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: tensors this small gain nothing from more, and lose much where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _print_setup(model: OnePeacePretrain, images: int, held_out: int, steps: int, seed: int, device: str) -> None:
    encoder = model.config.encoder
    count = sum(parameter.numel() for parameter in model.encoder_wrapper.parameters())
    backend = model.encoder_wrapper.resolved_backend
    example = f'"{data.caption(data.TRAINING_TEMPLATES[4], 3)}"'
    rows = [
        ("Images", f"{images:,} handwritten digits to learn from; {held_out} held out: the last three of the"),
        ("", "fourteen forms that people filled in"),
        ("Captions", f"{len(data.TRAINING_TEMPLATES)} sentences to learn from, such as {example};"),
        ("", f"{len(data.HELD_OUT_TEMPLATES)} other ones held out"),
        ("Model", f"{encoder.layers} layers of width {encoder.embed_dim}, {count:,} parameters: words and image"),
        ("", "patches share attention and have feed-forward weights of their own"),
        ("Task", "among the ten digits, find each image's caption and each caption's image"),
        ("Training", f"{steps} steps on {device}, seed {seed}, {backend} backend, one CPU thread"),
    ]
    print("A small ONE-PEACE learns to match handwritten digits with written captions.\n")
    print(format_table(rows) + "\n", flush=True)


def _print_accuracies(found: dict[str, float]) -> float:
    average = statistics.mean(found.values())
    rows = [(f'"{data.caption(template, 3)}"', f"{value:6.1%}") for template, value in found.items()]
    print("\nHeld-out digits, named by the nearest of ten captions (zero to nine) in a sentence never trained with:\n")
    print(format_table([*rows, ("average", f"{average:6.1%}"), ("a blind guess", f"{0.1:6.1%}")]))
    return average


def _print_comparison(comparisons: dict[str, experiment.Comparison], tokens: tuple[int, int], pairs: int) -> bool:
    padded, real = tokens
    print(f"\nThe same weights through both backends, on {pairs} held-out images, each with a caption:\n")
    rows, agree = [("device", "what", "largest difference", "largest value")], True
    for kind, result in comparisons.items():
        for what, difference in result.differences.items():
            # Not "greater than", so that NaN disagrees.
            agree &= difference <= AGREEMENT * result.magnitudes[what]
            rows.append((kind, what, f"{difference:.1e}", f"{result.magnitudes[what]:.1e}"))
    print(format_table(rows))
    print()
    rows = [("device", "backend", "layout", "tokens computed", "real tokens a second")]
    for kind, result in comparisons.items():
        for name in BACKENDS:
            layout, computed = ("packed", real) if name == "fused" else ("padded", padded)
            rows.append((kind, name, layout, f"{computed:,}", f"{real / result.seconds[name]:,.0f}"))
    print(format_table(rows))
    print(f"\n  Packing saves {1 - real / padded:.0%} of the tokens: {padded - real:,} of {padded:,} are padding.")
    print(f"  Time is the median of {experiment.ROUNDS} runs of each backend, taken in turn.")
    return agree


def _print_conclusion(accuracy: float, agree: bool, comparisons: dict[str, experiment.Comparison]) -> None:
    print("\nWhat this shows")
    print(f"  It names {accuracy:.1%} of digits from forms it never saw, by sentences it never read; chance is 10%.")
    if agree:
        print("  Both backends compute the same function and the same gradients, up to float32 rounding.")
    else:
        print("  THE BACKENDS DISAGREE by more than rounding. Please report this, with the output of")
        print(f"  {command('info')}")
    for kind, result in comparisons.items():
        ratio = result.seconds["fused"] / result.seconds["reference"]
        print(f"  On {kind} the fused backend takes {ratio:.1f} times the reference's time.")
    print("  Sequences this short cost more Python than arithmetic: `make bench` measures sizes where packing pays.")
    print("  No GPU kernel exists yet: today fused is plain PyTorch on packed tokens, on every device.")
    print("\nWhat to try next")
    rows = [
        (command("info"), "what works on this machine, and why the rest does not"),
        (command("demo --seed 1"), "other weights, other batches"),
        ("README.md", "ten lines with your own training loop"),
    ]
    print(format_table(rows))
