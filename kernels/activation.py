"""The activations of gated feed-forward networks and their derivatives: device functions on float32."""

import triton
import triton.language as tl


@triton.jit
def _sigmoid_and_slope(t):
    """sigmoid(t) and sigmoid'(t) = sigmoid(t) sigmoid(-t), by exp(-|t|), so that neither side cancels."""
    decay = tl.exp(-tl.abs(t))
    larger = 1 / (1 + decay)
    return tl.where(t < 0, decay * larger, larger), decay * larger * larger


@triton.jit
def activation_and_slope(u, ACTIVATION: tl.constexpr):
    """activation(u) and its slope: "relu", "gelu" (Hendrycks and Gimpel, arXiv 1606.08415), "gelu_tanh" and "silu"."""
    if ACTIVATION == "relu":
        value = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(u <= 0, 0.0, 1.0)
    else:
        if ACTIVATION == "gelu":
            gate = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)  # the normal distribution's cumulative function
            slope = gate + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        elif ACTIVATION == "gelu_tanh":
            linear = 1.5957691216057308 * u  # (1 + tanh(t / 2)) / 2 is sigmoid(t)
            cubic = 0.044715 * linear * u * u
            gate, gate_slope = _sigmoid_and_slope(linear + cubic)
            slope = gate + gate_slope * (linear + 3 * cubic)
        else:
            tl.static_assert(ACTIVATION == "silu")
            gate, gate_slope = _sigmoid_and_slope(u)
            slope = gate + gate_slope * u
        value = u * gate
    return value, slope
