"""The fused operations, each behind a ``torch.library`` op with its reference beside it."""

from onepeace_fast.ops.gated_sub_ln import gated_sub_ln
from onepeace_fast.ops.layer_norm import layer_norm
from onepeace_fast.ops.relative_bias_attention import relative_bias_attention
from onepeace_fast.ops.residual import residual, residual_layer_norm, residual_rms_norm
from onepeace_fast.ops.rms_norm import rms_norm
from onepeace_fast.ops.routed_ffn import routed_ffn
from onepeace_fast.ops.routed_linear import routed_linear

__all__ = [
    "gated_sub_ln",
    "layer_norm",
    "relative_bias_attention",
    "residual",
    "residual_layer_norm",
    "residual_rms_norm",
    "rms_norm",
    "routed_ffn",
    "routed_linear",
]
