"""UnIVAL (arXiv 2307.16184)."""

from onepeace_fast.models.unival.beam_search import Hypothesis, Trie
from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.model import Unival

__all__ = ["Hypothesis", "Trie", "Unival", "UnivalConfig"]
