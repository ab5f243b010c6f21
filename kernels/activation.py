"""The activations of gated feed-forward networks and their derivatives: device functions on float32."""

import triton
import triton.language as tl


@triton.jit
def activation_and_slope(u, ACTIVATION: tl.constexpr):
    """activation(u) and activation'(u), for "gelu" (Hendrycks and Gimpel, arXiv 1606.08415), "gelu_tanh" and "silu"."""
    if ACTIVATION == "gelu":
        gate = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)  # the normal distribution's cumulative function
        slope = gate + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(t / 2)) / 2 is sigmoid(t)
        linear = 1.5957691216057308 * u
        cubic = 0.044715 * linear * u * u
        gate = tl.sigmoid(linear + cubic)
        slope = gate + gate * (1 - gate) * (linear + 3 * cubic)
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate = tl.sigmoid(u)
        slope = gate + gate * (1 - gate) * u
    return u * gate, slope
