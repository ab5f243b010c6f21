"""GPT-2's byte-pair encoding with upstream's ids, from small files of the same form, against encoding by hand."""

import json

import pytest
from data._refused import refused

tokenizers = pytest.importorskip("tokenizers")

from onepeace_fast.data.text import Tokenizer  # noqa: E402

SPACE = "Ġ"
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = [f"{SPACE} c", "a t", f"{SPACE}c at", "' s", "Ċ Ċ", "1 2", "Ï Ĥ"]  # the last makes a final sigma


def write(folder, **changes):
    """The three files; tokens count down from 1,000, the dictionary is in another order."""
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    numbers = {token: 1000 - place for place, token in enumerate(tokens)}
    order = sorted(numbers.values(), key=lambda number: (number % 7, number))
    files = {
        "encoder.json": json.dumps(numbers),
        "vocab.bpe": "\n".join(["#version: 0.2", *MERGES, ""]),
        "dict.txt": "".join(f"{word} {count}\n" for count, word in enumerate([*order, "madeupword0000"])),
    }
    for name, text in {**files, **changes}.items():
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return {token: 4 + order.index(number) for token, number in numbers.items()}


def of_bytes(text):
    """Every byte of a text as the token that GPT-2 writes it by."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [letter[byte] for byte in text.encode()]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("cat", [f"{SPACE}cat"]),
        ("A CAT's", [SPACE, "a", f"{SPACE}cat", "'s"]),
        ("  cat", [SPACE, SPACE, f"{SPACE}cat"]),
        ("cat \n\n", [f"{SPACE}cat", SPACE, "ĊĊ"]),
        ("cat12 cat", [f"{SPACE}cat", "12", f"{SPACE}cat"]),
        ("<pad>", [SPACE, "<", *"pad", ">"]),
        ("ΟΣ", [SPACE, *of_bytes("\u03bf"), "ÏĤ"]),
        ("猫 é", [SPACE, *of_bytes("猫 é")]),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_text_is_taken_in_lower_case_behind_a_space_with_its_own_whitespace(tmp_path, caption, tokens, saved):
    ids = write(tmp_path)
    tokenizer = Tokenizer.from_gpt2(tmp_path)
    if saved:
        tokenizer.save(tmp_path / "tokenizer.json")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode(caption)[0] == [*(ids[token] for token in tokens), 2]
    assert tokenizer.vocab_size == 4 + len(ids) + 1


def test_words_begin_behind_whitespace_however_much(tmp_path):
    write(tmp_path)
    tokenizer = Tokenizer.from_gpt2(tmp_path)
    starts = {text: tokenizer.encode(text)[1] for text in ("cat cat's cat", "cat \n\ncat", "\tcat")}
    assert starts == {
        "cat cat's cat": [True, True, False, True, False],
        "cat \n\ncat": [True, True, False, False, False, False, False],
        "\tcat": [True, False, False, False, False],
    }


def test_a_long_text_keeps_seventy_tokens_and_the_end(tmp_path):
    ids = write(tmp_path)
    assert Tokenizer.from_gpt2(tmp_path).encode("cat " * 10_000)[0] == [ids[f"{SPACE}cat"]] * 70 + [2]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("encoder.json", None, ["encoder.json, vocab.bpe, dict.txt", "got no file there"]),
        ("dict.txt", None, ["encoder.json, vocab.bpe, dict.txt", "got no file there"]),
        ("vocab.bpe", b"\xff", ["expected UTF-8"]),
        ("encoder.json", '{"a": 1', ["expected JSON", "got another file"]),
        ("encoder.json", '["a"]', ["expected JSON", "got list ['a']"]),
        ("encoder.json", '{"a": "1"}', ["expected JSON", "got dict {'a': '1'}"]),
        ("encoder.json", '{"a": 1, "b": 1}', ["a number for each token"]),
        ("encoder.json", '{"a": 1, "b": 2}', ["all 256 bytes", "got none for 254"]),
        ("vocab.bpe", "a t\n", ["a line #version", "got str 'a t' first"]),
        ("vocab.bpe", "#version: 0.2\na t\n' s", ["each line ended", 'str "\' s" last']),
        ("vocab.bpe", "#version: 0.2\na t\na t c\n", ["got str 'a t c' in line 3"]),
        ("vocab.bpe", "#version: 0.2\na z\n", ["which make a third", "got str 'a z' in line 2"]),
        ("dict.txt", "1000 5\n999\n", ["got str '999' in line 2"]),
        ("dict.txt", "1000 5\n999 x\n", ["got str '999 x' in line 2"]),
        ("dict.txt", "1000 5\n1000 4\n", ["got 1000 again in line 2"]),
        ("dict.txt", "<pad> 5\n", ["got <pad> again in line 1"]),
        ("dict.txt", "1000 5\n", ["a line for each number of encoder.json", "got none for"]),
    ],
)
def test_a_file_that_is_missing_or_odd_is_named(tmp_path, name, text, parts):
    write(tmp_path, **{name: text})
    refused(lambda: Tokenizer.from_gpt2(tmp_path), tmp_path / name, *parts)


@pytest.mark.parametrize("caption", ["", " \n"])
def test_a_text_without_characters_is_refused(tmp_path, caption):
    write(tmp_path)
    refused(lambda: Tokenizer.from_gpt2(tmp_path).encode(caption), "caption: expected some text")
