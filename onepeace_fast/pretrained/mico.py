"""MiCo from upstream's checkpoints, whose sizes are those of their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import describe
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.mico import EvaConfig, Mico, MicoConfig, TextConfig
from onepeace_fast.models.mico.state import checked
from onepeace_fast.models.upstream import fitting
from onepeace_fast.pretrained.weights import SHOWN, Undrawn, put

KIND = "mico"
VISUAL, TEXT = "vision_encoder.visual", "multimodal_encoder.bert"
LEFT_OUT = "vision_encoder.text."  # CLIP's text encoder, which upstream deletes
# What upstream renames in older files, in its order: the first that is in a name.
_OLD_NAMES = (("video", "vision"), ("evaclip_model", "vision_encoder"), ("clip_model", "vision_encoder"))
_HEAD_WIDTHS = {768: 64, 1024: 64, 1408: 88}  # of EVA's public encoders of these widths
_BERT_HEAD_WIDTH = 64


def is_mico(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of MiCo, old names or new ones."""
    return "itm_head.linear1.weight" in weights and any(".visual.pos_embed" in name for name in weights)


def load_mico(
    path: Path, given: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device, backend: str | None,
    image_size: int | None, config: MicoConfig | None, report: LoadReport,
) -> Mico:  # fmt: skip
    """A model of a file's weights; all of it is checked before a parameter is made."""
    if config is not None and not isinstance(config, MicoConfig):
        raise ValueError(f"config: expected a MicoConfig, got {describe(config)}")
    weights = {_today(name): value for name, value in given.items()}
    report.model = "Mico"
    report.left_out += [name for name in weights if name.startswith(LEFT_OUT)]
    weights = {name: value for name, value in weights.items() if not name.startswith(LEFT_OUT)}
    if image_size is not None:
        _resample(weights, image_size, report)
    with torch.device("meta"), Undrawn():
        model = Mico(config or config_of(weights), backend)
    put(model, fitting(model, checked(model, weights), SHOWN), dtype, device, None, path)
    return model


def _today(name: str) -> str:
    for old, new in _OLD_NAMES:
        if old in name:
            return name.replace(old, new)
    return name


def config_of(weights: Mapping[str, Tensor]) -> MicoConfig:
    """The sizes that the weights have.

    Raises:
        ValueError: an encoder of a width that no public one has, so that its heads are not known, or a missing weight.
    """
    shapes = _Shapes(weights)
    width, patch, grid = shapes.encoder()
    if width not in _HEAD_WIDTHS:
        known = ", ".join(map(str, _HEAD_WIDTHS))
        raise ValueError(f"config: expected one for an encoder of width {width}, whose heads are not those of {known}")
    eva_2, gated = f"{VISUAL}.blocks.0.attn.q_proj.weight" in weights, f"{VISUAL}.blocks.0.mlp.w3.weight" in weights
    vision = EvaConfig(
        image_size=grid * patch, patch_size=patch, width=width, layers=_count(weights, f"{VISUAL}.blocks."),
        head_width=_HEAD_WIDTHS[width], ffn_dim=shapes[f"{VISUAL}.blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"][0],
        output_dim=shapes[f"{VISUAL}.head.weight"][0], rope=eva_2, swiglu=gated, sub_layer_norm=eva_2,
    )  # fmt: skip
    vocabulary, text_width = shapes[f"{TEXT}.embeddings.word_embeddings.weight"]
    text = TextConfig(
        vocab_size=vocabulary, width=text_width, ffn_dim=shapes[f"{TEXT}.encoder.layer.0.intermediate.dense.weight"][0],
        layers=_count(weights, f"{TEXT}.encoder.layer."), heads=text_width // _BERT_HEAD_WIDTH,
        max_positions=shapes[f"{TEXT}.embeddings.position_embeddings.weight"][0],
        type_rows=shapes[f"{TEXT}.embeddings.token_type_embeddings.weight"][0],
    )  # fmt: skip
    end = "_frame_embedding"
    frames = {name.removesuffix(end): value.shape[1] for name, value in weights.items() if name.endswith(end)}
    return MicoConfig(
        vision=vision, text=text, contra_dim=shapes["contra_head_t.linear.weight"][0], frames=frames
    )  # fmt: skip


class _Shapes:
    """The shape of a weight by its name."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Any:
        if name not in self.weights:
            raise ValueError(f"expected weights of MiCo, got none of {name}")
        return self.weights[name].shape

    def encoder(self) -> tuple[int, int, int]:
        """The encoder's width, its patches' side in pixels, and how many of them are along a frame's."""
        matrix, table = self[f"{VISUAL}.patch_embed.proj.weight"], self[f"{VISUAL}.pos_embed"]
        grid = math.isqrt(table[1] - 1) if len(table) == 3 and table[1] > 1 else 0
        if len(matrix) != 4 or table != (1, grid**2 + 1, matrix[0]):
            raise ValueError(
                f"expected weights of patches [width, 3, side, side] and positions [1, grid ** 2 + 1, width], got "
                f"{[*matrix]} and {[*table]}"
            )
        return matrix[0], matrix[-1], grid


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _resample(weights: dict[str, Tensor], image_size: int, report: LoadReport) -> None:
    """Positions for frames of another size, by bilinear interpolation, as upstream does it."""
    name = f"{VISUAL}.pos_embed"
    _, patch, old = _Shapes(weights).encoder()
    positions = weights[name]
    if not isinstance(image_size, int) or image_size <= 0 or image_size % patch:
        raise ValueError(f"image_size: expected a multiple of the patches' {patch} pixels, got {image_size}")
    new = image_size // patch
    if old == new:
        return
    table = positions[0, 1:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resized = F.interpolate(table, (new, new), mode="bilinear")[0].flatten(1).t().to(positions.dtype)
    weights[name] = torch.cat([positions[:, :1], resized[None]], 1)
    # The angles of rotated queries and keys are those of the new grid.
    for angles in [key for key in weights if key.endswith((".freqs_cos", ".freqs_sin"))]:
        del weights[angles]
    report.resampled.append(f"{name} from {old} x {old} to {new} x {new} patches")
