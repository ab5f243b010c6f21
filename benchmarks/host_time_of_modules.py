"""Host time of the routed modules beside plain PyTorch that gathers and scatters each modality's tokens.

    python -m benchmarks.host_time_of_modules [ROUNDS]

It runs without a GPU. The library's side launches no kernel, as in ``host_time.py``; its vendor products, and all of
plain PyTorch, are computed, on rows so few and narrow that their time is the host's. Attention runs its reference:
no kernel of Triton is in it. Plain PyTorch has its indices made before. Medians of one thread's CPU time, in
microseconds: over packed rows, and over tokens that are packed and unpacked.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.host_time import WARM, measure, no_launches
from onepeace_fast import RelativeBias, RelativeBiasAttention, RoutedFFN, RoutedLinear, RoutedNorm, RoutePlan
from onepeace_fast.hardware.cases import Case

TOKENS, WIDTH, MODALITIES, DTYPE = 48, 16, 3, torch.float32
SAMPLES, HEADS = 4, 2
Routed = RoutedFFN | RoutedLinear | RoutedNorm


def modules() -> dict[str, Routed | RelativeBiasAttention]:
    """The measured modules by their names."""
    return {
        "RoutedLinear": RoutedLinear(MODALITIES, WIDTH, WIDTH),
        "RoutedNorm, layer_norm": RoutedNorm(MODALITIES, WIDTH),
        "RoutedNorm, rms_norm": RoutedNorm(MODALITIES, WIDTH, "rms_norm"),
        "RoutedFFN, GeGLU, Sub-LayerNorm": RoutedFFN(MODALITIES, WIDTH, 2 * WIDTH, sub_norm="layer_norm"),
        "RoutedFFN, SwiGLU, RMSNorm behind": RoutedFFN(
            MODALITIES, WIDTH, 2 * WIDTH, activation="silu", output_norm="rms_norm"
        ),
        "RoutedFFN, no gate, biases, Sub-LayerNorm": RoutedFFN(
            MODALITIES, WIDTH, 2 * WIDTH, gated=False, hidden_bias=True, output_bias=True, sub_norm="layer_norm"
        ),
        "RelativeBiasAttention, T5's bias": RelativeBiasAttention(WIDTH, HEADS, RelativeBias.t5(HEADS)),
    }


def plain(experts: list[nn.Module], indices: list[Tensor]) -> Callable[..., Tensor]:
    """Each modality's tokens gathered, computed by its expert, and scattered."""

    def call(x: Tensor, **_parameters: Tensor) -> Tensor:
        parts = [expert(x[index]) for expert, index in zip(experts, indices, strict=True)]
        out = parts[0].new_empty(x.shape[0], parts[0].shape[1])
        for index, part in zip(indices, parts, strict=True):
            out[index] = part
        return out

    return call


def plain_attention(module: RelativeBiasAttention) -> Callable[..., Tensor]:
    """All samples as one batch, with the dense bias."""
    length = TOKENS // SAMPLES

    def call(x: Tensor, **_parameters: Tensor) -> Tensor:
        q, k, v = (
            projection(x).view(SAMPLES, length, HEADS, -1).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=module.bias.dense(length))
        return module.out_proj(y.transpose(1, 2).reshape(x.shape))

    return call


def ways(module: Routed | RelativeBiasAttention) -> dict[str, Callable[..., Tensor]]:
    """The calls that are compared: of the tokens x, and for ``packed`` of their rows."""
    if isinstance(module, RelativeBiasAttention):
        route = RoutePlan.from_lengths({"text": [TOKENS // SAMPLES] * SAMPLES})
        return {
            "packed": lambda x, **_: module(x, route),
            "tokens": lambda x, **_: route.unpack(module(route.pack({"text": x.view(SAMPLES, -1, WIDTH)}), route))[
                "text"
            ],
            "plain": plain_attention(module),
        }
    indices = [torch.arange(m, TOKENS, MODALITIES) for m in range(MODALITIES)]
    plan = RoutePlan.from_indices({str(m): index for m, index in enumerate(indices)}, TOKENS)
    return {
        "packed": lambda x, **_: module(x, plan, packed=True),
        "tokens": lambda x, **_: module(x, plan),
        "plain": plain([*module.experts()], indices),
    }


def run(rounds: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """Medians of forward and backward pass by module and way, in one interleaved run."""
    cases = {
        name: {
            way: Case(
                name, way, call, {"x": torch.randn(TOKENS, WIDTH, dtype=DTYPE), **dict(module.named_parameters())}
            )
            for way, call in ways(module).items()
        }
        for name, module in modules().items()
    }
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {way: [] for way in own} for name, own in cases.items()
    }
    for _ in range(WARM + rounds):
        for name, own in cases.items():
            for way, case in own.items():
                if way == "plain":
                    times[name][way].append(measure(case))
                else:
                    with no_launches():
                        times[name][way].append(measure(case))
    return {
        name: {way: tuple(map(statistics.median, zip(*found[WARM:], strict=True))) for way, found in own.items()}
        for name, own in times.items()
    }


def main() -> None:
    """Print a line for each module."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    headings = "".join(f"{way:>10}" for way in ("packed", "tokens", "plain") * 2)
    print(f"{'host time, us: forward, then backward':45}{headings}")
    for name, own in run(rounds).items():
        figures = [own[way][which] for which in range(2) for way in ("packed", "tokens", "plain")]
        print(f"{name:45}" + "".join(f"{figure:10.0f}" for figure in figures))


if __name__ == "__main__":
    main()
