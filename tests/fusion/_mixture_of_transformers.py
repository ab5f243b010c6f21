"""Stand-ins of Mixture-of-Transformers' modules: their names and calls, their own code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion._checks import Batch, Case

WIDTH, HEAD_DIM, HEADS, HIDDEN, MODALITIES, LAYERS = 32, 8, 4, 48, 3, 2


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.3 * torch.randn(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def of_all(make) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(MODALITIES))


def merged(outputs: list[Tensor], masks, like: Tensor) -> Tensor:
    """Each token's output: of the first mask that it is in."""
    out = outputs[0].new_full((*like.shape[:-1], outputs[0].shape[-1]), 7.0)
    for output, mask in reversed([*zip(outputs, masks, strict=True)]):
        out[mask] = output
    return out


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_modalities = MODALITIES
        self.local_experts, self.local_experts_ffn_norm = of_all(Network), of_all(lambda: Norm(WIDTH))

    def forward(self, x, modality_masks):
        experts = zip(self.local_experts, self.local_experts_ffn_norm, modality_masks, strict=True)
        return merged([norm(expert(x[mask])) for expert, norm, mask in experts], modality_masks, x)


class Attend(nn.Module):
    """Attention over all tokens, as one sample; of its own ``scale``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, q, k, v, attn_mask=None):
        q, k, v = (x.view(1, -1, HEADS, HEAD_DIM).transpose(1, 2) for x in (q * self.scale, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2), "weights"


class Attention(nn.Module):
    def __init__(self, qk_normalization: bool = True) -> None:
        super().__init__()
        self.n_modalities, self.head_dim = MODALITIES, HEAD_DIM
        for name in "qkvo":
            setattr(self, f"local_experts_w{name}", of_all(lambda: nn.Linear(WIDTH, WIDTH, bias=False)))
        if qk_normalization:
            self.local_experts_q_normalization = of_all(lambda: Norm(HEAD_DIM))
            self.local_experts_k_normalization = of_all(lambda: Norm(HEAD_DIM))
        self.local_experts_attention_norm = of_all(lambda: Norm(WIDTH))
        self.attention_comp = Attend()

    def projected(self, x, masks, linears, norms=None):
        outputs = []
        for m, mask in enumerate(masks):
            y = linears[m](x[mask])
            outputs.append(y if norms is None else norms[m](y.unflatten(-1, (HEADS, HEAD_DIM))).flatten(-2))
        return merged(outputs, masks, x)

    def forward(self, x, attn_mask, modality_masks):
        own = self._modules
        q, k, v = (
            self.projected(
                x, modality_masks, own[f"local_experts_w{name}"], own.get(f"local_experts_{name}_normalization")
            )
            for name in "qkv"
        )
        y, weights = self.attention_comp(q, k, v, attn_mask=attn_mask)
        y = y.flatten(0, 1)
        norms = zip(self.local_experts_wo, self.local_experts_attention_norm, modality_masks, strict=True)
        return merged([norm(linear(y[mask])) for linear, norm, mask in norms], modality_masks, y), weights


class Stack(nn.Module):
    def __init__(self, qk_normalization: bool = True) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(qk_normalization) for _ in range(LAYERS))
        self.feed_forward = nn.ModuleList(FeedForward() for _ in range(LAYERS))

    def forward(self, x: Tensor, masks) -> Tensor:
        causal = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            x = x + attention(x, causal, masks)[0]
            x = x + feed_forward(x, masks)
        return x


def make(qk_normalization: bool = True) -> Stack:
    torch.manual_seed(0)
    return Stack(qk_normalization).eval()


def batch(seed: int, tokens: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 21 + seed % 7
    kinds = torch.randint(MODALITIES, (tokens,), generator=generator)
    return {"x": torch.randn(tokens, WIDTH, generator=generator), "masks": [kinds == m for m in range(MODALITIES)]}


PARTS = tuple(f"{part}.{layer}" for part in ("attention", "feed_forward") for layer in range(LAYERS))
CASE = Case(make, batch, PARTS)


def feed_forward() -> FeedForward:
    torch.manual_seed(0)
    return FeedForward()


def feed_forward_batch(seed: int) -> Batch:
    given = batch(seed)
    return {"x": given["x"], "modality_masks": given["masks"]}


def attention_batch(seed: int) -> Batch:
    return {**feed_forward_batch(seed), "attn_mask": None}


FEED_FORWARD = Case(feed_forward, feed_forward_batch, ("",))
ATTENTION = Case(lambda: make().attention[0], attention_batch, ("",), loss=lambda output: output[0].square().sum())
