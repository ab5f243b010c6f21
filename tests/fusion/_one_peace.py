"""A stand-in with the names and calls of ONE-PEACE's public encoder and adapters; code of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.layers.adapters.adapter import take
from onepeace_fast.relative_position import dense_index, grid_codes, series_index, series_vector_index

DIM, HEADS, HIDDEN, LAYERS, GRID, BUCKETS, VOCABULARY = 32, 4, 48, 2, 3, 4, 30
NAMES = {"text": "text", "image": "image", "audio": "audio", "vl": "text image", "al": "text audio"}


class Dropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.apply_during_inference = p, False

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p) if self.p and (self.training or self.apply_during_inference) else x


class GeGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.wi_0(x)) * self.wi_1(x)


class Attention(nn.Module):
    def __init__(self, dropout: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = DIM, HEADS, DIM // HEADS
        self.scaling = self.head_dim**-0.5
        self.dropout_p, self.dropout_module = dropout, Dropout(dropout)
        self.c_attn = nn.Parameter(torch.ones(HEADS)) if options["scale_heads"] else None
        self.ln = nn.LayerNorm(DIM) if options["sub_norm"] else None
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(3))
        self.k_proj = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(2, (HEADS, -1)).permute(1, 2, 0, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = self.scaling * q @ k.transpose(2, 3)
        scores = scores if attn_mask is None else scores + attn_mask
        mixed = (self.dropout_module(scores.softmax(-1)) @ v).permute(2, 0, 1, 3)
        if self.c_attn is not None:
            mixed = mixed * self.c_attn[:, None]
        mixed = mixed.flatten(2)
        return self.out_proj(mixed if self.ln is None else self.ln(mixed))


class Layer(nn.Module):
    def __init__(self, drop_path: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.dropout_prob, self.drop_path_prob = options["dropout"], drop_path
        self.self_attn = Attention(options["attention_dropout"], options)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn_ln = nn.LayerNorm(DIM) if options["attn_ln"] else None
        self.activation_dropout_module = Dropout(options["activation_dropout"])
        for name in options["modalities"]:
            norm = nn.LayerNorm(HIDDEN) if options["sub_norm"] else nn.Identity()
            ffn = nn.Sequential(GeGLU(), self.activation_dropout_module, norm, nn.Linear(HIDDEN, DIM))
            self.add_module(f"{name}_ffn", ffn)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(DIM)) for _ in range(2))

    def arrive(self, x: Tensor, gamma: Tensor, residual: Tensor) -> Tensor:
        x = gamma * F.dropout(x, self.dropout_prob, self.training)
        if self.training and self.drop_path_prob > 0:
            keep = 1 - self.drop_path_prob
            x = x * x.new_empty(1, x.shape[1], 1).bernoulli_(keep).div_(keep)
        return residual + x

    def forward(
        self, x: Tensor, encoder_padding_mask: Tensor | None, self_attn_bias: Tensor | None = None,
        encoder_type: str | None = None, text_seq_len: int | None = None, image_seq_len: int | None = None,
        audio_seq_len: int | None = None,
    ) -> Tensor:  # fmt: skip
        attended = self.self_attn(self.self_attn_layer_norm(x), encoder_padding_mask, self_attn_bias)
        attended = attended if self.attn_ln is None else self.attn_ln(attended)
        x = self.arrive(attended, self.gamma_1, x)
        lengths = {"text": text_seq_len, "image": image_seq_len, "audio": audio_seq_len}
        names = NAMES[encoder_type or ""].split()
        parts = self.final_layer_norm(x).split([lengths[name] or 0 for name in names])
        mixed = [self.get_submodule(f"{name}_ffn")(part) for name, part in zip(names, parts, strict=True)]
        return self.arrive(torch.cat(mixed), self.gamma_2, x)


class Encoder(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.num_attention_heads = HEADS
        rates = [options["drop_path"] * layer / (LAYERS - 1) for layer in range(LAYERS)]
        self.layers = nn.ModuleList(Layer(rate, options) for rate in rates)
        for name in NAMES["text"], "image", "audio":
            has_norm = name in options["modalities"] and name in options["normed"]
            setattr(self, f"{name}_layer_norm", nn.LayerNorm(DIM) if has_norm else None)

    def forward(
        self, text_info: Any, image_info: Any, audio_info: Any, return_all_hiddens: bool = False,
        encoder_type: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        if encoder_type not in NAMES:
            raise ValueError(f"encoder_type: expected one of {', '.join(NAMES)}, got {encoder_type!r}")
        infos = {"text": text_info, "image": image_info, "audio": audio_info}
        names = NAMES[encoder_type].split()
        lengths = {name: 0 if infos[name] is None else infos[name][0].shape[1] for name in infos}
        x = torch.cat([infos[name][0] for name in names], dim=1)
        padding = torch.cat([infos[name][1] for name in names], dim=1)
        x = x * ~padding[..., None]
        biases = []
        first = infos[names[0]][2]
        for table in range(0 if first is None else len(first)):
            bias = x.new_zeros(x.shape[0], HEADS, x.shape[1], x.shape[1])
            start = 0
            for name in names:
                stop = start + lengths[name]
                if infos[name][2] is not None:
                    bias[:, :, start:stop, start:stop] += infos[name][2][table]
                start = stop
            biases.append(bias.masked_fill_(padding[:, None, None], -torch.inf))
        x = x.transpose(0, 1)
        states: dict[str, list[Tensor]] = {name: [] for name in infos}
        for number, layer in enumerate(self.layers):
            bias = biases[number if len(biases) > 1 else 0] if biases else None
            x = layer(
                x, encoder_padding_mask=padding, self_attn_bias=bias, encoder_type=encoder_type,
                text_seq_len=lengths["text"], image_seq_len=lengths["image"], audio_seq_len=lengths["audio"],
            )  # fmt: skip
            if return_all_hiddens:
                for name, part in zip(names, x.split([lengths[name] for name in names]), strict=True):
                    states[name].append(part)
        parts = []
        for name, part in zip(names, x.split([lengths[name] for name in names]), strict=True):
            norm = getattr(self, f"{name}_layer_norm")
            parts.append(part if norm is None else norm(part))
        return {
            "encoder_out": [torch.cat(parts)],
            "encoder_padding_mask": padding,
            **{f"{name}_encoder_states": of for name, of in states.items()},
        }


class Adapter(nn.Module):
    """Buckets, tables and their list; ``sized`` is whether the list is asked for with a length."""

    sized = True

    def __init__(self, rows: int, buckets: Tensor, tables: int) -> None:
        super().__init__()
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, DIM))
        self.rel_pos_table_list = None
        if tables:
            self.register_buffer("rp_bucket", buckets)
            self.rel_pos_table_list = nn.ModuleList(nn.Embedding(rows, HEADS) for _ in range(tables))

    def get_rel_pos_bias(self, bsz: int, seq_len: int | None = None) -> list[Tensor]:
        assert self.rel_pos_table_list is not None
        assert (seq_len is not None) == self.sized
        buckets = self.rp_bucket[:seq_len, :seq_len]
        return [table(buckets).permute(2, 0, 1).expand(bsz, -1, -1, -1) for table in self.rel_pos_table_list]

    def gather_features(
        self, adapter_embedding: Tensor, pos_embed: Tensor, self_attn_bias_list: Any, position_ids: Any
    ):
        biases = None
        if self_attn_bias_list is not None:
            rows, columns = position_ids[:, None, :, None], position_ids[:, None, None]
            biases = [
                bias.gather(2, rows.expand(-1, HEADS, -1, bias.shape[3])).gather(
                    3, columns.expand(-1, HEADS, rows.shape[2], -1)
                )
                for bias in self_attn_bias_list
            ]
        return take(adapter_embedding, position_ids), take(pos_embed, position_ids), biases

    def place(self, tokens: Tensor, positions: Tensor, padding: Tensor, preserve_ids: Tensor | None) -> Any:
        batch = tokens.shape[0]
        x = torch.cat([self.cls_embedding.expand(batch, -1, -1), tokens], dim=1)
        positions, biases = positions[: x.shape[1]].expand(batch, -1, -1), None
        if self.rel_pos_table_list is not None:
            biases = self.get_rel_pos_bias(*((batch, x.shape[1]) if self.sized else (batch,)))
        if preserve_ids is not None:
            padding = preserve_ids.eq(-1)
            ids = preserve_ids.masked_fill(padding, preserve_ids.shape[1] - 1)
            x, positions, biases = self.gather_features(x, positions.contiguous(), biases, ids)
        return x + positions, padding, biases


def series_buckets(positions: int = 40) -> Tensor:
    """Buckets of all pairs of positions, CLS first."""
    rows = series_vector_index(series_index(BUCKETS), BUCKETS, positions)
    code = torch.arange(positions)
    return rows[dense_index(code, code == 0, positions - 1, len(rows))]


class TextAdapter(Adapter):
    def __init__(self, tables: int) -> None:
        super().__init__(2 * BUCKETS + 2, series_buckets(), tables)
        self.embed_tokens, self.embed_positions = nn.Embedding(VOCABULARY, DIM, 1), nn.Embedding(40, DIM)

    def forward(self, src_tokens: Tensor, preserve_ids: Tensor | None = None) -> Any:
        padding = F.pad(src_tokens.eq(1), (1, 0))
        return self.place(self.embed_tokens(src_tokens), self.embed_positions.weight, padding, preserve_ids)


class ImageAdapter(Adapter):
    sized = False

    def __init__(self, tables: int) -> None:
        rows = (2 * GRID - 1) ** 2 + 3
        code = grid_codes(GRID, GRID)
        buckets = dense_index(code, torch.arange(len(code)) == 0, (rows - 3) // 2, rows)
        super().__init__(rows, buckets, tables)
        self.embed_images = nn.Conv2d(3, DIM, 2, 2)
        self.pos_embed = nn.Parameter(torch.zeros(GRID**2 + 1, DIM))

    def forward(self, src_images: Tensor, preserve_ids: Tensor | None = None) -> Any:
        tokens = self.embed_images(src_images).flatten(2).transpose(1, 2)
        padding = torch.zeros(tokens.shape[0], tokens.shape[1] + 1, dtype=torch.bool, device=tokens.device)
        return self.place(tokens, self.pos_embed, padding, preserve_ids)


class AudioAdapter(Adapter):
    def __init__(self, tables: int) -> None:
        super().__init__(2 * BUCKETS + 2, series_buckets(), tables)
        self.embed_audios, self.embed_positions = nn.Linear(5, DIM), nn.Embedding(40, DIM)

    def gather_features(self, adapter_embedding: Tensor, self_attn_bias_list: Any, position_ids: Tensor) -> Any:  # type: ignore[override]
        _, _, biases = super().gather_features(adapter_embedding, adapter_embedding, self_attn_bias_list, position_ids)
        return take(adapter_embedding, position_ids[:, 1:] - 1), biases

    def forward(self, src_audios: Tensor, padding_mask: Tensor, preserve_ids: Tensor | None = None) -> Any:
        x, batch = self.embed_audios(src_audios), src_audios.shape[0]
        biases = None
        if self.rel_pos_table_list is not None:
            biases = self.get_rel_pos_bias(batch, padding_mask.shape[1])
        ids = torch.arange(padding_mask.shape[1], device=padding_mask.device).expand(batch, -1)
        if preserve_ids is not None:
            padding_mask = preserve_ids.eq(-1)
            ids = preserve_ids.masked_fill(padding_mask, preserve_ids.shape[1] - 1)
            x, biases = self.gather_features(x, biases, ids)
        x = torch.cat([self.cls_embedding.expand(batch, -1, -1), x], dim=1)
        return x + self.embed_positions(ids), padding_mask, biases


class Wrapper(nn.Module):
    """Adapters and ``fusion_model``, as the public models hold them; padding comes out as zeros.

    ``options`` change the configuration.
    """

    def __init__(self, tables: int = 1, seed: int = 0, **options: Any) -> None:
        super().__init__()
        known = {
            "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "drop_path": 0.0, "scale_heads": True,
            "attn_ln": True, "sub_norm": True, "modalities": ("text", "image", "audio"),
            "normed": ("text", "image", "audio"),
        } | options  # fmt: skip
        for name, kind in (("text", TextAdapter), ("image", ImageAdapter), ("audio", AudioAdapter)):
            if name in known["modalities"]:
                self.add_module(f"{name}_adapter", kind(tables))
        self.fusion_model = Encoder(known)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.add_(1)
                if isinstance(module, Attention) and module.c_attn is not None:
                    module.c_attn.add_(1)

    def forward(
        self, src_tokens: Any = None, src_images: Any = None, src_audios: Any = None, audio_padding_masks: Any = None,
        encoder_type: str | None = None, text_preserve_ids: Any = None, image_preserve_ids: Any = None,
        audio_preserve_ids: Any = None, return_all_hiddens: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        names = NAMES.get(encoder_type or "", "text image audio").split()
        text = self.text_adapter(src_tokens, text_preserve_ids) if "text" in names else None
        image = self.image_adapter(src_images, image_preserve_ids) if "image" in names else None
        audio = self.audio_adapter(src_audios, audio_padding_masks, audio_preserve_ids) if "audio" in names else None
        found = self.fusion_model(text, image, audio, return_all_hiddens=return_all_hiddens, encoder_type=encoder_type)
        padding = found["encoder_padding_mask"]
        hidden = [
            torch.cat(states)
            for states in zip(*(found[f"{name}_encoder_states"] for name in names), strict=True)
        ]  # fmt: skip
        return [x.transpose(0, 1).masked_fill(padding[..., None], 0) for x in (*found["encoder_out"], *hidden)]
