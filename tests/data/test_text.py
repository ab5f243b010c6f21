"""Captions: ids as upstream's, whole words, limits, and tokenizers that do not fit."""

import json
import logging

import pytest
import torch
from data._refused import refused

tokenizers = pytest.importorskip("tokenizers")

from onepeace_fast.data.text import MAX_TOKENS, TokenizedCaptions, Tokenizer, pad_tokens  # noqa: E402

CORPUS = [
    "A cat sat on the mat, purring.",
    "the dog ran after the cat",
    "Ein Bär läuft über die Straße",
    "猫が走る",
] * 4
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CORPUS, 310)


def word_level(path, vocabulary, **changes):
    """A tokenizer.json whose tokens are whole words; ``changes`` replace sections of the file."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    path.write_text(json.dumps(content | changes))
    return path


def words_of(tokenizer, caption):
    """The caption's tokens, joined word by word as their starts say."""
    ids, starts = tokenizer.tokens(caption)
    places = [place for place, start in enumerate(starts) if start]
    pieces = [ids[begin:end] for begin, end in zip(places, [*places[1:], len(ids)], strict=True)]
    assert starts[0]
    return [tokenizer._model.decode(piece).strip() for piece in pieces]


def test_a_trained_tokenizer_has_upstreams_special_tokens(tokenizer):
    vocabulary = tokenizer._model.get_vocab()
    assert {token: vocabulary[token] for token in SPECIAL} == SPECIAL
    assert tokenizer.vocab_size == len(vocabulary) == 310


def test_vocab_size_covers_the_largest_id(tmp_path):
    tokenizer = Tokenizer.load(word_level(tmp_path / "t.json", {**SPECIAL, "cat": 4, "far": 90}))
    assert tokenizer.vocab_size == 91
    assert tokenizer.encode("far cat")[0] == [90, 4, 2]


def test_the_same_captions_train_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first.json")
    Tokenizer.train(iter(CORPUS), 310).save(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_few_captions_give_a_smaller_vocabulary():
    assert Tokenizer.train(["ab ab"], 5000).vocab_size == 4 + 256 + 2


def test_a_saved_tokenizer_encodes_alike_after_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.vocab_size == tokenizer.vocab_size
    for caption in [*CORPUS, "unseen ✓ words", "<pad> in a caption"]:
        assert again.encode(caption) == tokenizer.encode(caption)


@pytest.mark.parametrize("caption", ["a cat", "ÄÖÜ ß", "😀 猫", "\x00\x7f", "e\u0301 ﬁ ™"])
def test_every_text_can_be_encoded_and_comes_back_in_lower_case(tokenizer, caption):
    ids, _ = tokenizer.encode(caption)
    assert ids[-1] == 2
    assert min(ids[:-1]) > 3
    assert tokenizer._model.decode(ids[:-1]).strip() == caption.lower()


@pytest.mark.parametrize("caption", ["a cat", "  a   cat ", "a\tcat\n", "A\u3000Cat", "a\u00a0\u2003cat\r\n"])
def test_runs_of_whitespace_and_upper_case_do_not_matter(tokenizer, caption):
    assert tokenizer.encode(caption) == tokenizer.encode("a cat")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A cat, sat: on the mat!", ["a", "cat,", "sat:", "on", "the", "mat!"]),
        ("don't stop-it (now)", ["don't", "stop-it", "(now)"]),
        ("...well", ["...well"]),
        ("well ... no", ["well", "...", "no"]),
        ("猫が 走る 😀😀 x", ["猫が", "走る", "😀😀", "x"]),
        ("the — dash", ["the", "—", "dash"]),
        ("Straße Ünlü", ["straße", "ünlü"]),
        ("extraordinary xylophones", ["extraordinary", "xylophones"]),
    ],
)
def test_words_begin_at_whitespace_alone(tokenizer, caption, words):
    assert words_of(tokenizer, caption) == words


@pytest.mark.parametrize("replacement", ["always", "never"])
def test_words_are_the_same_where_spaces_are_tokens_of_their_own_or_marked(replacement):
    inner = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(token, 0.0) for token in SPECIAL] + [(c, -1.0) for c in "▁abc,"], unk_id=3)
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=replacement)
    ids, starts = Tokenizer(inner).tokens("ab, c ba")
    letters = [inner.id_to_token(token) for token in ids]
    begun = [
        "".join(letters[place] for place in range(len(ids)) if starts[: place + 1].count(True) == n) for n in (1, 2, 3)
    ]
    assert [word.strip("▁") for word in begun] == ["ab,", "c", "ba"]


def test_a_caption_past_the_limit_keeps_seventy_tokens_and_the_end(tokenizer):
    whole, starts = tokenizer.tokens("cat " * 200)
    assert len(whole) > MAX_TOKENS == 70
    assert tokenizer.encode("cat " * 200) == ([*whole[:70], 2], [*starts[:70], False])
    assert tokenizer.encode("cat " * 200, max_tokens=3) == ([*whole[:3], 2], [*starts[:3], False])
    exact = "z" * 69  # with the space in front 70 tokens, since no two of them were merged
    assert len(tokenizer.tokens(exact)[0]) == 70
    assert tokenizer.encode(exact)[0] == [*tokenizer.tokens(exact)[0], 2]


def test_a_special_token_in_a_caption_is_ordinary_text(tokenizer):
    ids, _ = tokenizer.encode("a </s> b <pad> c <s> <unk>")
    assert ids.index(2) == len(ids) - 1
    assert not {0, 1, 3} & set(ids)


def test_a_caption_that_would_be_padding_is_refused(tmp_path):
    tokenizer = Tokenizer.load(word_level(tmp_path / "t.json", {**SPECIAL, "cat": 4}))
    assert tokenizer.encode("cat bird")[0] == [4, 3, 2]
    refused(
        lambda: tokenizer.encode("cat <pad> cat"),
        "caption: expected text without <s>, <pad>, </s>, got ",
    )


@pytest.mark.parametrize("caption", ["", "  ", "\t\n\u3000"])
def test_an_empty_caption_is_refused(tokenizer, caption):
    refused(lambda: tokenizer.encode(caption), "caption: expected some text, got ")


def test_a_caption_of_which_the_tokenizer_leaves_nothing_is_refused(tmp_path):
    strip = {"type": "Replace", "pattern": {"Regex": "[^a-z ]"}, "content": ""}
    path = word_level(tmp_path / "t.json", {**SPECIAL, "cat": 4}, normalizer=strip)
    refused(lambda: Tokenizer.load(path).encode("猫"), "caption: expected what the tokenizer knows, got str '猫'")


def test_truncation_padding_and_added_ends_of_a_file_do_not_matter(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "plain.json")
    content = json.loads((tmp_path / "plain.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**padding, "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    content["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}
    content["post_processor"] |= {"trim_offsets": True, "add_prefix_space": True}
    (tmp_path / "other.json").write_text(json.dumps(content))
    caption = "the dog ran after the cat, purring"
    assert Tokenizer.load(tmp_path / "other.json").encode(caption) == tokenizer.encode(caption)


@pytest.mark.parametrize(
    "vocabulary",
    [{**SPECIAL, "<pad>": 4, "cat": 1}, {"<s>": 0, "</s>": 2, "<unk>": 3}, {"[PAD]": 0, "[UNK]": 1, "<unk>": 2}],
)
def test_a_tokenizer_with_other_special_tokens_is_refused(tmp_path, vocabulary):
    path = word_level(tmp_path / "tokenizer.json", vocabulary)
    refused(lambda: Tokenizer.load(path), str(path), "special tokens {'<s>': ", str(SPECIAL))


@pytest.mark.parametrize("content", ["", "not json", "{}", '{"model": {"type": "Unheard"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    refused(lambda: Tokenizer.load(path), f"{path}: expected a tokenizer.json")


def test_an_absent_file_is_refused(tmp_path):
    refused(lambda: Tokenizer.load(tmp_path / "no.json"), tmp_path / "no.json", "got no file there")


@pytest.mark.parametrize("vocab_size", [259, 0, 300.0, True])
def test_a_vocabulary_without_room_for_bytes_is_refused(vocab_size):
    refused(lambda: Tokenizer.train(CORPUS, vocab_size), "vocab_size: expected at least 260, got ")


@pytest.mark.parametrize("captions", [[], [" ", ""]])
def test_training_on_no_text_is_refused(captions):
    refused(lambda: Tokenizer.train(captions, 300), "captions: expected at least one with text, got none")


def test_captions_are_kept_as_they_are_encoded(tokenizer):
    captions = [*CORPUS, "x", "cat " * 100]
    kept = TokenizedCaptions(captions, tokenizer)
    assert len(kept) == len(captions)
    for place, caption in enumerate(captions):
        (ids, starts), (expected_ids, expected_starts) = kept[place], tokenizer.encode(caption)
        assert (ids.dtype, starts.dtype) == (torch.int64, torch.bool)
        assert (ids.tolist(), starts.tolist()) == (expected_ids, expected_starts)


def test_captions_that_are_cut_are_counted_in_one_line(tokenizer, caplog):
    captions = ["cat " * 100, "a cat", "dog " * 71, "z" * 69, "z" * 70]
    with caplog.at_level(logging.WARNING, logger="onepeace_fast"):
        assert TokenizedCaptions(captions, tokenizer).truncated == 3
        assert TokenizedCaptions(["a cat"], tokenizer).truncated == 0
    assert caplog.messages == ["captions: 3 of 5 have more than 70 tokens; each of these loses its end"]


def test_an_empty_caption_among_others_is_named_by_its_place(tokenizer):
    refused(lambda: TokenizedCaptions(["a", "b", " "], tokenizer), "captions[2]: caption: expected some text, got ' '")


def test_rows_are_padded_with_token_1_that_begins_no_word(tokenizer):
    rows = [tokenizer.encode("a cat"), tokenizer.encode("the dog ran after the cat")]
    text, starts = pad_tokens(rows)
    assert (text.dtype, starts.dtype) == (torch.int64, torch.bool)
    longest = max(len(ids) for ids, _ in rows)
    for row, (ids, words) in enumerate(rows):
        assert text[row].tolist() == ids + [1] * (longest - len(ids))
        assert starts[row].tolist() == words + [False] * (longest - len(ids))


@pytest.mark.parametrize("call", ["tokens", "train", "all"])
def test_half_a_character_in_a_caption_is_refused_in_one_line(tokenizer, call):
    captions = ["a cat", "a \ud83d cat"]
    calls = {
        "tokens": lambda: tokenizer.tokens(captions[1]),
        "train": lambda: Tokenizer.train(captions, 300),
        "all": lambda: TokenizedCaptions(captions, tokenizer),
    }
    with pytest.raises(ValueError, match=r"caption: expected whole characters, got str 'a \\ud83d cat'") as caught:
        calls[call]()
    assert str(caught.value).startswith("captions[1]: " if call == "all" else "caption: ")
    str(caught.value).encode()  # it can be printed
