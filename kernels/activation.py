"""The activations of gated feed-forward networks and their derivatives: device functions that compute in float32."""

import triton
import triton.language as tl


@triton.jit
def _reciprocal(x):
    """1 / x of x at least 1: one instruction and a product, where a division takes nine and is no closer."""
    return tl.rsqrt(x * x)


@triton.jit
def _sigmoid_and_slope(t):
    """sigmoid(t) and sigmoid'(t) = sigmoid(t) sigmoid(-t), by exp(-|t|), so that neither side cancels."""
    decay = tl.exp2(-1.4426950408889634 * tl.abs(t))
    larger = _reciprocal(1 + decay)
    return tl.where(t < 0, decay * larger, larger), decay * larger * larger


@triton.jit
def _normal_distribution(u, HALF: tl.constexpr):
    """The normal distribution's cumulative function, and sqrt(2 pi) times its density.

    That of values in half precision is Abramowitz and Stegun's 7.1.26, off by 7.5e-8 at most, which shares the density:
    it takes a third of erf's instructions. In float32 it would break the tolerance rule.
    """
    decay = tl.exp2(-0.7213475204444817 * u * u)  # exp(-u^2 / 2)
    if HALF:
        t = _reciprocal(1 + 0.23164188 * tl.abs(u))  # 0.3275911 / sqrt(2)
        series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        tail = 0.5 * t * (0.254829592 + t * (-0.284496736 + t * series)) * decay
        gate = tl.where(u < 0, tail, 1 - tail)
    else:
        gate = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
    return gate, decay


@triton.jit
def activation_and_slope(u, ACTIVATION: tl.constexpr):
    """activation(u) and its slope, in float32, of u as it is stored.

    "relu", "gelu" (Hendrycks and Gimpel, arXiv 1606.08415), "gelu_tanh" and "silu".
    """
    HALF: tl.constexpr = u.dtype.primitive_bitwidth < 32
    u = u.to(tl.float32)
    if ACTIVATION == "relu":
        value = tl.where(u < 0, 0.0, u)  # a NaN stays
        slope = tl.where(u <= 0, 0.0, 1.0)
    else:
        if ACTIVATION == "gelu":
            gate, decay = _normal_distribution(u, HALF)
            slope = gate + u * decay * 0.3989422804014327
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
