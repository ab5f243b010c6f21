"""MiCo (arXiv 2406.09412)."""

from onepeace_fast.models.mico.config import ContextConfig, EvaConfig, TextConfig
from onepeace_fast.models.mico.context import Context
from onepeace_fast.models.mico.encoder import EvaEncoder
from onepeace_fast.models.mico.text_encoder import TextEncoder

__all__ = ["Context", "ContextConfig", "EvaConfig", "EvaEncoder", "TextConfig", "TextEncoder"]
