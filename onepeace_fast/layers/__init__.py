"""Modules that hold the parameters under upstream's names and call the ops."""

from onepeace_fast.layers.adapters import AudioAdapter, ImageAdapter, TextAdapter
from onepeace_fast.layers.routed import ExpertFFN, RoutedFFN, RoutedLinear, RoutedNorm
from onepeace_fast.layers.transformer import Transformer, TransformerLayer

__all__ = [
    "AudioAdapter",
    "ExpertFFN",
    "ImageAdapter",
    "RoutedFFN",
    "RoutedLinear",
    "RoutedNorm",
    "TextAdapter",
    "Transformer",
    "TransformerLayer",
]
