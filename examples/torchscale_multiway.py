"""torchscale's Multiway encoder, that of BEiT-3 (arXiv 2208.10442), with its relative bias, over the library's modules.

Every linear layer and norm has a copy for each of two modalities: tokens before ``split`` take A, the others B.
Attention runs over both, and one bias table serves all layers and all pairs, over absolute indices through both.
``load_torchscale`` takes the weights of a public checkpoint under their own names. Padding is never computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast import RelativeBias, RoutedFFN, RoutedLinear, RoutedNorm, RoutePlan, relative_bias_attention

COPIES = ("A", "B")
RENAMED = {"fc1": "w0", "fc2": "w2", "ffn_layernorm": "sub_norm", "relative_position": "bias"}


class Layer(nn.Module):
    """Attention with a norm before it and one before its output projection, then the feed-forward network."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_attn_layer_norm, self.inner_attn_ln, self.final_layer_norm = (RoutedNorm(2, dim) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (RoutedLinear(2, dim, dim) for _ in range(4))
        self.ffn = RoutedFFN(2, dim, hidden, gated=False, hidden_bias=True, output_bias=True, sub_norm="layer_norm")

    def forward(self, x: Tensor, plan: RoutePlan, attention: dict[str, Any]) -> Tensor:
        """[rows, dim] to [rows, dim]."""
        normed = self.self_attn_layer_norm(x, plan, packed=True)
        q, k, v = (
            layer(normed, plan, packed=True).unflatten(1, (self.heads, -1))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = relative_bias_attention((q, k, v), **attention).flatten(1)
        x = x + self.out_proj(self.inner_attn_ln(attended, plan, packed=True), plan, packed=True)
        return x + self.ffn(self.final_layer_norm(x, plan, packed=True), plan, packed=True)


class MultiwayEncoder(nn.Module):
    """Tokens to tokens; ``buckets`` and ``reach`` are rel_pos_buckets and max_rel_pos, without buckets no bias."""

    def __init__(self, dim: int, heads: int, hidden: int, layers: int, buckets: int = 32, reach: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, hidden) for _ in range(layers))
        self.layer_norm = RoutedNorm(2, dim)
        self.bias = RelativeBias.torchscale(buckets, reach, heads) if buckets else None

    def forward(self, x: Tensor, split: int, padding: Tensor | None = None, captions: bool = False) -> list[Tensor]:
        """The tokens after each layer and, last, after the final norm; zeros at padding.

        Args:
            x: [samples, length, dim].
            split: how many tokens of each sample are of modality A, the first ones.
            padding: bool [samples, length], True where there is no token.
            captions: A sees A alone, and a token of B sees A and B up to itself.
        """
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if padding is None else ~padding
        before, length = torch.arange(x.shape[1], device=x.device) < split, x.shape[1]
        plan = RoutePlan.from_token_masks({"A": real & before, "B": real & ~before}, inert=True)
        attention: dict[str, Any] = plan.segments._asdict() | {"max_length": length}
        if captions:
            attention["order"] = plan.prefix_order(["A"])
        if self.bias is not None:
            attention |= {"bias": [self.bias.vector(length)], "code_offsets": [self.bias.code_offset(length)]}
        states = [plan.pack(x.flatten(0, 1))]
        for layer in self.layers:
            states.append(layer(states[-1], plan, attention))
        states.append(self.layer_norm(states[-1], plan, packed=True))
        return [plan.unpack_interleaved(state).view_as(x) for state in states[1:]]

    def load_torchscale(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights under torchscale's names."""
        self.load_state_dict({own_name(name): weight for name, weight in weights.items()})


def own_name(name: str) -> str:
    """``layers.0.ffn.A.fc1.weight`` of torchscale is ``layers.0.ffn.w0.weight.0`` here."""
    parts = [RENAMED.get(part, part) for part in name.split(".") if part != "self_attn" and part not in COPIES]
    copy = re.search(r"\.([AB])\.", name)
    return ".".join(parts if copy is None else [*parts, str(COPIES.index(copy[1]))])


if __name__ == "__main__":
    torch.manual_seed(0)
    encoder = MultiwayEncoder(dim=64, heads=4, hidden=128, layers=2)
    tokens = torch.randn(2, 20, 64)
    padding = torch.arange(20) >= torch.tensor([[20], [15]])  # the second sample has 8 tokens of A and 7 of B
    out = encoder(tokens, split=8, padding=padding, captions=True)[-1]
    out.square().sum().backward()
    print(f"{list(out.shape)}, gradient of the bias table {list(encoder.bias.table.grad.shape)}")
