"""A stand-in of BAGEL's decoder: the names and the calls of its packed training, its own code."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion._checks import Batch, Case

WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 48, 2
LENGTHS = ((7, 1, 12), (5, 9), (3, 4, 2, 6))


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def by_kind(x: Tensor, und: Tensor, gen: Tensor, of_und: nn.Module, of_gen: nn.Module) -> Tensor:
    """Each token through its expert."""
    out = torch.zeros_like(x)
    out[und] = of_und(x[und])
    out[gen] = of_gen(x[gen])
    return out


class Attention(nn.Module):
    """Causal attention of each sample, with rotated queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for which in ("", "_moe_gen"):
                setattr(self, name + which, nn.Linear(WIDTH, WIDTH, bias=name != "o_proj"))

    def forward(
        self, packed_sequence, sample_lens, attention_mask, packed_position_embeddings, packed_und_token_indexes,
        packed_gen_token_indexes,
    ):  # fmt: skip
        und, gen = packed_und_token_indexes, packed_gen_token_indexes
        q, k, v = (
            by_kind(packed_sequence, und, gen, getattr(self, name), getattr(self, name + "_moe_gen"))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        cos, sin = packed_position_embeddings
        q, k = (x * cos + x.roll(WIDTH // 2, -1) * sin for x in (q, k))
        outputs = []
        for one_q, one_k, one_v, mask in zip(*(x.split(sample_lens) for x in (q, k, v)), attention_mask, strict=True):
            heads = (x.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for x in (one_q, one_k, one_v))
            outputs.append(F.scaled_dot_product_attention(*heads, mask).transpose(1, 2).reshape(-1, WIDTH))
        return by_kind(torch.cat(outputs), und, gen, self.o_proj, self.o_proj_moe_gen)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.freeze_und = False
        self.self_attn = Attention()
        self.mlp, self.mlp_moe_gen = Network(), Network()
        self.input_layernorm, self.input_layernorm_moe_gen = Norm(WIDTH), Norm(WIDTH)
        self.post_attention_layernorm, self.post_attention_layernorm_moe_gen = Norm(WIDTH), Norm(WIDTH)

    def forward(self, *args, **kwargs):
        return (self.forward_train if self.training else self.forward_inference)(*args, **kwargs)

    def forward_train(self, packed_sequence, **kwargs):
        und, gen = kwargs["packed_und_token_indexes"], kwargs["packed_gen_token_indexes"]
        x = packed_sequence
        normed = by_kind(x, und, gen, self.input_layernorm, self.input_layernorm_moe_gen)
        x = x + self.self_attn(packed_sequence=normed, **kwargs)
        normed = by_kind(x, und, gen, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return x + by_kind(normed, und, gen, self.mlp, self.mlp_moe_gen)

    def forward_inference(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class Rotary(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * torch.logspace(0, -3, WIDTH // 2, device=x.device).repeat(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(freeze_und=False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.norm_moe_gen = Norm(WIDTH), Norm(WIDTH)
        self.rotary_emb = Rotary()

    def forward(self, *args, **kwargs):
        return (self.forward_train if self.training else self.forward_inference)(*args, **kwargs)

    def forward_train(
        self, packed_sequence, sample_lens, attention_mask, packed_position_ids, packed_und_token_indexes=None,
        packed_gen_token_indexes=None,
    ):  # fmt: skip
        und, gen, x = packed_und_token_indexes, packed_gen_token_indexes, packed_sequence
        gen = und.new_ones(0) if gen is None else gen
        cos, sin = self.rotary_emb(x, packed_position_ids.unsqueeze(0))
        for layer in self.layers:
            x = layer(
                packed_sequence=x, sample_lens=sample_lens, attention_mask=attention_mask,
                packed_position_embeddings=(cos.squeeze(0), sin.squeeze(0)), packed_und_token_indexes=und,
                packed_gen_token_indexes=gen,
            )  # fmt: skip
        return by_kind(x, und, gen, self.norm, self.norm_moe_gen)

    def forward_inference(self, packed_query_sequence: Tensor) -> Tensor:
        x = packed_query_sequence
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def make() -> Decoder:
    torch.manual_seed(0)
    return Decoder().train()


def batch(seed: int, lengths: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or LENGTHS[seed % len(LENGTHS)]
    generated = torch.rand(sum(lengths), generator=generator) < 0.4
    return {
        "packed_sequence": torch.randn(sum(lengths), WIDTH, generator=generator),
        "sample_lens": [*lengths],
        "attention_mask": [torch.ones(n, n, dtype=torch.bool).tril() for n in lengths],
        "packed_position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "packed_und_token_indexes": (~generated).nonzero()[:, 0],
        "packed_gen_token_indexes": generated.nonzero()[:, 0],
    }


CASE = Case(make, batch, ("",))
