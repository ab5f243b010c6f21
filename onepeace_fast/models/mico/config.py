"""Configuration of MiCo; the defaults are those of MiCo-g: EVA-01-CLIP's giant encoder and BERT's base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from onepeace_fast.checks import require
from onepeace_fast.config import ModelConfig, is_number

EPS = 1e-6  # of the encoder's norms
PADDING = 0  # BERT's [PAD]
# Upstream's heads of the contrast, whose names are letters; a modality of one's own has its name.
LETTERS = {"vision": "v", "audio": "a", "depth": "d", "subtitle": "s"}
LOSSES = ("contrast", "matching", "caption")
# Upstream's heads of several modalities, by what is joined, in this order.
UNIONS = {
    "va": ("vision", "audio"), "id": ("vision", "depth"), "vs": ("vision", "subtitle"),
    "vas": ("vision", "audio", "subtitle"),
}  # fmt: skip
# No modality of one's own is called so: it would be taken for another input, result or head.
RESERVED = {
    "subtitle", "text", "caption", "samples", "masked", "hidden", "generator", "of", "mask", "options", "task", "self",
    "union", "t", *LETTERS.values(), *UNIONS,
}  # fmt: skip
# Of the vision section of EVA-CLIP's JSON: what is built in, and upstream's default where the key is absent.
_FIXED: Mapping[str, tuple[Any, Any]] = {
    "qkv_bias": (True, True), "postnorm": (False, False), "ls_init_value": (None, None), "patch_dropout": (0, 0),
    "global_average_pool": (False, False), "timm_model_name": (None, None),
}  # fmt: skip
_NAMES = {
    "image_size": "image_size", "patch_size": "patch_size", "width": "width", "layers": "layers",
    "head_width": "head_width", "rope": "rope", "naiveswiglu": "swiglu", "subln": "sub_layer_norm",
    "pt_hw_seq_len": "rope_grid",
}  # fmt: skip
_OF_KERNELS = ("fusedLN", "xattn")  # how upstream computes it, not what
_UPSTREAM = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0}


def _check_sizes(config: Any) -> None:
    """Raise where a field that is an integer is not a positive one, or a flag is none."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if one.type == "bool":
            require(isinstance(value, bool), f"{one.name}: expected True or False, got {value!r}")
        elif one.type == "int":
            fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
            require(fits, f"{one.name}: expected a positive integer, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """Sizes of EVA's vision transformer: EVA-01 (arXiv 2211.07636), or EVA-02 (arXiv 2303.11331) by its three flags.

    Attributes:
        image_size, patch_size: of a square frame, in pixels; positions are learned for this grid alone.
        width, layers, head_width, ffn_dim: of the blocks; width / head_width heads.
        output_dim: of EVA-CLIP's head, which reads the last CLS.
        rope: whether queries and keys of patches are rotated by row and column.
        rope_grid: the grid that these angles were made for; another one is stretched over it.
        swiglu: a gated FFN, of three matrices.
        sub_layer_norm: norms before attention's output projection and inside the FFN.
        drop_path_rate: of the last block; that of the first is 0.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    layers: int = 40
    head_width: int = 88
    ffn_dim: int = 6144
    output_dim: int = 1024
    rope: bool = False
    rope_grid: int = 16
    swiglu: bool = False
    sub_layer_norm: bool = False
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self)
        for name, whole in (("head_width", "width"), ("patch_size", "image_size")):
            part, size = getattr(self, name), getattr(self, whole)
            require(size % part == 0, f"{name}: expected a divisor of {whole}, {size}, got {part}")
        require(
            not self.rope or self.head_width % 4 == 0,
            f"head_width: expected a multiple of 4, pairs of rows and of columns, got {self.head_width}",
        )
        rate = self.drop_path_rate
        require(is_number(rate) and 0 <= rate < 1, f"drop_path_rate: expected a probability in [0, 1), got {rate!r}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Of a frame, with CLS."""
        return self.grid**2 + 1

    @property
    def heads(self) -> int:
        """Of attention."""
        return self.width // self.head_width

    @classmethod
    def from_upstream(cls, vision: Mapping[str, Any], output_dim: int) -> EvaConfig:
        """The configuration of the vision section of EVA-CLIP's JSON; its embedding width is ``output_dim``.

        Raises:
            ValueError: a setting by which upstream builds another model than this one.
        """
        known = {*_FIXED, *_NAMES, *_OF_KERNELS, "mlp_ratio", "drop_path_rate", "eva_model_name", "intp_freq"}
        unknown = sorted(set(vision) - known)
        require(not unknown, f"vision_cfg: expected EVA-CLIP's settings, got {', '.join(unknown)}")
        for name, (value, default) in _FIXED.items():
            got = vision.get(name, default)
            require(got == value, f"vision_cfg.{name}: expected {value}, got {got}; this library has no such encoder")
        given = {**_UPSTREAM, **vision}
        sizes = {own: given[name] for name, own in _NAMES.items() if name in given}
        config = cls(
            ffn_dim=int(given["width"] * given["mlp_ratio"]), output_dim=output_dim,
            drop_path_rate=given.get("drop_path_rate") or 0.0, **sizes,
        )  # fmt: skip
        require(
            not config.rope or given.get("intp_freq", False) or config.grid == config.rope_grid,
            f"vision_cfg.intp_freq: expected True for a grid of {config.grid}, whose angles are those of "
            f"{config.rope_grid}, got False",
        )
        return config


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of BERT (arXiv 1810.04805) with cross attention; the defaults are those of its base model, uncased.

    Attributes:
        vocab_size: tokens, of which 0 pads a text.
        width, ffn_dim, layers, heads: of the layers.
        max_positions: the longest text.
        type_rows: of the table of token types, of which the first alone is read.
        mask_id, first_word: the token that hides others, and the first of the words that are put in others' places;
            those of BERT's vocabularies.
    """

    vocab_size: int = 30522
    width: int = 768
    ffn_dim: int = 3072
    layers: int = 12
    heads: int = 12
    max_positions: int = 512
    type_rows: int = 2
    mask_id: int = 103
    first_word: int = 106

    def __post_init__(self) -> None:
        _check_sizes(self)
        for name in ("mask_id", "first_word"):
            value, limit = getattr(self, name), self.vocab_size
            require(value < limit, f"{name}: expected a token below vocab_size, {limit}, got {value}")
        require(self.width % self.heads == 0, f"heads: expected a divisor of width, {self.width}, got {self.heads}")


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What is built of the encoder's tokens for the text encoder to see.

    Attributes:
        vision_dim: width of the encoder's tokens.
        width: of the context, and of the text encoder.
        contra_dim: of the features that are contrasted.
        frames: {modality: rows of its table of frame embeddings}; frames of all of them go through one encoder.
    """

    vision_dim: int = 1408
    width: int = 768
    contra_dim: int = 512
    frames: Mapping[str, int] = field(default_factory=lambda: {"vision": 8, "audio": 8, "depth": 8})

    def __post_init__(self) -> None:
        _check_sizes(self)
        fits = isinstance(self.frames, Mapping)
        require(fits, f"frames: expected modalities with their numbers of frames, got {self.frames!r}")
        require(len(self.frames) > 0, "frames: expected at least one modality, got none")
        for name, rows in self.frames.items():
            fits = isinstance(name, str) and name.isidentifier() and name not in RESERVED
            require(fits, f"frames: expected names that are no names of inputs, results or heads, got {name!r}")
            whole = isinstance(rows, int) and not isinstance(rows, bool) and rows > 0
            require(whole, f"frames[{name!r}]: expected a positive integer, got {rows!r}")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of a context, in the order of its packed rows."""
        return (*self.frames, "subtitle")

    @property
    def unions(self) -> dict[str, tuple[str, ...]]:
        """Upstream's heads of several modalities that there are."""
        return {name: parts for name, parts in UNIONS.items() if set(parts) <= {*self.modalities}}


@dataclass(frozen=True, kw_only=True)
class MicoConfig(ModelConfig):
    """Sizes of MiCo (arXiv 2406.09412).

    Attributes:
        vision: of the encoder, which all frames share.
        text: of the text encoder.
        contra_dim, frames: as in ``ContextConfig``.
        contrast_weight, matching_weight, caption_weight: of the losses in their sum.
        pool: whether texts see two tokens of each frame, its CLS and the mean of its patches, in place of all.
    """

    kind: ClassVar[str] = "mico"
    vision: EvaConfig = EvaConfig()
    text: TextConfig = TextConfig()
    contra_dim: int = 512
    frames: Mapping[str, int] = field(default_factory=lambda: {"vision": 8, "audio": 8, "depth": 8})
    contrast_weight: float = 1.0
    matching_weight: float = 0.1
    caption_weight: float = 1.0
    pool: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("vision", EvaConfig), ("text", TextConfig)):
            section = getattr(self, name)
            require(isinstance(section, kind), f"{name}: expected the encoder's sizes, got {section!r}")
        _check_sizes(self)
        weights = {f"{name}_weight": getattr(self, f"{name}_weight") for name in LOSSES}
        for name, weight in weights.items():
            require(is_number(weight) and weight >= 0, f"{name}: expected a weight of at least 0, got {weight!r}")
        require(any(weights.values()), f"{', '.join(weights)}: expected one above 0, got none")
        self.context  # noqa: B018  # it is checked where it is made

    @property
    def context(self) -> ContextConfig:
        """What is between the two encoders."""
        return ContextConfig(
            vision_dim=self.vision.width, width=self.text.width, contra_dim=self.contra_dim, frames=self.frames
        )
