"""GPT-2's byte-pair encoding from the three files that ONE-PEACE's public code reads, with the ids of its dictionary.

``encoder.json`` numbers the tokens, ``vocab.bpe`` lists the merges, best first, and ``dict.txt`` has a line "number
count" for each number; a token's id is the line's place behind the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onepeace_fast.checks import describe, require
from onepeace_fast.data._optional import optional

FILES = ("encoder.json", "vocab.bpe", "dict.txt")


def normaliser() -> Any:
    """One space before a text, no more; ``Tokenizer`` knows by it that a text is taken as upstream's interface does."""
    rules = optional("tokenizers").normalizers
    return rules.Sequence([rules.Prepend(" ")])


def read_gpt2(folder: Path, special: Sequence[str]) -> Any:
    """A model of ``tokenizers`` from the three files; ``special`` are the first tokens.

    Raises:
        ValueError: a file that is missing or does not fit the others; one line naming it.
    """
    tokenizers = optional("tokenizers")
    texts = {}
    for name in FILES:
        path = folder / name
        require(
            path.is_file(), lambda path=path: f"{path}: expected {', '.join(FILES)} in one folder, got no file there"
        )
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8, got other bytes ({error.reason})") from None
    numbers = _numbers(folder / FILES[0], texts[FILES[0]])
    merges = _merges(folder / FILES[1], texts[FILES[1]], numbers)
    words = _words(folder / FILES[2], texts[FILES[2]], special)
    vocabulary = {word: place for place, word in enumerate([*special, *words])}
    token_of = {str(number): token for token, number in numbers.items()}
    lacking = token_of.keys() - vocabulary.keys()
    require(
        not lacking,
        lambda: (
            f"{folder / FILES[2]}: expected a line for each number of {FILES[0]}, got none for {len(lacking)} of "
            f"them, such as {min(lacking)}"
        ),
    )
    ids = {token_of.get(word, word): place for word, place in vocabulary.items()}
    require(
        len(ids) == len(vocabulary),
        lambda: f"{folder / FILES[0]}: expected tokens with other names than the words of {FILES[2]}, got some alike",
    )
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    model.normalizer = normaliser()
    # Its pattern is GPT-2's; a token begins at its space, behind which a word begins.
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def _numbers(path: Path, text: str) -> dict[str, int]:
    try:
        numbers = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, {{token: number}}, got another file ({error})") from None
    fits = isinstance(numbers, dict) and all(type(number) is int for number in numbers.values())
    require(fits, lambda: f"{path}: expected JSON, {{token: number}}, got {describe(numbers)}")
    require(
        len(set(numbers.values())) == len(numbers), lambda: f"{path}: expected a number for each token, got one twice"
    )
    absent = set(optional("tokenizers").pre_tokenizers.ByteLevel.alphabet()) - numbers.keys()
    require(not absent, lambda: f"{path}: expected tokens for all 256 bytes, got none for {len(absent)} of them")
    return numbers


def _merges(path: Path, text: str, numbers: dict[str, int]) -> list[tuple[str, str]]:
    first, *lines = text.split("\n")
    require(
        first.startswith("#version") and lines[-1:] == [""],
        lambda: (
            f"{path}: expected a line #version, then merges, each line ended, got {describe(first)} first and "
            f"{describe(lines[-1] if lines else first)} last; it was cut off or is another file"
        ),
    )
    merges = []
    for number, line in enumerate(lines[:-1], start=2):
        pair = line.split()
        require(
            len(pair) == 2 and {*pair, "".join(pair)} <= numbers.keys(),
            lambda number=number, line=line: (
                f"{path}: expected two tokens of {FILES[0]} which make a third, got {describe(line)} in line {number}"
            ),
        )
        merges.append((pair[0], pair[1]))
    return merges


def _words(path: Path, text: str, special: Sequence[str]) -> list[str]:
    words: dict[str, int] = dict.fromkeys(special, 0)
    for number, line in enumerate(text.splitlines(), start=1):
        word, _, count = line.rpartition(" ")
        require(
            bool(word) and count.isdecimal(),
            lambda number=number, line=line: (
                f"{path}: expected lines of a number and its count, got {describe(line)} in line {number}"
            ),
        )
        if word in words:
            raise ValueError(f"{path}: expected each number once, got {word} again in line {number}")
        words[word] = number
    return [*words][len(special) :]
