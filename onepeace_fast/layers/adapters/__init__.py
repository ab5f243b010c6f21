"""What turns a modality's input into tokens of the model's width, CLS first. Parameter names are upstream's.

In a decoder an adapter holds positions alone.
"""

from onepeace_fast.layers.adapters.adapter import Adapter, SeriesAdapter, valid_from_padding
from onepeace_fast.layers.adapters.audio import AudioAdapter, frames_of
from onepeace_fast.layers.adapters.depth import DepthAdapter, NormalAdapter
from onepeace_fast.layers.adapters.graph import GraphAdapter
from onepeace_fast.layers.adapters.image import PATCH, ImageAdapter
from onepeace_fast.layers.adapters.points import PointAdapter
from onepeace_fast.layers.adapters.signal import SignalAdapter
from onepeace_fast.layers.adapters.table import TableAdapter
from onepeace_fast.layers.adapters.text import PADDING_TOKEN, TextAdapter
from onepeace_fast.layers.parameters import init_truncated_normal

__all__ = [
    "PADDING_TOKEN",
    "PATCH",
    "Adapter",
    "AudioAdapter",
    "DepthAdapter",
    "GraphAdapter",
    "ImageAdapter",
    "NormalAdapter",
    "PointAdapter",
    "SeriesAdapter",
    "SignalAdapter",
    "TableAdapter",
    "TextAdapter",
    "frames_of",
    "init_truncated_normal",
    "valid_from_padding",
]
