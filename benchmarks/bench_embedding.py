"""Embedding lists of texts, images and sounds, against upstream's way: one padded batch of each by the reference.

Both sides take the same strings, arrays and samples, so that tokenizing and resizing count on both. "sounds, encoder"
is the stack alone, from random tokens: the convolutions are the same code on both sides. Of texts and images both
sides give the same embeddings, which is checked first. A sound's embedding depends on its padding in upstream's way and
not in ours, so that the longest alone is compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor

from benchmarks.support import shapes
from benchmarks.support.encoder import SIZES
from benchmarks.support.memory import peak_of
from benchmarks.support.report import Report
from benchmarks.support.shapes import Sizes
from benchmarks.support.timing import paired
from onepeace_fast import OnePeaceRetrieval, RetrievalConfig, use_backend
from onepeace_fast.config import TransformerConfig
from onepeace_fast.data.audio import SAMPLE_RATE
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.embedding import Embedder
from onepeace_fast.models.passes import Encoded, PaddedTokens
from onepeace_fast.timing import Timing, interval

pytestmark = pytest.mark.full

TITLE = f"Embedding, {SIZES.layers} layers, width {SIZES.width}, float32: CPU time over upstream's in the same round"
FOOTER = "{} threads; medians of the rounds' ratios with their 95% intervals; below 1 is faster; peaks are of one call"
PARTS = {"texts": 1 / 1.3, "images": 1.0, "sounds, encoder": 1 / 1.3, "sounds": 1.0}  # and the goals, at most
ROUNDS = 20
WORDS = "abcdefghijklmnopqrstuvwxyz"


class Counts(NamedTuple):
    """How many of each, and the longest text in tokens and sound in seconds."""

    texts: int = 256
    images: int = 64
    sounds: int = 32
    tokens: tuple[int, int] = (5, 70)
    seconds: tuple[float, float] = (3.0, 15.0)


class EmbeddingCase:
    """A model with random weights and the lists that it embeds."""

    def __init__(self, sizes: Sizes = SIZES, counts: Counts | None = None) -> None:
        torch.manual_seed(0)
        counts = counts or Counts()
        tokenizer = Tokenizer.train([WORDS], 260)  # a token each for the space, which begins a word, and each letter
        config = TransformerConfig(
            embed_dim=sizes.width, ffn_embed_dim=sizes.hidden, attention_heads=sizes.heads, layers=sizes.layers
        )
        model = OnePeaceRetrieval(RetrievalConfig(encoder=config, vocab_size=tokenizer.vocab_size)).eval()
        self.embedder = Embedder(model, tokenizer)
        self.model = model
        draw = random.Random(0)
        lengths = shapes.spread(*counts.tokens, counts.texts, 1)
        self.texts = ["".join(draw.choices(WORDS, k=length - 2)) for length in lengths]  # a space before, END behind
        noise = numpy.random.default_rng(0)
        side = self.embedder.processor.image_size
        self.images = [noise.integers(0, 256, (side, side, 3), dtype=numpy.uint8) for _ in range(counts.images)]
        first, last = (round(seconds * SAMPLE_RATE) for seconds in counts.seconds)
        samples = shapes.spread(first, last, counts.sounds, 2)
        self.sounds = [torch.from_numpy(noise.standard_normal(length).astype("float32")) for length in samples]

    def calls(self, part: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """Ours and upstream's way of a part, each giving embeddings [items, dim]."""
        if part == "sounds, encoder":
            return self._encoders()
        ours: dict[str, Callable[[], Tensor]] = {
            "texts": lambda: self.embedder.embed_block("text", self.texts),
            "images": lambda: self.embedder.embed_block("image", self.images),
            "sounds": lambda: self.embedder.embed_block("audio", self.sounds),
        }
        return ours[part], lambda: self._upstream(part)

    def check(self, part: str) -> None:
        """Raise ``AssertionError`` where both ways give other embeddings for what they have in common."""
        measured, upstream = (call() for call in self.calls(part))
        rows = slice(None)
        if part == "sounds":
            longest = max(range(len(self.sounds)), key=lambda place: len(self.sounds[place]))
            rows = slice(longest, longest + 1)
        torch.testing.assert_close(measured[rows], upstream[rows], rtol=0, atol=1e-4)

    @torch.no_grad()
    def _upstream(self, part: str) -> Tensor:
        embedder = self.embedder
        with use_backend("reference"):
            if part == "texts":
                return embedder.extract_text_features(embedder.process_text(self.texts))
            if part == "images":
                pixels = embedder.process_image(self.images)
                assert isinstance(pixels, Tensor)
                return embedder.extract_image_features(pixels)
            return embedder.extract_audio_features(*embedder.process_audio(self.sounds))

    def _encoders(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        width, frames = self.model.config.encoder.embed_dim, self.embedder.processor.frames
        lengths = [1 + frames(len(clip)) for clip in self.sounds]
        valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        x = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(0))
        padded = {"audio": PaddedTokens(x, valid, lengths, None, max(lengths))}
        alone = [
            {"audio": PaddedTokens(x[row : row + 1, :length], valid[row : row + 1, :length], [length], None, length)}
            for row, length in enumerate(lengths)
        ]

        def project(passes: list[Encoded]) -> Tensor:
            return torch.cat([self.model.project(encoded) for encoded in passes])

        def ours() -> Tensor:
            with torch.no_grad():
                return project(self.model.encoder_wrapper(alone))

        def upstream() -> Tensor:
            with torch.no_grad(), use_backend("reference"):
                return project(self.model.encoder_wrapper([padded]))

        return ours, upstream


@pytest.fixture(scope="module")
def case() -> EmbeddingCase:
    """Made once for all parts."""
    return EmbeddingCase()


@pytest.mark.parametrize("part", PARTS)
def test_embedding(
    part: str, case: EmbeddingCase, benchmark: Any, report: Report, case_seconds: float, threads: int
) -> None:
    """Both ways in turn."""
    case.check(part)
    measured, upstream = case.calls(part)
    timings = paired(benchmark, measured, upstream, seconds=case_seconds, rounds=ROUNDS)
    add_row(report, part, threads, timings, (peak_of(measured), peak_of(upstream)))


def add_row(report: Report, part: str, threads: int, timings: tuple[Timing, ...], peaks: tuple[int, int]) -> bool:
    """Add a row; whether the part reaches its goal."""
    ours, upstream = timings
    low, ratio, high = interval(ours.cpu, upstream.cpu)
    reached = ratio <= PARTS[part]
    shown = {
        "part": part,
        "ours, CPU ms": f"{1e3 * sorted(ours.cpu)[len(ours.cpu) // 2]:.0f}",
        "upstream's": f"{1e3 * sorted(upstream.cpu)[len(upstream.cpu) // 2]:.0f}",
        "ratio": f"{ratio:.3f} ({low:.3f}-{high:.3f})",
        "peak MB": f"{peaks[0] / 1e6:.0f}",
        "upstream's ": f"{peaks[1] / 1e6:.0f}",
        "goal": f"{PARTS[part]:.2f} {'reached' if reached else 'MISSED'}",
    }
    measured = {
        "part": part,
        "threads": threads,
        "ours": ours.record(),
        "upstream": upstream.record(),
        "cpu_ratio": [round(value, 4) for value in (low, ratio, high)],
        "peak_bytes": {"ours": peaks[0], "upstream": peaks[1]},
        "goal": round(PARTS[part], 4),
        "reached": reached,
    }
    report.add(TITLE, shown, measured, FOOTER.format(threads))
    return reached
