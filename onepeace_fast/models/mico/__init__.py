"""MiCo (arXiv 2406.09412)."""

from onepeace_fast.models.mico.config import ContextConfig, EvaConfig, MicoConfig, TextConfig
from onepeace_fast.models.mico.connector import LanguageConnector
from onepeace_fast.models.mico.context import Context
from onepeace_fast.models.mico.encoder import EvaEncoder
from onepeace_fast.models.mico.losses import Masked, mask_captions
from onepeace_fast.models.mico.model import Mico
from onepeace_fast.models.mico.text_encoder import TextEncoder

__all__ = [
    "Context",
    "ContextConfig",
    "EvaConfig",
    "EvaEncoder",
    "LanguageConnector",
    "Masked",
    "Mico",
    "MicoConfig",
    "TextConfig",
    "TextEncoder",
    "mask_captions",
]
