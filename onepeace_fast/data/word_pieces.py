"""BERT's word pieces (arXiv 1810.04805), of a Hugging Face tokenizer's file."""

from __future__ import annotations

import os
from typing import Any

from onepeace_fast.checks import require
from onepeace_fast.data.text import Tokenizer, read_tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class BertTokenizer(Tokenizer):
    """A Hugging Face ``tokenizers`` model of BERT: a text stands between [CLS] and [SEP], and token 0, [PAD], pads it.

    Attributes:
        mask: the token that hides others.
        first_word: the first token behind the special ones.
    """

    padding = 0

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.begin, self.end, self.mask = (model.token_to_id(token) for token in SPECIAL_TOKENS[2:])
        self.first_word = 1 + max(model.token_to_id(token) for token in SPECIAL_TOKENS)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BertTokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            ValueError: no such file, not a tokenizer, or special tokens that are not BERT's; one line naming the file.
            ImportError: tokenizers is missing.
        """
        path, model = read_tokenizer(path)
        ids = {token: model.token_to_id(token) for token in SPECIAL_TOKENS}
        require(
            None not in ids.values() and ids["[PAD]"] == cls.padding,
            lambda: f"{path}: expected BERT's special tokens {', '.join(ids)}, [PAD] as token 0, got {ids}",
        )
        return cls(model)
