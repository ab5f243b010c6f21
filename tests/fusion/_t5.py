"""Small encoders with the names, arguments and outputs of transformers' T5 and UMT5, written for these tests."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fusion._checks import Case
from torch import nn

WIDTH, HEADS, SIZE, LAYERS, WORDS = 32, 2, 12, 2, 40


class Norm(nn.Module):
    """RMSNorm as T5's: in float32, no mean, no bias."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, x):
        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon).to(x.dtype)
        return self.weight * y


class Attention(nn.Module):
    """What both kinds of attention share."""

    def __init__(self, has_relative_attention_bias):
        super().__init__()
        self.is_decoder, self.is_causal, self.scaling, self.dropout = False, False, 1.0, 0.0
        self.has_relative_attention_bias = has_relative_attention_bias
        self.n_heads, self.key_value_proj_dim = HEADS, SIZE
        self.relative_attention_num_buckets, self.relative_attention_max_distance = 8, 10
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.relative_attention_num_buckets, HEADS)

    def compute_bias(self, length, key_length):
        """T5's buckets: half of them for keys ahead, half of those exact, the others logarithmic."""
        half, exact = 4, 2
        place = torch.arange(length, device=self.relative_attention_bias.weight.device)
        ahead = place[None, :] - place[:, None]
        far = ahead.abs().clamp(min=1).float()
        steps = torch.log(far / exact) / math.log(self.relative_attention_max_distance / exact) * (half - exact)
        bucket = torch.where(ahead.abs() < exact, ahead.abs(), (exact + steps.long()).clamp(max=half - 1))
        return self.relative_attention_bias(bucket + half * (ahead > 0)).permute(2, 0, 1)[None]

    def attend(self, x, bias, mask):
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * self.scaling + bias.to(q.dtype)
        p = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
        return self.o((p @ v).transpose(1, 2).flatten(2)), p


class SharedBiasAttention(Attention):
    """T5's: the first layer's bias is handed to the others."""

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, cache=None, **kwargs):
        if position_bias is None:
            position_bias = self.compute_bias(*2 * (hidden_states.shape[1],))
        out, p = self.attend(hidden_states, position_bias, mask)
        return out, position_bias, p


class OwnBiasAttention(Attention):
    """UMT5's: each layer has a bias of its own."""

    def forward(self, hidden_states, encoder_hidden_states=None, cache=None, attention_mask=None, **kwargs):
        return self.attend(hidden_states, self.compute_bias(*2 * (hidden_states.shape[1],)), attention_mask)


class SelfAttentionLayer(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.SelfAttention, self.layer_norm, self.dropout = attention, Norm(), nn.Dropout(0.0)

    def forward(self, hidden_states, attention_mask=None, position_bias=None, cache=None, **kwargs):
        if isinstance(self.SelfAttention, OwnBiasAttention):
            kwargs = {"attention_mask": attention_mask, **kwargs}
        else:
            kwargs = {"mask": attention_mask, "position_bias": position_bias, **kwargs}
        out = self.SelfAttention(self.layer_norm(hidden_states), cache=cache, **kwargs)
        return hidden_states + self.dropout(out[0]), *out[1:]


class Dense(nn.Module):
    def __init__(self, gated):
        super().__init__()
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            self.add_module(name, nn.Linear(WIDTH, 40, bias=False))
        self.wo, self.dropout, self.gated = nn.Linear(40, WIDTH, bias=False), nn.Dropout(0.0), gated

    def forward(self, x):
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else F.relu(self.wi(x))
        return self.wo(self.dropout(x))


class FeedForwardLayer(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.DenseReluDense, self.layer_norm, self.dropout = Dense(gated), Norm(), nn.Dropout(0.0)

    def forward(self, hidden_states):
        return hidden_states + self.dropout(self.DenseReluDense(self.layer_norm(hidden_states)))


def clamped(x):
    """Infinity made finite in float16, as T5 does it."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    return x.clamp(-most + 1000, most - 1000) if x.isinf().any() else x


class Block(nn.Module):
    def __init__(self, attention, gated):
        super().__init__()
        self.layer = nn.ModuleList([SelfAttentionLayer(attention), FeedForwardLayer(gated)])

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        hidden_states, *bias = self.layer[0](hidden_states, attention_mask, position_bias, **kwargs)
        return clamped(self.layer[1](clamped(hidden_states))), bias[0]


class Output(dict):
    """Items by name, as transformers' outputs."""


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        model_type = "mt5" if kind == "gated" else kind
        self.config = SimpleNamespace(model_type=model_type, is_decoder=False, output_attentions=False)
        self.is_decoder = False
        own = kind == "umt5"
        attention = OwnBiasAttention if own else SharedBiasAttention
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.block = nn.ModuleList([Block(attention(own or i == 0), kind != "t5") for i in range(LAYERS)])
        self.final_layer_norm, self.dropout = Norm(), nn.Dropout(0.0)

    def forward(
        self, input_ids=None, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
        inputs_embeds=None, cache=None, use_cache=None, output_hidden_states=False, return_dict=True, **kwargs,
    ):  # fmt: skip
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.dim() == 2:
            hidden = ~attention_mask.bool()[:, None, None]
            attention_mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
        bias, states = None, [x]
        for block in self.block:
            x, found = block(x, attention_mask, bias, **kwargs)
            bias = None if isinstance(block.layer[0].SelfAttention, OwnBiasAttention) else found
            states.append(x)
        states[-1] = x = self.dropout(self.final_layer_norm(x))
        out = Output(last_hidden_state=x, **({"hidden_states": tuple(states)} if output_hidden_states else {}))
        return out if return_dict else tuple(out.values())


class Encoder(nn.Module):
    """A model around a stack, whose outputs at padding are zeros."""

    def __init__(self, kind):
        super().__init__()
        self.encoder = Stack(kind)

    def forward(self, attention_mask=None, **inputs):
        out = self.encoder(attention_mask=attention_mask, output_hidden_states=True, **inputs)
        real = 1 if attention_mask is None else attention_mask[..., None].bool()
        return [x * real for x in out["hidden_states"]]


def model(kind="t5", seed=0):
    torch.manual_seed(seed)
    return randomised(Encoder(kind))


def randomised(made):
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.15 if "layer" in name and "bias" not in name else 0.5)
    return made.eval()


def mask_of(lengths, width=None):
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


def batch(seed=0, lengths=(5, 12, 9, 1)):
    generator = torch.Generator().manual_seed(seed)
    lengths = [lengths[(i + seed) % len(lengths)] for i in range(len(lengths))]
    mask = mask_of(lengths)
    return {"input_ids": torch.randint(WORDS, mask.shape, generator=generator), "attention_mask": mask.long()}


def case(kind="t5"):
    return Case(lambda: model(kind), batch, ("encoder",))
