"""A stand-in of torchscale's encoder: its names and signatures, in code of our own."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, LAYERS, VOCABULARY, EPS = 32, 4, 48, 2, 11, 1e-5
SPLIT, LENGTH, SAMPLES = 4, 9, 12
OFF = {"flash_attention": False, "xpos_rel_pos": False, "segment_length": None, "dilated_ratio": None}


class Pair(nn.Module):
    """Both copies over parts of dimension 1."""

    def __init__(self, module: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.dim, self.split_position = 1, -1
        self.A, self.B = module, copy.deepcopy(module) if other is None else other

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        if self.split_position in (-1, 0):
            return (self.A if self.split_position else self.B)(x, **keywords)
        first, second = x.split([self.split_position, x.shape[1] - self.split_position], 1)
        return torch.cat([self.A(first, **keywords), self.B(second, **keywords)], 1)


class Expert(nn.Module):
    def __init__(self, args: SimpleNamespace) -> None:
        super().__init__()
        self.activation_fn = args.activation_fn
        self.activation_dropout_module, self.dropout_module = nn.Dropout(args.activation_dropout), nn.Dropout(0.0)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.ffn_layernorm = nn.LayerNorm(HIDDEN, EPS) if args.subln else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = self.activation_dropout_module(self.activation_fn(at_least_float32(h)).type_as(h))
        return self.dropout_module(self.fc2(h if self.ffn_layernorm is None else self.ffn_layernorm(h)))


class Attention(nn.Module):
    def __init__(self, args: SimpleNamespace) -> None:
        super().__init__()
        self.args, self.embed_dim, self.num_heads, self.scaling = args, WIDTH, HEADS, args.scaling
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (args.wrap(nn.Linear(WIDTH, WIDTH)) for _ in range(4))
        self.inner_attn_ln = args.wrap(nn.LayerNorm(WIDTH, EPS)) if args.subln else None
        self.dropout_module, self.xpos = nn.Dropout(0.0), None

    def forward(self, query: Tensor, key_padding_mask: Tensor, attn_mask: Tensor | None, rel_pos: Tensor | None) -> Any:
        q, k, v = (
            projection(query).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q * self.scaling) @ k.transpose(2, 3)
        scores = scores if attn_mask is None else scores + attn_mask
        scores = scores.masked_fill(key_padding_mask[:, None, None].bool(), -torch.inf)
        scores = scores if rel_pos is None else scores + rel_pos.view(scores.shape)
        weights = self.dropout_module(at_least_float32(scores).softmax(-1).type_as(scores))
        y = (weights @ v).transpose(1, 2).flatten(2)
        return self.out_proj(y if self.inner_attn_ln is None else self.inner_attn_ln(y)), weights


class PathDropping(nn.Module):
    def __init__(self, probability: float) -> None:
        super().__init__()
        self.drop_prob = probability

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_prob):
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class Layer(nn.Module):
    def __init__(self, args: SimpleNamespace, place: int) -> None:
        super().__init__()
        self.args, self.alpha, self.normalize_before, self.is_moe_layer = args, args.alpha, args.normalize_before, False
        self.self_attn, self.self_attn_layer_norm = Attention(args), args.wrap(nn.LayerNorm(WIDTH, EPS))
        self.dropout_module, self.final_layer_norm = nn.Dropout(args.dropout), args.wrap(nn.LayerNorm(WIDTH, EPS))
        self.drop_path = PathDropping(args.drop_path_rate * place / (LAYERS - 1)) if args.drop_path_rate else None
        self.ffn = args.wrap(Expert(args))

    def forward(
        self, x: Tensor, encoder_padding_mask: Tensor, attn_mask: Tensor | None = None, rel_pos: Tensor | None = None,
        multiway_split_position: int | None = None, incremental_state: Any = None,
    ) -> Any:  # fmt: skip
        set_split(self, self.args, multiway_split_position)
        first = self.normalize_before
        y = self.self_attn_layer_norm(x) if first else x
        y = self.dropout_module(self.self_attn(y, encoder_padding_mask, attn_mask, rel_pos)[0])
        x = x * self.alpha + (y if self.drop_path is None else self.drop_path(y))
        x = x if first else self.self_attn_layer_norm(x)
        y = self.ffn(self.final_layer_norm(x) if first else x)
        x = x * self.alpha + (y if self.drop_path is None else self.drop_path(y))
        return x if first else self.final_layer_norm(x), None


class Bias(nn.Module):
    """Buckets of key - query: near distances, those beyond, and another half for the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.bidirectional, self.num_buckets, self.max_distance = True, 12, 128
        self.relative_attention_bias = nn.Embedding(12, HEADS)

    def compute_bias(self, qlen: int, klen: int, step: int | None = None) -> Tensor:
        device = self.relative_attention_bias.weight.device
        distance = torch.arange(klen, device=device) - torch.arange(qlen, device=device)[:, None] - (step or 0)
        bucket = distance.abs().clamp(max=5) + 6 * (distance < 0)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]

    def forward(self, batch_size: int, qlen: int, klen: int) -> Tensor:
        return self.compute_bias(qlen, klen).repeat(batch_size, 1, 1, 1).view(-1, qlen, klen)


class Positions(nn.Embedding):
    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
        return super().forward(places)


class Encoder(nn.Module):
    def __init__(self, args: SimpleNamespace) -> None:
        super().__init__()
        self.args, self.embed_scale, self.embed_tokens = args, 1.0, nn.Embedding(VOCABULARY, WIDTH)
        self.dropout_module = nn.Dropout(args.embedding_dropout)
        self.embed_positions = Pair(Positions(16, WIDTH), Positions(16, WIDTH)) if args.multiway else None
        self.layernorm_embedding = None
        self.output_projection = nn.Linear(WIDTH, VOCABULARY, bias=False) if args.output else None
        self.layers = nn.ModuleList(Layer(args, place) for place in range(LAYERS))
        self.layer_norm = args.wrap(nn.LayerNorm(WIDTH, EPS)) if args.normalize_before else None
        self.relative_position = Bias() if args.bias else None

    def forward_embedding(
        self, src_tokens: Tensor | None, token_embedding: Tensor | None = None, positions: Tensor | None = None
    ) -> Any:
        token_embedding = self.embed_tokens(src_tokens) if token_embedding is None else token_embedding
        x = embed = self.embed_scale * token_embedding
        if self.embed_positions is not None:
            x = embed + self.embed_positions(x if src_tokens is None else src_tokens, positions=positions)
        return self.dropout_module(x), embed

    def forward(
        self, src_tokens: Tensor | None, encoder_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None,
        return_all_hiddens: bool = False, token_embeddings: Tensor | None = None,
        multiway_split_position: int | None = None, features_only: bool = False, incremental_state: Any = None,
        positions: Tensor | None = None, **others: Any,
    ) -> dict[str, Any]:  # fmt: skip
        tokens = token_embeddings if src_tokens is None else src_tokens
        assert tokens is not None
        mask = torch.zeros(tokens.shape[:2]).bool() if encoder_padding_mask is None else encoder_padding_mask
        set_split(self, self.args, multiway_split_position)
        x, embedding = self.forward_embedding(src_tokens, token_embeddings, positions)
        x = x * (1 - mask[..., None].type_as(x))
        bias = None if self.relative_position is None else self.relative_position(x.shape[0], x.shape[1], x.shape[1])
        states, losses = [x] if return_all_hiddens else [], []
        for layer in self.layers:
            x, loss = layer(
                x, encoder_padding_mask=mask, attn_mask=attn_mask, rel_pos=bias,
                multiway_split_position=multiway_split_position,
            )  # fmt: skip
            losses.append(loss)
            states += [x] if return_all_hiddens else []
        x = x if self.layer_norm is None else self.layer_norm(x)
        x = x if features_only or self.output_projection is None else self.output_projection(x)
        return {
            "encoder_out": x, "encoder_embedding": embedding, "encoder_padding_mask": mask, "encoder_states": states,
            "l_aux": losses,
        }  # fmt: skip


class Model(nn.Module):
    """Image tokens and text through one encoder, as BEiT-3 does."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        args: dict[str, Any] = {
            "multiway": True, "activation_fn": F.gelu, "subln": True, "normalize_before": True, "alpha": 1.0,
            "bias": True, "output": False, "dropout": 0.0, "activation_dropout": 0.0, "embedding_dropout": 0.0,
            "drop_path_rate": 0.0, "scaling": (WIDTH // HEADS) ** -0.5,
        }  # fmt: skip
        args |= OFF | settings
        args["wrap"] = Pair if args["multiway"] else keep
        self.text_embed, self.encoder = nn.Embedding(VOCABULARY, WIDTH), Encoder(SimpleNamespace(**args))

    def forward(
        self, text: Tensor | None = None, image: Tensor | None = None, padding: Tensor | None = None, **others: Any
    ) -> dict[str, Any]:
        parts = [] if image is None else [image]
        parts += [] if text is None else [self.text_embed(text)]
        split = -1 if text is None else 0 if image is None else image.shape[1]
        others = {"multiway_split_position": split if self.encoder.args.multiway else None} | others
        return self.encoder(None, padding, token_embeddings=torch.cat(parts, 1), **others)


def at_least_float32(x: Tensor) -> Tensor:
    """The public code takes float32 in a model of float64 too, which would be no exact value to compare with."""
    return x if x.dtype == torch.float64 else x.float()


def keep(module: nn.Module) -> nn.Module:
    return module


def set_split(module: nn.Module, args: SimpleNamespace, position: int | None) -> None:
    if position is not None:
        assert args.multiway
        for part in module.modules():
            if hasattr(part, "split_position"):
                part.split_position = position


def make(**settings: Any) -> Model:
    """In evaluation mode, with random parameters that hide nothing."""
    generator = torch.Generator().manual_seed(7)
    model = Model(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * drawn if is_scale else drawn * (0.3 if parameter.dim() == 1 else 0.1))
    torch.manual_seed(0)  # of dropped paths
    return model.eval()


def batch(seed: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Samples of an image and a text each, every third without text, others padded in between as well."""
    generator = torch.Generator().manual_seed(seed + 4)
    text = torch.randint(0, VOCABULARY, (SAMPLES, length - SPLIT), generator=generator)
    padding = torch.zeros(SAMPLES, length, dtype=torch.bool)
    padding[1::3, length - 2 :], padding[2::3, SPLIT:], padding[1::3, 2] = True, True, True
    return {"text": text, "image": torch.randn(SAMPLES, SPLIT, WIDTH, generator=generator), "padding": padding}


def real(output: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs without what stands at padding, which a fused encoder leaves zero."""
    mask = output["encoder_padding_mask"][..., None].bool()
    found = {"out": output["encoder_out"], "embedding": output["encoder_embedding"]}
    found |= {f"state {i}": state for i, state in enumerate(output["encoder_states"])}
    return {name: value.masked_fill(mask, 0) for name, value in found.items()}


class Real(nn.Module):
    """A model whose output has no padding."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, **arguments: Any) -> dict[str, Tensor]:
        return real(self.model(**arguments))
