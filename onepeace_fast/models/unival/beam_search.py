"""Beam search, as fairseq does it for upstream, free or among given answers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.config import is_number
from onepeace_fast.models.losses import log_softmax
from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.inputs import BEGIN, END, PADDING

# The scores [texts, vocabulary] of what follows: of texts [texts, length], how many each sample has, and which row of
# the last call each one continues, None at first.
Step: TypeAlias = Callable[[Tensor, Sequence[int], Tensor | None], Tensor]


class Hypothesis(NamedTuple):
    """A text without beginning and end; its score is log-probability / length ** length_penalty, the end counted."""

    tokens: list[int]
    score: float


class Trie:
    """Answers that alone may be written, by their tokens without beginning and end.

    Raises:
        ValueError: no answer, or one that holds a beginning, an end, padding or what is no token.
    """

    def __init__(self, answers: Iterable[Sequence[int]]) -> None:
        self._root: dict[int, Any] = {}
        for answer in answers:
            tokens = _tokens(answer)
            reserved = [token for token in tokens if token < 0 or token in (BEGIN, END, PADDING)]
            require(not reserved, f"answers: expected tokens of words, got {reserved} in {tokens}")
            node = self._root
            for token in tokens:
                node = node.setdefault(token, {})
            node[END] = {}
        require(bool(self._root), "answers: expected at least one, got none")

    def following(self, prefix: Sequence[int]) -> list[int]:
        """The tokens that may follow; none where no answer begins so."""
        node = self._root
        for token in prefix:
            node = node.get(token, {})
        return [*node]

    @property
    def largest(self) -> int:
        """The largest token."""
        found, nodes = 0, [self._root]
        while nodes:
            node = nodes.pop()
            found = max([found, *node])
            nodes += node.values()
        return found


def _tokens(answer: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in answer]
    except TypeError:
        raise ValueError(f"answers: expected lists of tokens, got {describe(answer)}") from None


class Settings(NamedTuple):
    """Of a search; lengths count the end, which fairseq's least length of 1 does not."""

    beams: int = 5
    max_length: int = 20
    min_length: int = 2
    length_penalty: float = 1.0
    answers: Trie | None = None


def check_settings(settings: Settings, config: UnivalConfig) -> None:
    """Raise ValueError unless a model of this configuration can be searched so."""
    limit = config.max_target_positions
    for name in ("beams", "max_length", "min_length"):
        value = getattr(settings, name)
        require(type(value) is int, f"{name}: expected an integer, got {value!r}")
    penalty, answers = settings.length_penalty, settings.answers
    require(is_number(penalty), f"length_penalty: expected a finite number, got {penalty!r}")
    require(answers is None or isinstance(answers, Trie), f"answers: expected a Trie or None, got {describe(answers)}")
    require(settings.beams > 0, f"beams: expected at least 1, got {settings.beams}")
    require(0 < settings.max_length <= limit, f"max_length: expected 1 to {limit}, got {settings.max_length}")
    require(
        0 < settings.min_length <= settings.max_length,
        f"min_length: expected 1 to max_length, {settings.max_length}, got {settings.min_length}",
    )
    largest = 0 if answers is None else answers.largest
    require(largest < config.vocab_size, f"answers: expected tokens below {config.vocab_size}, got {largest}")


def search(step: Step, samples: int, settings: Settings, device: torch.device) -> list[list[Hypothesis]]:
    """The hypotheses of each sample, best first, at most as many as beams.

    A sample is done once it has as many as beams; an end counts among the best ``beams`` continuations alone.
    """
    finished: list[list[Hypothesis]] = [[] for _ in range(samples)]
    texts: list[list[int]] = [[] for _ in range(samples)]
    texts_of, parents = [1] * samples, None
    scores = torch.zeros(samples, dtype=torch.float32, device=device)
    for length in range(1, settings.max_length + 1):
        written = torch.tensor([[BEGIN, *text] for text in texts], dtype=torch.int64, device=device)
        found = log_softmax(step(written, texts_of, parents))
        total = scores[:, None] + found + _hidden(texts, length, settings, found)
        chosen = _best(total, texts_of, 2 * settings.beams)
        kept: list[tuple[int, int, float]] = []
        first = 0
        for sample, count in enumerate(texts_of):
            own = _continue(chosen[sample], texts, finished[sample], length, settings) if count else []
            done = len(finished[sample]) >= settings.beams
            texts_of[sample] = 0 if done else len(own)
            kept += [] if done else own
            first += count
        if not kept:
            break
        texts = [[*texts[row], token] for row, token, _ in kept]
        parents = torch.tensor([row for row, _, _ in kept], dtype=torch.int64, device=device)
        scores = total.new_tensor([score for _, _, score in kept])
    return [sorted(own, key=lambda one: -one.score)[: settings.beams] for own in finished]


def _hidden(texts: Sequence[Sequence[int]], length: int, settings: Settings, like: Tensor) -> Tensor:
    """What may not follow: minus infinity, [texts, vocabulary] or for all [vocabulary]."""
    hidden = like.new_zeros(like.shape[1])
    hidden[[BEGIN, PADDING]] = -torch.inf
    if length < settings.min_length:
        hidden[END] = -torch.inf
    if length == settings.max_length:
        hidden[torch.arange(len(hidden), device=hidden.device) != END] = -torch.inf
    if settings.answers is None:
        return hidden
    pairs = [(row, token) for row, text in enumerate(texts) for token in settings.answers.following(text)]
    outside = torch.full_like(like, -torch.inf)
    rows, tokens = torch.tensor(pairs, dtype=torch.int64, device=like.device).unbind(1)
    outside[rows, tokens] = 0
    return hidden + outside


def _best(total: Tensor, texts_of: Sequence[int], count: int) -> list[list[tuple[int, int, float]]]:
    """Of each sample its best continuations, best first: the row, the token and the score."""
    vocabulary, found, first = total.shape[1], [], 0
    tops = []
    for texts in texts_of:
        own = total[first : first + texts].flatten()
        tops.append(own.topk(min(count, own.numel())))
        first += texts
    # The host waits once; float64 holds every index.
    parts = [torch.stack([top.values.double(), top.indices.double()]) for top in tops]
    values, indices = torch.cat(parts, 1).tolist()
    first = place = 0
    for texts, top in zip(texts_of, tops, strict=True):
        stop = place + len(top.values)
        found.append([
            (first + index // vocabulary, index % vocabulary, value)
            for index, value in zip(map(int, indices[place:stop]), values[place:stop], strict=True)
        ])  # fmt: skip
        first, place = first + texts, stop
    return found


def _continue(
    chosen: Sequence[tuple[int, int, float]], texts: Sequence[list[int]], finished: list[Hypothesis], length: int,
    settings: Settings,
) -> list[tuple[int, int, float]]:  # fmt: skip
    """Put what ends here among the finished; the others, as many as beams at most."""
    kept = []
    for rank, (row, token, score) in enumerate(chosen):
        if score == -torch.inf:
            break
        if token != END:
            kept.append((row, token, score))
        elif rank < settings.beams:
            finished.append(Hypothesis(texts[row], score / length**settings.length_penalty))
    return kept[: settings.beams]
