"""PyTorch layers that compute no padding, for modality-routed transformers such as ONE-PEACE."""

from typing import TYPE_CHECKING, Any

from onepeace_fast import (
    _interrupt,  # noqa: F401  (first, before what is slow)
    _source_tree,  # noqa: F401  makes onepeace_fast.kernels importable for all that follow
    ops,
)
from onepeace_fast.attention_structures import Segments
from onepeace_fast.backend import use_backend
from onepeace_fast.comparison import compare
from onepeace_fast.config import ClassifyConfig, EncoderConfig, OnePeaceConfig, RetrievalConfig
from onepeace_fast.fusion import FusedModel, fuse
from onepeace_fast.key_value_cache import KeyValueCache
from onepeace_fast.layers import (
    RelativeBias,
    RelativeBiasAttention,
    RoutedFFN,
    RoutedLinear,
    RoutedNorm,
    shifted_windows,
)
from onepeace_fast.merging import interpolate, merge
from onepeace_fast.models import OnePeaceClassify, OnePeaceEncoder, OnePeacePretrain, OnePeaceRetrieval
from onepeace_fast.models.mico import Mico, MicoConfig
from onepeace_fast.models.unival import Unival, UnivalConfig
from onepeace_fast.ops import *  # noqa: F403
from onepeace_fast.pretrained import LoadReport, from_pretrained
from onepeace_fast.route_plan import RoutePlan
from onepeace_fast.transformers_attention import register_attention

if TYPE_CHECKING:
    kernels: Any  # _source_tree imports it, where no type checker looks

__version__ = "0.1.0"

__all__ = [
    "ClassifyConfig",
    "EncoderConfig",
    "FusedModel",
    "KeyValueCache",
    "LoadReport",
    "Mico",
    "MicoConfig",
    "OnePeaceClassify",
    "OnePeaceConfig",
    "OnePeaceEncoder",
    "OnePeacePretrain",
    "OnePeaceRetrieval",
    "RelativeBias",
    "RelativeBiasAttention",
    "RetrievalConfig",
    "RoutePlan",
    "RoutedFFN",
    "RoutedLinear",
    "RoutedNorm",
    "Segments",
    "Unival",
    "UnivalConfig",
    "compare",
    "from_pretrained",
    "fuse",
    "interpolate",
    "merge",
    "register_attention",
    "shifted_windows",
    "use_backend",
]
__all__ += ops.__all__
