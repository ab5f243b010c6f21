"""A small encoder and decoder with the names, arguments and outputs of transformers' T5 and UMT5, for these tests."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from fusion import _t5
from fusion._checks import Case
from torch import nn


class Cache:
    """Keys and values of each layer, as transformers' cache of an encoder and decoder has them."""

    def __init__(self):
        self.self_attention_cache, self.cross_attention_cache = Layers(), Layers()
        self.is_updated = {}


class Layers(dict):
    def update(self, k, v, layer):
        self[layer] = (k, v)


class Attention(_t5.Attention):
    """Of a decoder; one class for self-attention and cross attention, as transformers has it."""

    own_bias = False

    def __init__(self, has_relative_attention_bias, layer):
        super().__init__(has_relative_attention_bias)
        self.is_decoder, self.layer_idx = True, layer

    def compute_bias(self, length, key_length):
        """T5's buckets of keys behind: 4 of them exact, the others logarithmic."""
        exact, buckets = 4, 8
        behind = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
        far = behind.clamp(min=1).float()
        steps = torch.log(far / exact) / math.log(self.relative_attention_max_distance / exact) * (buckets - exact)
        bucket = torch.where(behind < exact, behind, (exact + steps.long()).clamp(max=buckets - 1))
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]

    def both(self, x, others, bias, mask, cache):
        keys = x if others is None else others
        q, k, v = (part(y).unflatten(-1, (_t5.HEADS, -1)).transpose(1, 2)
                   for part, y in ((self.q, x), (self.k, keys), (self.v, keys)))  # fmt: skip
        if cache is not None:
            (cache.self_attention_cache if others is None else cache.cross_attention_cache).update(k, v, self.layer_idx)
            cache.is_updated[self.layer_idx] = others is not None
        if bias is None and others is None:
            bias = self.compute_bias(*2 * (x.shape[1],))
        scores = q @ k.transpose(-1, -2) * self.scaling + mask + (0 if bias is None else bias)
        p = scores.softmax(-1)
        return self.o((p @ v).transpose(1, 2).flatten(2)), bias, p


class SharedBiasAttention(Attention):
    """T5's."""

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, cache=None, **kwargs):
        return self.both(hidden_states, key_value_states, position_bias, mask, cache)


class OwnBiasAttention(Attention):
    """UMT5's."""

    own_bias = True

    def forward(self, hidden_states, encoder_hidden_states=None, cache=None, attention_mask=None, **kwargs):
        out, _, p = self.both(hidden_states, encoder_hidden_states, None, attention_mask, cache)
        return out, p


class Layer(nn.Module):
    """Around one attention."""

    def __init__(self, name, attention):
        super().__init__()
        self.add_module(name, attention)
        self.name, self.layer_norm, self.dropout = name, _t5.Norm(), nn.Dropout(0.0)

    def forward(self, hidden_states, others=None, attention_mask=None, position_bias=None, **kwargs):
        attention = self.get_submodule(self.name)
        if attention.own_bias:
            given = {"attention_mask": attention_mask, "encoder_hidden_states": others}
        else:
            given = {"mask": attention_mask, "key_value_states": others, "position_bias": position_bias}
        out = attention(self.layer_norm(hidden_states), **given, **kwargs)
        return hidden_states + self.dropout(out[0]), *out[1:]


class Block(nn.Module):
    def __init__(self, kind, own_bias, layer):
        super().__init__()
        own, crosses = kind(own_bias or layer == 0, layer), kind(False, layer)
        own.is_causal = True
        layers = [Layer("SelfAttention", own), Layer("EncDecAttention", crosses)]
        self.layer = nn.ModuleList([*layers, _t5.FeedForwardLayer(True)])

    def forward(self, hidden_states, attention_mask=None, position_bias=None, encoder_hidden_states=None,
                encoder_attention_mask=None, cross_bias=None, cache=None, **kwargs):  # fmt: skip
        x, *bias = self.layer[0](hidden_states, None, attention_mask, position_bias, cache=cache, **kwargs)
        x, *cross = self.layer[1](x, encoder_hidden_states, encoder_attention_mask, cross_bias, cache=cache, **kwargs)
        return self.layer[2](x), bias[0], cross[0]


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.config = SimpleNamespace(model_type=kind, is_decoder=True, output_attentions=False)
        self.is_decoder = True
        attention = OwnBiasAttention if kind == "umt5" else SharedBiasAttention
        self.embed_tokens = nn.Embedding(_t5.WORDS, _t5.WIDTH)
        self.block = nn.ModuleList([Block(attention, kind == "umt5", i) for i in range(_t5.LAYERS)])
        self.final_layer_norm, self.dropout = _t5.Norm(), nn.Dropout(0.0)

    def forward(
        self, input_ids=None, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
        inputs_embeds=None, cache=None, use_cache=None, output_hidden_states=False, return_dict=True, **kwargs,
    ):  # fmt: skip
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = Cache() if use_cache and cache is None else cache
        if attention_mask is None or attention_mask.dim() == 2:
            seen = torch.ones(x.shape[1], x.shape[1]).tril().bool()[None]
            attention_mask = added(seen if attention_mask is None else seen & attention_mask.bool()[:, None], x)
        if encoder_attention_mask is None:
            encoder_attention_mask = x.new_zeros(())
        elif encoder_attention_mask.dim() == 2:
            encoder_attention_mask = added(encoder_attention_mask.bool()[:, None], x)
        bias = cross = None
        states = [x]
        for block in self.block:
            x, *found = block(
                x, attention_mask, bias, encoder_hidden_states, encoder_attention_mask, cross, cache=cache, **kwargs
            )
            bias, cross = (None, None) if block.layer[0].SelfAttention.own_bias else found
            states.append(x)
        states[-1] = x = self.dropout(self.final_layer_norm(x))
        out = _t5.Output(last_hidden_state=x, hidden_states=tuple(states), cache=cache)
        return out if return_dict else tuple(out.values())


def added(seen, like):
    return torch.zeros_like(seen[:, None], dtype=like.dtype).masked_fill(~seen[:, None], torch.finfo(like.dtype).min)


class Pair(nn.Module):
    """An encoder and a decoder, whose outputs at padding are zeros."""

    def __init__(self, kind):
        super().__init__()
        self.encoder, self.decoder = _t5.Stack(kind), Stack(kind)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None, **given):
        states = self.encoder(input_ids, attention_mask)["last_hidden_state"]
        out = self.decoder(
            decoder_input_ids, decoder_attention_mask, encoder_hidden_states=states,
            encoder_attention_mask=attention_mask, **given,
        )  # fmt: skip
        real = 1 if decoder_attention_mask is None else decoder_attention_mask[..., None].bool()
        return [x * real for x in out["hidden_states"]]


def model(kind="t5", seed=0):
    torch.manual_seed(seed)
    return _t5.randomised(Pair(kind))


def batch(seed=0):
    written = _t5.batch(seed + 7, (3, 9, 1, 6))
    return {**_t5.batch(seed), **{f"decoder_{name}": value for name, value in written.items()}}


def case(kind="t5"):
    return Case(lambda: model(kind), batch, ("encoder", "decoder"))
