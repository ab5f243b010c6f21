"""UnIVAL's beam search: with a cache as without, against every text there is, and among given answers."""

import itertools

import pytest
import torch
from data._refused import refused
from models._small import BACKENDS
from models._unival import SAMPLES, SOURCE, maps, unival

from onepeace_fast.models.unival import Trie, beam_search

ANSWERS = [[7, 4], [7, 4, 9], [12], [5, 5, 5, 5], [9, 3]]


def ranked(model, source, texts, penalty=1.0, **given):
    """The texts with their scores, best first, by passes over each of them alone."""
    found = []
    for text in texts:
        previous = torch.tensor([[0, *text]])
        scores = model.logits(source, previous, **given).log_softmax(-1)[0]
        wanted = [*text, 2]
        total = sum(scores[place, token].item() for place, token in enumerate(wanted))
        found.append(([*text], total / len(wanted) ** penalty))
    return sorted(found, key=lambda one: -one[1])


@pytest.mark.parametrize("answers", [None, Trie(ANSWERS)], ids=["free", "answers"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_changes_nothing(beams, answers):
    found = [
        unival(backend).generate(SOURCE, beams=beams, max_length=6, answers=answers, samples=SAMPLES, **maps())
        for backend in BACKENDS
    ]
    assert [[one.tokens for one in own] for own in found[0]] == [[one.tokens for one in own] for own in found[1]]
    scores = [[one.score for own in of for one in own] for of in found]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)
    assert all(1 <= len(own) <= beams for own in found[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_texts(backend, penalty):
    model = unival(backend, vocab_size=6)
    source = torch.tensor([[3, 5, 2], [4, 2, 1]])
    texts = [text for length in range(3) for text in itertools.product((3, 4, 5), repeat=length)]
    found = model.generate(source, beams=20, min_length=1, max_length=3, length_penalty=penalty)
    for sample, own in enumerate(found):
        expected = ranked(model, source[sample : sample + 1], texts, penalty)
        assert [one.tokens for one in own] == [text for text, _ in expected]
        assert [one.score for one in own] == pytest.approx([score for _, score in expected], rel=1e-9)


def test_one_beam_takes_the_most_likely_token_each_time():
    model, image = unival(), maps()["image"]
    (own,) = model.generate(SOURCE[:1], beams=1, max_length=5, min_length=5, image=image)
    text = []
    for _ in range(4):
        scores = model.logits(SOURCE[:1], torch.tensor([[0, *text]]), image=image)[0, -1]
        scores[[0, 1, 2]] = -torch.inf
        text.append(int(scores.argmax()))
    assert [one.tokens for one in own] == [text]


def test_answers_alone_are_written_best_first():
    model, image = unival(), maps()["image"]
    (own,) = model.generate(SOURCE[:1], beams=10, max_length=6, answers=Trie(ANSWERS), image=image)
    expected = ranked(model, SOURCE[:1], ANSWERS, image=image)
    assert [one.tokens for one in own] == [text for text, _ in expected]
    short = model.generate(SOURCE[:1], beams=10, max_length=3, answers=Trie(ANSWERS), image=image)
    assert sorted(one.tokens for one in short[0]) == sorted(text for text in ANSWERS if len(text) < 3)


def test_lengths_are_kept():
    model = unival(vocab_size=6)
    for least, most in ((3, 4), (2, 2), (1, 3)):
        found = model.generate(SOURCE.clamp(max=5), beams=30, min_length=least, max_length=most)
        assert {len(one.tokens) + 1 for own in found for one in own} == {*range(least, most + 1)}


def test_no_text_is_empty_unless_that_is_asked_for():
    model = unival(vocab_size=6)
    source = SOURCE.clamp(max=5)
    for given, empty in (({}, False), ({"min_length": 1}, True)):
        found = model.generate(source, beams=9, max_length=2, **given)
        assert [[] in [one.tokens for one in own] for own in found] == [empty] * len(source)


def test_the_host_waits_once_for_the_continuations_of_a_token(monkeypatch):
    total = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.9, 0.4], [0.6, 0.5, 0.8]])
    read, waits = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(x) or read(x))
    found = beam_search._best(total, [1, 2], 2)
    assert [[one[:2] for one in own] for own in found] == [[(0, 1), (0, 2)], [(1, 1), (2, 2)]]
    assert [one[2] for one in found[1]] == pytest.approx([0.9, 0.8])
    assert len(waits) == 1


def test_a_trie_knows_what_follows():
    trie = Trie(ANSWERS)
    assert sorted(trie.following([])) == [5, 7, 9, 12]
    assert sorted(trie.following([7, 4])) == [2, 9]
    assert trie.following([7, 4, 9]) == [2] and trie.following([8]) == []
    assert trie.largest == 12


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beams": 0}, "beams: expected at least 1, got 0"),
        ({"beams": 2.5}, "beams: expected an integer, got 2.5"),
        ({"max_length": 3.5}, "max_length: expected an integer, got 3.5"),
        ({"max_length": 8, "length_penalty": float("nan")}, "length_penalty: expected a finite number, got nan"),
        ({"max_length": 8, "answers": [[4]]}, "answers: expected a Trie or None, got list [[4]]"),
        ({"max_length": 9}, "max_length: expected 1 to 8, got 9"),
        ({"max_length": 1}, "min_length: expected 1 to max_length, 1, got 2"),
        ({"max_length": 3, "min_length": 4}, "min_length: expected 1 to max_length, 3, got 4"),
        ({"max_length": 8, "answers": Trie([[4, 23]])}, "answers: expected tokens below 23, got 23"),
    ],
)
def test_a_search_that_does_not_fit_is_refused(settings, says):
    refused(lambda: unival().generate(SOURCE, **settings), "", says)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([], "answers: expected at least one, got none"),
        ([[4, 1]], "answers: expected tokens of words, got [1] in [4, 1]"),
        ([[4, -1]], "answers: expected tokens of words, got [-1] in [4, -1]"),
        ([[4, 5.5]], "answers: expected lists of tokens, got list [4, 5.5]"),
        ([4], "answers: expected lists of tokens, got int 4"),
    ],
)
def test_a_trie_of_nothing_or_of_padding_is_refused(answers, says):
    refused(lambda: Trie(answers), "", says)
