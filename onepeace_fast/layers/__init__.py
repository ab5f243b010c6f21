"""Modules that hold the parameters under upstream's names and call the ops."""

from onepeace_fast.layers.adapters import AudioAdapter, ImageAdapter, TextAdapter
from onepeace_fast.layers.relative_bias import RelativeBias
from onepeace_fast.layers.shifted_windows import ShiftedWindows, shifted_windows
from onepeace_fast.layers.transformer import Transformer, TransformerLayer

__all__ = [
    "AudioAdapter",
    "ImageAdapter",
    "RelativeBias",
    "ShiftedWindows",
    "TextAdapter",
    "Transformer",
    "TransformerLayer",
    "shifted_windows",
]
