"""Modules that hold the parameters under upstream's names and call the ops."""

from onepeace_fast.layers.adapters import AudioAdapter, ImageAdapter, TextAdapter
from onepeace_fast.layers.transformer import Transformer, TransformerLayer

__all__ = ["AudioAdapter", "ImageAdapter", "TextAdapter", "Transformer", "TransformerLayer"]
