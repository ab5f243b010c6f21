"""Captions: byte-pair encoding with upstream's special tokens, the starts of words, padding."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.data._gpt2 import normaliser, read_gpt2
from onepeace_fast.data._optional import optional
from onepeace_fast.layers.adapters import PADDING_TOKEN

BEGIN, END, UNKNOWN = 0, 2, 3
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MAX_TOKENS = 70
_BYTES = 256

_log = logging.getLogger(__name__)


class Tokenizer:
    """A Hugging Face ``tokenizers`` model whose special tokens have the ids of upstream's dictionary.

    ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3. Runs of whitespace in a caption count as one space, as in upstream.
    A trained one also puts captions in lower case; one from a file does what its normaliser says. One from GPT-2's
    files, also after ``save`` and ``load``, takes a caption as upstream's interface does: in lower case, behind one
    space, with all its own whitespace.
    """

    begin, end, padding = BEGIN, END, PADDING_TOKEN

    def __init__(self, model: Any) -> None:
        self._model = model
        own = model.normalizer
        self._as_upstream = own is not None and own.__getstate__() == normaliser().__getstate__()
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True  # "<pad>" in a caption is five characters, not padding

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            ValueError: no such file, not a tokenizer, or special tokens with other ids; one line naming the file.
            ImportError: tokenizers is missing.
        """
        path, model = read_tokenizer(path)
        ids = {token: model.token_to_id(token) for token in SPECIAL_TOKENS}
        expected = {token: place for place, token in enumerate(SPECIAL_TOKENS)}
        require(ids == expected, lambda: f"{path}: expected special tokens {expected}, got {ids}")
        return cls(model)

    @classmethod
    def from_gpt2(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read upstream's ``encoder.json``, ``vocab.bpe`` and ``dict.txt``: GPT-2's byte-pair encoding, fairseq's ids.

        Raises:
            ValueError: a file that is missing or does not fit the others; one line naming it.
            ImportError: tokenizers is missing.
        """
        return cls(read_gpt2(Path(folder).expanduser(), SPECIAL_TOKENS))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909) on captions, in lower case.

        Every text can be encoded: no token is unknown. Captions with few different words give fewer than ``vocab_size``
        tokens; read ``vocab_size`` afterwards. The same captions give the same tokenizer.

        Raises:
            ValueError: no captions, one that is not Unicode, or a ``vocab_size`` below 260, the special tokens and
                bytes.
            ImportError: tokenizers is missing.
        """
        tokenizers = optional("tokenizers")
        smallest = len(SPECIAL_TOKENS) + _BYTES
        if type(vocab_size) is not int or vocab_size < smallest:
            raise ValueError(
                f"vocab_size: expected at least {smallest}, got {vocab_size!r}; {len(SPECIAL_TOKENS)} special tokens "
                f"and {_BYTES} bytes"
            )
        cleaned = [text for caption in captions if (text := _one_line(caption))]
        require(bool(cleaned), "captions: expected at least one with text, got none")
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL_TOKENS[UNKNOWN]))
        model.normalizer = tokenizers.normalizers.Lowercase()
        model.pre_tokenizer = byte_level(add_prefix_space=True)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(cleaned, trainer)
        return cls(model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``tokenizer.json``."""
        Path(path).expanduser().write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """What ``save`` writes."""
        return self._model.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id plus one."""
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    def tokens(self, caption: str) -> tuple[list[int], list[bool]]:
        """All tokens of a caption without END, and whether each one begins a word.

        A word begins at the first token and behind whitespace, so punctuation belongs to the word before it.

        Raises:
            ValueError: a caption without text, one that is not Unicode, or one of whose tokens is special, which would
                hide or end the rest.
        """
        text = _one_line(caption)
        if text and self._as_upstream:
            text = caption.lower()  # as upstream does it: tokenizers' own knows no final sigma
        require(bool(text), lambda: f"caption: expected some text, got {caption!r}")
        encoding = self._model.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if not ids:
            raise ValueError(f"caption: expected what the tokenizer knows, got {describe(text)}, which has no token")
        require(
            not {self.begin, self.padding, self.end} & set(ids),
            lambda: f"caption: expected text without {', '.join(SPECIAL_TOKENS[:UNKNOWN])}, got {describe(text)}",
        )
        # A space counts as part of the word behind it: some tokenizers give it to the token, some leave it out.
        word_of = list(accumulate(
            character.isspace() and not before.isspace() for before, character in pairwise(["", *text])
        ))  # fmt: skip
        words = [word_of[min(start, len(text) - 1)] for start, _ in encoding.offsets]
        return ids, [True, *(word != before for before, word in pairwise(words))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without the space in front that byte-pair encoding puts before the first word."""
        return self._model.decode(list(ids), skip_special_tokens=False).strip()

    def encode(self, caption: str, *, max_tokens: int = MAX_TOKENS) -> tuple[list[int], list[bool]]:
        """The first ``max_tokens`` tokens of a caption and END, and whether each begins a word; END does not.

        Raises:
            ValueError: as ``tokens``.
        """
        ids, starts = self.tokens(caption)
        return [*ids[:max_tokens], self.end], [*starts[:max_tokens], False]


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[str, Any]:
    """A ``tokenizer.json``'s path and its model.

    Raises:
        ValueError: no such file, or not a tokenizer; one line naming the file.
        ImportError: tokenizers is missing.
    """
    tokenizers = optional("tokenizers")
    path = os.path.expanduser(os.fspath(path))
    require(os.path.isfile(path), lambda: f"{path}: expected a tokenizer.json, got no file there")
    try:
        # from_file takes no name that is not UTF-8.
        model = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # its own kind is Exception itself
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected a tokenizer.json of tokenizers, got another file ({reason})") from error
    return path, model


class Splits(Protocol):
    """What turns a text into tokens, such as a ``Tokenizer``."""

    def tokens(self, caption: str, /) -> tuple[list[int], list[bool]]:
        """As ``Tokenizer.tokens``."""
        ...


class TokenizedCaptions:
    """Captions encoded once, kept in two flat tensors; how many were cut is logged in one line.

    Args:
        captions, tokenizer: every caption is encoded at once.
        max_tokens: a longer caption loses its end.
        end: the token behind each.
        name: what a message calls the caption at a place, which counts from 0.
        what: such as "subtitle", where they are no captions.

    Attributes:
        truncated: the number of captions that were cut.

    Raises:
        ValueError: as ``Tokenizer.tokens``; the line says which caption.
    """

    def __init__(
        self,
        captions: Sequence[str],
        tokenizer: Splits,
        *,
        max_tokens: int = MAX_TOKENS,
        end: int = END,
        name: Callable[[int], str] = "captions[{}]".format,
        what: str = "caption",
    ) -> None:
        self.truncated = 0
        ids, starts, self._ends = array("i"), bytearray(), array("q")
        for place, caption in enumerate(captions):
            try:
                tokens, words = tokenizer.tokens(caption)
            except ValueError as error:
                raise ValueError(f"{name(place)}: {what}: {str(error).removeprefix('caption: ')}") from None
            self.truncated += len(tokens) > max_tokens
            ids.extend([*tokens[:max_tokens], end])
            starts.extend([*words[:max_tokens], False])
            self._ends.append(len(ids))
        self._ids = torch.from_numpy(numpy.array(ids, dtype=numpy.int32))
        self._starts = torch.from_numpy(numpy.array(starts, dtype=bool))
        if self.truncated:
            _log.warning(
                "%ss: %d of %d have more than %d tokens; each of these loses its end",
                what,
                self.truncated,
                len(self),
                max_tokens,
            )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        """Ids, int64 [length], the end last, and the starts of words, bool [length]."""
        begin, end = self._ends[place - 1] if place else 0, self._ends[place]
        return self._ids[begin:end].long(), self._starts[begin:end]


def pad_tokens(rows: Sequence[tuple[Sequence[int] | Tensor, Sequence[bool] | Tensor]]) -> tuple[Tensor, Tensor]:
    """Pad what ``Tokenizer.encode`` returns, row by row: text int64 [rows, length] and word starts bool [rows, length].

    Padding is token 1 and begins no word.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.as_tensor(ids, dtype=torch.int64, device="cpu") for ids, _ in rows]
    starts = [torch.as_tensor(starts, dtype=torch.bool, device="cpu") for _, starts in rows]
    return pad(ids, batch_first=True, padding_value=PADDING_TOKEN), pad(starts, batch_first=True)


def _one_line(caption: str) -> str:
    text = " ".join(caption.split())
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"caption: expected whole characters, got {describe(text)} with a lone surrogate; write it anew"
        ) from None
    return text
