"""Modules that hold the parameters under upstream's names and call the ops."""

from onepeace_fast.layers.adapters import AudioAdapter, ImageAdapter, TextAdapter
from onepeace_fast.layers.relative_bias import RelativeBias
from onepeace_fast.layers.relative_bias_attention import RelativeBiasAttention
from onepeace_fast.layers.routed import ExpertFFN, RoutedFFN, RoutedLinear, RoutedNorm
from onepeace_fast.layers.shifted_windows import ShiftedWindows, shifted_windows
from onepeace_fast.layers.transformer import Transformer, TransformerLayer

__all__ = [
    "AudioAdapter",
    "ExpertFFN",
    "ImageAdapter",
    "RelativeBias",
    "RelativeBiasAttention",
    "RoutedFFN",
    "RoutedLinear",
    "RoutedNorm",
    "ShiftedWindows",
    "TextAdapter",
    "Transformer",
    "TransformerLayer",
    "shifted_windows",
]
