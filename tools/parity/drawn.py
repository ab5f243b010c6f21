"""Parameters and inputs that were torch's random numbers of a seed when they were recorded, drawn again bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tools.parity import mico_drawn, unival_drawn

# Sizes of the recorded feed-forward network of Mixture-of-Transformers.
EXPERTS, DIM, HIDDEN, SAMPLES, LENGTH = 3, 128, 224, 2, 45
# Sizes of torchscale's recorded encoder, and how many tokens at the end of its second sample are padding.
MULTIWAY_DIM, MULTIWAY_HIDDEN, MULTIWAY_LAYERS, MULTIWAY_LENGTH, MULTIWAY_PADDING = 128, 192, 2, 144, 31


def matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """1.5 / sqrt(columns) N."""
    return torch.randn(rows, columns, generator=generator) * (1.5 / columns**0.5)


def mixture_of_transformers() -> dict[str, Tensor]:
    """Mixture-of-Transformers' feed-forward network: 1 + 0.2 N in norms."""
    generator, found = torch.Generator().manual_seed(77), {}
    for m in range(EXPERTS):
        for name, shape in (("w1", (HIDDEN, DIM)), ("w3", (HIDDEN, DIM)), ("w2", (DIM, HIDDEN))):
            found[f"param.local_experts.{m}.{name}.weight"] = matrix(*shape, generator)
    for m in range(EXPERTS):
        found[f"param.local_experts_ffn_norm.{m}.weight"] = 1 + 0.2 * torch.randn(DIM, generator=generator)
    generator = torch.Generator().manual_seed(78)
    for name in ("x", "loss_weight"):
        found[f"input.{name}"] = torch.randn(SAMPLES, LENGTH, DIM, generator=generator)
    torch.rand(2 * SAMPLES * LENGTH, generator=generator)  # the masks of the case "overlap"
    found["input.eps_probe.x"] = 0.03 * torch.randn(SAMPLES, LENGTH, DIM, generator=generator)
    return found


def multiway_names() -> Iterator[tuple[str, int, int]]:
    """Each doubled module of torchscale's encoder: its name with {} for the copy, rows, and columns or 0 in a norm."""
    dim, hidden = MULTIWAY_DIM, MULTIWAY_HIDDEN
    for layer in range(MULTIWAY_LAYERS):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"layers.{layer}.self_attn.{name}.{{}}", dim, dim
        yield f"layers.{layer}.self_attn.inner_attn_ln.{{}}", dim, 0
        yield f"layers.{layer}.self_attn_layer_norm.{{}}", dim, 0
        yield f"layers.{layer}.ffn.{{}}", dim, hidden
        yield f"layers.{layer}.final_layer_norm.{{}}", dim, 0
    yield "layer_norm.{}", dim, 0


def torchscale() -> dict[str, Tensor]:
    """torchscale's Multiway encoder: 1 + 0.2 N in norms, 0.2 N in biases, N in the table of the relative bias."""
    generator, found = torch.Generator().manual_seed(31), {}

    def draw(name: str, rows: int, columns: int) -> None:
        weight = matrix(rows, columns, generator) if columns else 1 + 0.2 * torch.randn(rows, generator=generator)
        found[f"param.{name}.weight"] = weight
        found[f"param.{name}.bias"] = 0.2 * torch.randn(rows, generator=generator)

    for name, rows, columns in multiway_names():
        for copy in "AB":
            own = name.format(copy)
            if ".ffn." in own:
                draw(f"{own}.fc1", columns, rows)
                draw(f"{own}.fc2", rows, columns)
                draw(f"{own}.ffn_layernorm", columns, 0)
            else:
                draw(own, rows, columns)
    found["param.relative_position.relative_attention_bias.weight"] = torch.randn(32, 2, generator=generator)
    generator, shape = torch.Generator().manual_seed(32), (SAMPLES, MULTIWAY_LENGTH, MULTIWAY_DIM)
    found["input.loss_weight"] = torch.randn(shape, generator=generator)
    found["input.loss_weight"][1, -MULTIWAY_PADDING:] = 0
    found["input.token_embeddings"] = torch.randn(shape, generator=generator)
    found["input.eps_probe"] = torch.randn(1, 12, MULTIWAY_DIM, generator=generator) * 3e-3
    return found


BY_UPSTREAM: dict[str, Callable[[Mapping[str, str]], dict[str, Tensor]]] = {
    "facebookresearch/Mixture-of-Transformers": lambda metadata: mixture_of_transformers(),
    "microsoft/torchscale": lambda metadata: torchscale(),
    "mshukor/UnIVAL": lambda metadata: unival_drawn.parameters(),
    "invictus717/MiCo": lambda metadata: mico_drawn.drawn(json.loads(metadata["config"])),
}
