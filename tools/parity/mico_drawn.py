"""Parameters and inputs of MiCo's recordings, torch's random numbers of a seed, drawn again bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.models.mico import Context, ContextConfig, EvaConfig, EvaEncoder

ROWS, FRAMES, TOKENS, WORDS = 2, 2, 10, 7  # of recorded inputs: samples, frames, tokens of a frame and of a subtitle
PROBE = 1e-3
BLOCK = {
    False: "norm1 attn.q_bias attn.v_bias attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2",
    True: "norm1 attn.q_bias attn.v_bias attn.q_proj attn.k_proj attn.v_proj attn.inner_attn_ln attn.proj norm2 "
    "mlp.w1 mlp.w2 mlp.ffn_ln mlp.w3",
}  # fmt: skip
# The numbers of frames of each modality, beside those of its table.
OTHER_FRAMES = {"vision": (6, 1), "audio": (2,), "depth": (5,)}


def drawn(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a recording's configuration says, its seed among it; inputs are of the seed behind it."""
    seed = config["seed"]
    with torch.device("meta"):
        model, places, inputs = (_encoder if "vision_cfg" in config else _context)(config)
    found, generator = {}, torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for place in places:
        for name in (place, f"{place}.weight", f"{place}.bias"):
            if name in shapes:
                found[f"param.{name}"] = _parameter(name, shapes[name], generator)
    generator.manual_seed(seed + 1)
    for name, (shape, scale) in inputs.items():
        found[f"input.{name}"] = x = torch.randn(shape, generator=generator) * scale
        if name in model_tables(config):
            x[0, 0, 3] = 0  # so small behind the projection that a wrong epsilon shows
        elif name == "subtitle":
            x[0, 3] = 0
    if "param.contra_temp" in found:
        found["param.contra_temp"] = torch.tensor(0.07)
    return found


def model_tables(config: Mapping[str, Any]) -> dict[str, int]:
    """The inputs with as many frames as their tables."""
    found = {name.split("_")[1]: rows for name, rows in config.items() if name.startswith("max_")}
    return {f"{name}{rows}": rows for name, rows in found.items()}


def _parameter(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + 0.2 * x
    if len(shape) == 1:
        return (0.02 if name.startswith("hidden_trans") and name.endswith(".0.bias") else 0.2) * x
    if shape[:1] in ((), (1,)):  # tokens and tables of embeddings
        return 0.5 * x
    return x * ((1.0 if "patch_embed" in name else 1.5) / shape[1:].numel() ** 0.5)


def _encoder(config: Mapping[str, Any]) -> tuple[nn.Module, Iterator[str], dict[str, Any]]:
    sizes = EvaConfig.from_upstream(config["vision_cfg"], config["embed_dim"])
    blocks = (f"blocks.{i}.{name}" for i in range(sizes.layers) for name in BLOCK[sizes.sub_layer_norm].split())
    places = iter(["cls_token", "pos_embed", "patch_embed.proj", *blocks, "norm", "head"])
    side, rows = sizes.image_size, ROWS * FRAMES
    inputs = {
        "vision_pixels": ((ROWS, FRAMES, 3, side, side), 1), "audio_spectrograms": ((ROWS, 1, side, side), 1),
        "loss_weight_features": ((rows, sizes.tokens, sizes.width), 1),
        "loss_weight_head": ((rows, sizes.output_dim), 1), "eps_probe": ((1, sizes.tokens, sizes.width), PROBE),
    }  # fmt: skip
    return EvaEncoder(sizes), places, inputs


def _context(config: Mapping[str, Any]) -> tuple[nn.Module, Iterator[str], dict[str, Any]]:
    frames = {name.rstrip("0123456789"): rows for name, rows in model_tables(config).items()}
    dim, contra, width = config["vision_dim"], config["contra_dim"], config["multimodal_dim"]
    places = ["contra_temp", *(f"{name}_frame_embedding" for name in frames)]
    places += [f"{name}_type_embeddings" for name in (*frames, "subtitle")]
    places += [f"contra_head_{letter}.linear" for letter in "tsvad"]
    places += [f"contra_head_{union}" for union in ("va", "id", "vs", "vas")]
    places += [f"itm_head.{name}" for name in ("linear1", "layernorm", "linear2")]
    places += [f"hidden_trans_{name}_multimodal.{i}" for name in (*frames, "subtitle") for i in (0, 1)]
    counts = [(name, n) for name, rows in frames.items() for n in (rows, *OTHER_FRAMES[name])]
    inputs: dict[str, Any] = {f"{name}{n}": ((ROWS, n, TOKENS, dim), 1) for name, n in counts}
    inputs["subtitle"] = ((ROWS, WORDS, width), 1)
    inputs |= {f"w_{name}{n}": ((ROWS, n * TOKENS, width), 1) for name, n in counts}
    inputs["w_subtitle"] = ((ROWS, WORDS, width), 1)
    first, rows = next(iter(frames.items()))
    inputs[f"w_pooled_{first}{rows}"] = ((ROWS, 2 * rows, width), 1)
    inputs |= {f"wf_{letter}": ((ROWS, contra), 1) for letter in "vadst"}
    inputs["wf_itm"] = ((ROWS, 2), 1)
    sizes = ContextConfig(vision_dim=dim, width=width, contra_dim=contra, frames=frames)
    return Context(sizes), iter(places), inputs
