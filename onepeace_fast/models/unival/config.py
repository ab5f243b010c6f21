"""Configuration of UnIVAL; the defaults are those of upstream's unival_base with the flags of its training scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from onepeace_fast.checks import require
from onepeace_fast.config import ModelConfig
from onepeace_fast.relative_position import MAX_POSITIONS

VISUAL = ("image", "video", "audio")  # in the order of a sequence, all before the text
# Upstream's arguments that this model has built in.
_FIXED = {
    "encoder_normalize_before": True, "decoder_normalize_before": True, "share_decoder_input_output_embed": True,
    "share_all_embeddings": True, "layernorm_embedding": True, "patch_layernorm_embedding": True,
    "code_layernorm_embedding": True, "add_type_embedding": True, "scale_attn": True, "scale_fc": True,
    "scale_heads": True, "scale_resids": False, "disable_entangle": True, "entangle_position_embedding": False,
    "no_scale_embedding": True, "attn_scale_factor": 2, "activation_fn": "gelu", "add_mm_type_embedding": False,
    "qk_norm": False, "adapter": False, "encoder_prompt": False, "decoder_prompt": False,
}  # fmt: skip
_ALIKE = ("embed_dim", "ffn_embed_dim", "attention_heads")
_NAMES = {
    "embed_dim": "encoder_embed_dim", "ffn_dim": "encoder_ffn_embed_dim", "attention_heads": "encoder_attention_heads",
    "encoder_layers": "encoder_layers", "decoder_layers": "decoder_layers", "token_bucket_size": "token_bucket_size",
    "image_bucket_size": "image_bucket_size", "max_source_positions": "max_source_positions",
    "max_target_positions": "max_target_positions", "code_image_size": "code_image_size",
}  # fmt: skip
ARCHITECTURE = frozenset({*_FIXED, *_NAMES.values(), "video_encoder_name", "audio_encoder_name"})


@dataclass(frozen=True, kw_only=True)
class UnivalConfig(ModelConfig):
    """Sizes of UnIVAL (arXiv 2307.16184).

    Attributes:
        vocab_size: tokens, of which 0 begins, 1 pads and 2 ends a sequence.
        embed_dim, ffn_dim, attention_heads, encoder_layers, decoder_layers: of encoder and decoder.
        token_bucket_size: buckets of distances between text tokens, in each direction.
        image_bucket_size: the largest side of a feature map.
        max_source_positions, max_target_positions: the longest texts.
        code_image_size: side of an image that is written as codes, 8 pixels each.
        feature_channels: of the feature maps.
        video, audio: whether it takes them, beside text and images.
    """

    kind: ClassVar[str] = "unival"
    vocab_size: int
    embed_dim: int = 768
    ffn_dim: int = 3072
    attention_heads: int = 12
    encoder_layers: int = 6
    decoder_layers: int = 6
    token_bucket_size: int = 256
    image_bucket_size: int = 42
    max_source_positions: int = 1024
    max_target_positions: int = 1024
    code_image_size: int = 128
    feature_channels: int = 2048
    video: bool = True
    audio: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, is_flag = getattr(self, field.name), field.name in VISUAL
            if is_flag:
                require(isinstance(value, bool), f"{field.name}: expected True or False, got {value!r}")
            else:
                fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
                require(fits, f"{field.name}: expected a positive integer, got {value!r}")
        require(
            self.embed_dim % self.attention_heads == 0,
            f"attention_heads: expected a divisor of embed_dim, {self.embed_dim}, got {self.attention_heads}",
        )
        require(self.token_bucket_size > 1, f"token_bucket_size: expected at least 2, got {self.token_bucket_size}")
        for name in ("max_source_positions", "max_target_positions"):
            value = getattr(self, name)
            require(
                value <= MAX_POSITIONS,
                f"{name}: expected at most the {MAX_POSITIONS} that buckets are made for, got {value}",
            )
        require(
            self.code_window <= self.image_bucket_size,
            f"code_image_size: expected at most {8 * self.image_bucket_size}, 8 pixels for each of the positions, got "
            f"{self.code_image_size}",
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those with feature maps."""
        return ("image", *(name for name in ("video", "audio") if getattr(self, name)))

    @property
    def head_dim(self) -> int:
        """Of a head's values, and of the part of its queries and keys that comes of tokens."""
        return self.embed_dim // self.attention_heads

    @property
    def code_window(self) -> int:
        """Codes along a side of an image that is written as codes."""
        return self.code_image_size // 8

    @classmethod
    def from_upstream(cls, args: Mapping[str, Any], vocab_size: int, feature_channels: int = 2048) -> UnivalConfig:
        """The configuration of upstream's arguments, which its checkpoints hold under "cfg" and "model".

        Raises:
            ValueError: an argument by which upstream builds another model than this one.
        """
        for name, value in _FIXED.items():
            got = args.get(name, False if value in (True, False) else value)
            require(got == value, f"{name}: expected {value}, got {got}; UnIVAL's own scripts train no such model")
        for name in _ALIKE:
            one, other = args.get(f"encoder_{name}"), args.get(f"decoder_{name}")
            require(one == other, f"decoder_{name}: expected the encoder's {one}, got {other}")
        given = {own: args[name] for own, name in _NAMES.items() if name in args}
        video, audio = (bool(args.get(f"{name}_encoder_name")) for name in ("video", "audio"))
        return cls(vocab_size=vocab_size, feature_channels=feature_channels, video=video, audio=audio, **given)
