"""The parameters of UnIVAL's recordings, torch's random numbers of a seed, drawn again bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DIM, HEADS, HIDDEN, LAYERS, VOCABULARY = 128, 2, 96, 2, 40
POSITIONS, GRID, BUCKETS, CHANNELS, SEED = 40, 6, 8, 24, 20240
EPS_ROWS = 5e-3
# Rows of position tables so small that a wrong epsilon shows behind them.
SMALL = {
    "encoder.embed_positions": (3, 11), "encoder.embed_image_positions": (9,), "encoder.embed_video_positions": (8,),
    "encoder.embed_audio_positions": (8,), "decoder.embed_positions": (2,),
}  # fmt: skip
DECODER_NORMS = "self_attn_ln cross_attn_ln self_attn_layer_norm encoder_attn encoder_attn_layer_norm ffn_layernorm"
SHAPES = {
    "embed_tokens": (VOCABULARY, DIM), "type_embedding": (2, DIM), "embed_positions": (POSITIONS, DIM),
    "positions": (GRID**2 + 1, DIM), "proj": (DIM, CHANNELS), "fc1": (HIDDEN, DIM), "fc2": (DIM, HIDDEN),
    "linear": (DIM, DIM), "token_table": (2 * BUCKETS - 1, HEADS), "image_table": ((2 * GRID - 1) ** 2 + 3, HEADS),
}  # fmt: skip


def modules() -> Iterator[str]:
    """The modules in the order in which upstream made them; an attention stands for its parts."""
    encoder = (
        "embed_tokens layernorm_embedding type_embedding image_proj embed_video_positions video_proj "
        "embed_audio_positions audio_proj patch_layernorm_embedding embed_positions embed_image_positions pos_ln "
        "image_pos_ln pos_q_linear pos_k_linear"
    )
    decoder = (
        "layernorm_embedding embed_positions embed_image_positions pos_ln image_pos_ln self_pos_q_linear "
        "self_pos_k_linear cross_pos_q_linear cross_pos_k_linear code_layernorm_embedding"
    )
    layers = {
        "encoder": "self_attn self_attn_layer_norm fc1 fc2 attn_ln ffn_layernorm final_layer_norm",
        "decoder": f"self_attn {DECODER_NORMS} fc1 fc2 final_layer_norm",
    }
    for stack, own in (("encoder", encoder), ("decoder", decoder)):
        yield from (f"{stack}.{name}" for name in own.split())
        yield from (f"{stack}.layers.{i}.{name}" for i in range(LAYERS) for name in layers[stack].split())
        yield f"{stack}.layer_norm"
        yield from (f"{stack}.{kind}_rel_pos_table_list.{i}" for kind in ("token", "image") for i in range(LAYERS))


def parameters() -> dict[str, Tensor]:
    """1 + 0.2 N in norms, 0.2 N in biases, 1.5 / sqrt(columns) N in matrices, and tables of deviations of their own."""
    generator, found = torch.Generator().manual_seed(SEED), {}

    def draw(name: str, deviation: float, *shape: int, mean: float = 0.0) -> None:
        found[f"param.{name}"] = mean + deviation * torch.randn(shape, generator=generator)

    def draw_linear(name: str, rows: int, columns: int) -> None:
        draw(f"{name}.weight", 1.5 / columns**0.5, rows, columns)
        draw(f"{name}.bias", 0.2, rows)

    for name in modules():
        last = name.rpartition(".")[2]
        if last in ("self_attn", "encoder_attn"):
            draw(f"{name}.c_attn", 0.3, HEADS, mean=1.0)
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                draw_linear(f"{name}.{part}", DIM, DIM)
        elif "_rel_pos_table_list." in name:
            draw(f"{name}.weight", 1.0, *SHAPES["image_table" if "image" in name else "token_table"])
        elif last in ("embed_tokens", "type_embedding"):
            draw(f"{name}.weight", 0.15, *SHAPES[last])
        elif last.endswith("positions"):
            draw(f"{name}.weight", 0.5, *SHAPES.get(last, SHAPES["positions"]))
            found[f"param.{name}.weight"][[*SMALL.get(name, ())]] *= EPS_ROWS
        elif last.startswith("fc") or last.endswith(("_proj", "_linear")):
            draw_linear(name, *SHAPES[last if last.startswith("fc") else last.rpartition("_")[2]])
        else:
            width = HIDDEN if last == "ffn_layernorm" else DIM
            draw(f"{name}.weight", 0.2, width, mean=1.0)
            draw(f"{name}.bias", 0.2, width)
    return found
