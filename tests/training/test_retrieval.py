"""Recall and rank against a naive recomputation, chance against counting, and ties that earn nothing."""

import itertools
import math
import statistics
from collections import Counter

import pytest
import torch

from onepeace_fast.training import retrieval
from onepeace_fast.training.retrieval import chance_median_rank, chance_recall, figures, ranks


def naive_ranks(queries, candidates, right):
    """Sort every query's candidates; of equal scores the wrong ones first."""
    result = []
    for query, answers in zip(queries.tolist(), right, strict=True):
        scores = [sum(a * b for a, b in zip(query, candidate, strict=True)) for candidate in candidates.tolist()]
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index in answers))
        result.append(1 + min(order.index(answer) for answer in answers))
    return result


@pytest.mark.parametrize("rows", [2, 1024], ids=["in chunks", "at once"])
def test_figures_are_those_of_a_naive_recomputation(monkeypatch, rows):
    monkeypatch.setattr(retrieval, "_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-3, 4, (15, 3), generator=generator).double()  # small integers, so that scores are equal
    candidates = torch.randint(-3, 4, (40, 3), generator=generator).double()
    right = [sorted({place, (7 * place) % 40, 39 - place}) for place in range(15)]
    expected = naive_ranks(queries, candidates, right)
    assert ranks(queries, candidates, right) == expected and 1 < statistics.median(expected) < 40
    found = figures(queries, candidates, right)
    assert (found.queries, found.candidates) == (15, 40)
    assert found.median_rank == statistics.median(expected)
    assert found.recall == {k: sum(rank <= k for rank in expected) / 15 for k in (1, 5, 10)}
    for k, value in found.chance_recall.items():
        missed = [math.prod((40 - len(answers) - i) / (40 - i) for i in range(k)) for answers in right]
        assert value == pytest.approx(1 - statistics.mean(missed))


def test_equal_embeddings_earn_nothing():
    same = torch.ones(6, 4)
    found = figures(same, same, [[place] for place in range(6)])
    assert found.median_rank == 6 and found.recall[1] == found.recall[5] == 0
    assert ranks(same * math.nan, same, [[place] for place in range(6)]) == [6] * 6


@pytest.mark.parametrize(("answers", "count"), [({1: 1}, 6), ({1: 2, 3: 1}, 6), ({2: 1}, 5)])
def test_chance_is_the_share_of_all_orders(answers, count):
    firsts = []  # the rank of the first right answer, which are the smallest indices, in every order of each query
    for right, queries in answers.items():
        orders = itertools.permutations(range(count))
        firsts += [1 + min(order.index(answer) for answer in range(right)) for order in orders] * queries
    counted = Counter(answers)
    for k in (1, 2, 5, 10):
        assert chance_recall(count, counted, k) == pytest.approx(sum(first <= k for first in firsts) / len(firsts))
    median = chance_median_rank(count, counted)
    assert median == statistics.median_low(firsts)


def test_chance_of_many_candidates_is_a_number():
    assert chance_recall(25_010, Counter({5: 5000}), 10) == pytest.approx(0.0019982, rel=1e-3)
    assert chance_median_rank(25_010, Counter({1: 25_010})) == 12_505
