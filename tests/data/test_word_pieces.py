"""BERT's word pieces of a Hugging Face file."""

import json

import pytest
from data._refused import refused
from training._mico_runs import VOCABULARY, write_tokenizer

from onepeace_fast.data.word_pieces import BertTokenizer


@pytest.fixture
def path(tmp_path):
    write_tokenizer(tmp_path / "bert.json")
    return tmp_path / "bert.json"


def test_a_text_is_bert_s_word_pieces_between_cls_and_sep(path):
    tokenizer = BertTokenizer.load(path)
    ids, starts = tokenizer.tokens("It sounds walls, zebra [SEP]")
    words = [VOCABULARY[token] for token in ids]
    assert words == ["it", "sounds", "wall", "##s", "[UNK]", "[UNK]", "[UNK]", "[UNK]", "[UNK]"]
    assert starts[:5] == [True, True, True, False, False]
    assert (tokenizer.begin, tokenizer.end, tokenizer.mask, tokenizer.padding, tokenizer.first_word) == (2, 3, 4, 0, 5)
    assert tokenizer.encode("it sounds", max_tokens=1) == ([VOCABULARY.index("it"), 3], [True, False])


def test_a_file_without_bert_s_special_tokens_is_refused(path):
    written = json.loads(path.read_text())
    vocabulary = written["model"]["vocab"]
    for changed, part in (
        ({"[MASK]": None}, "'[MASK]': None"),
        ({"[PAD]": 1, "[UNK]": 0}, "[PAD] as token 0"),
    ):
        own = {word: token for word, token in (vocabulary | changed).items() if token is not None}
        path.write_text(json.dumps(written | {"model": written["model"] | {"vocab": own}}))
        refused(lambda: BertTokenizer.load(path), path, "BERT's special tokens [PAD], [UNK]", part)
