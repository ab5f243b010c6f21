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
_RATES = ("dropout", "attention_dropout", "activation_dropout", "encoder_drop_path_rate", "decoder_drop_path_rate")
_FLAGS = ("video", "audio", "networks")
_STAGES = 4
_CHANNELS = 512  # 32 times a network's first width, which the 32 groups of the 3-D ResNeXt divide after doubling
# Upstream's arguments that this model has built in.
_FIXED: dict[str, Any] = {
    "encoder_normalize_before": True, "decoder_normalize_before": True, "share_decoder_input_output_embed": True,
    "share_all_embeddings": True, "layernorm_embedding": True, "patch_layernorm_embedding": True,
    "code_layernorm_embedding": True, "add_type_embedding": True, "scale_attn": True, "scale_fc": True,
    "scale_heads": True, "scale_resids": False, "disable_entangle": True, "entangle_position_embedding": False,
    "no_scale_embedding": True, "attn_scale_factor": 2, "activation_fn": "gelu", "add_mm_type_embedding": False,
    "qk_norm": False, "adapter": False, "encoder_prompt": False, "decoder_prompt": False, "sync_bn": False,
    "resnet_drop_path_rate": 0.0, "mel_bins": 64, "enable_fusion": False, "layernorm_image_embedding": False,
    "layernorm_video_embedding": False, "layernorm_audio_embedding": False, "encoder_layerdrop": 0,
    "decoder_layerdrop": 0, "quant_noise_pq": 0, "interpolate_position": False, "with_cls": False,
    "cross_self_attention": False, "no_cross_attention": False, "no_token_positional_embeddings": False,
    "adaptive_softmax_cutoff": None, "encoder_layers_to_keep": None, "decoder_layers_to_keep": None,
}  # fmt: skip
_ALIKE = ("embed_dim", "ffn_embed_dim", "attention_heads")
# What says nothing about the model that is not said elsewhere, or belongs to what _FIXED refuses.
_WITHOUT_EFFECT = {
    "encoder_embed_path", "decoder_embed_path", "encoder_learned_pos", "decoder_learned_pos", "decoder_output_dim",
    "decoder_input_dim", "encoder_eval", "pooler_dropout", "relu_dropout", "adaptive_softmax_dropout", "adapter_dim",
    "adapter_type", "resnet_model_path", "resnet_type", "image_encoder_name", "video_encoder_name",
    "audio_encoder_name",
    *(f"{stack}_prompt_{part}" for stack in ("encoder", "decoder") for part in ("type", "length", "projection", "dim")),
}  # fmt: skip
_BLOCKS: dict[str, tuple[int, ...]] = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
# Upstream's names of networks without their depth.
_IMAGE_NETWORK, _VIDEO_NETWORK, _AUDIO_NETWORK = "timm_resnet", "all_resnext", "pann_cnn14"
_NAMES = {
    "embed_dim": "encoder_embed_dim", "ffn_dim": "encoder_ffn_embed_dim", "attention_heads": "encoder_attention_heads",
    "encoder_layers": "encoder_layers", "decoder_layers": "decoder_layers", "token_bucket_size": "token_bucket_size",
    "image_bucket_size": "image_bucket_size", "max_source_positions": "max_source_positions",
    "max_target_positions": "max_target_positions", "code_image_size": "code_image_size",
    "audio_hop": "hop_size", "dropout": "dropout", "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout", "encoder_drop_path_rate": "encoder_drop_path_rate",
    "decoder_drop_path_rate": "decoder_drop_path_rate",
}  # fmt: skip

KNOWN_ARGUMENTS = frozenset({*_FIXED, *_NAMES.values(), *_WITHOUT_EFFECT, *(f"decoder_{name}" for name in _ALIKE)})


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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
        networks: whether it has the networks that make feature maps of pixels, frames and waveforms.
        image_blocks, video_blocks: bottlenecks in each stage of ResNet and of the 3-D ResNeXt.
        audio_hop: samples from one frame of a spectrogram to the next.
        dropout: in training, of tokens behind their first norm and of each branch; upstream's scripts take 0.1.
        attention_dropout, activation_dropout: of attention's probabilities, and behind GELU.
        encoder_drop_path_rate, decoder_drop_path_rate: DropPath's of the last layer; upstream's scripts take 0.1.
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
    networks: bool = False
    image_blocks: tuple[int, ...] = _BLOCKS["101"]
    video_blocks: tuple[int, ...] = _BLOCKS["101"]
    audio_hop: int = 480
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_drop_path_rate: float = 0.0
    decoder_drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _FLAGS:
                require(isinstance(value, bool), f"{field.name}: expected True or False, got {value!r}")
            elif field.name in _RATES:
                fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
                require(fits, f"{field.name}: expected a probability in [0, 1), got {value!r}")
            elif field.name.endswith("_blocks"):
                fits = isinstance(value, tuple) and len(value) == _STAGES and all(_is_positive(x) for x in value)
                require(fits, f"{field.name}: expected {_STAGES} positive integers, one for a stage, got {value!r}")
            else:
                require(_is_positive(value), f"{field.name}: expected a positive integer, got {value!r}")
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
        require(
            not self.networks or self.feature_channels % _CHANNELS == 0,
            f"feature_channels: expected a multiple of {_CHANNELS} with networks, got {self.feature_channels}",
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those with feature maps."""
        return ("image", *(name for name in ("video", "audio") if getattr(self, name)))

    @property
    def is_noisy(self) -> bool:
        """Whether a pass in training mode is another than in evaluation mode."""
        return self.networks or any(getattr(self, name) for name in _RATES)

    @property
    def head_dim(self) -> int:
        """Of a head's values, and of the part of its queries and keys that comes of tokens."""
        return self.embed_dim // self.attention_heads

    @property
    def code_window(self) -> int:
        """Codes along a side of an image that is written as codes."""
        return self.code_image_size // 8

    @classmethod
    def from_upstream(
        cls, args: Mapping[str, Any], vocab_size: int, feature_channels: int = 2048, networks: bool = False
    ) -> UnivalConfig:
        """The configuration of upstream's arguments, which its checkpoints hold under "cfg" and "model".

        Raises:
            ValueError: an argument by which upstream builds another model than this one.
        """
        args = {name: value for name, value in args.items() if value is not None}  # argparse's word for not given
        for name, value in _FIXED.items():
            got = args.get(name, False if value in (True, False) else value)
            require(got == value, f"{name}: expected {value}, got {got}; UnIVAL's own scripts train no such model")
        for name in _ALIKE:
            one, other = args.get(f"encoder_{name}"), args.get(f"decoder_{name}")
            require(one == other, f"decoder_{name}: expected the encoder's {one}, got {other}")
        for name in ("decoder_input_dim", "decoder_output_dim"):
            width = args.get("decoder_embed_dim")
            require(
                args.get(name, width) == width, f"{name}: expected decoder_embed_dim, {width}, got {args.get(name)}"
            )
        given = {own: args[name] for own, name in _NAMES.items() if name in args}
        if not given.get("activation_dropout"):  # as upstream reads it
            given["activation_dropout"] = args.get("relu_dropout") or 0.0
        video, audio = (bool(args.get(f"{name}_encoder_name")) for name in ("video", "audio"))
        if networks:
            given |= _networks(args)
        return cls(vocab_size=vocab_size, feature_channels=feature_channels, video=video, audio=audio, **given)

    def to_upstream(self) -> dict[str, Any]:
        """Upstream's arguments of this model, which ``from_upstream`` reads.

        Raises:
            ValueError: networks of a depth that upstream has no name for.
        """
        args = {**_FIXED, **{name: getattr(self, own) for own, name in _NAMES.items()}}
        args |= {f"decoder_{name}": args[f"encoder_{name}"] for name in _ALIKE}
        depths = {blocks: depth for depth, blocks in _BLOCKS.items()}
        named = ["image_blocks", *(["video_blocks"] if self.video else [])]
        for field in named:
            known = not self.networks or getattr(self, field) in depths
            require(known, f"{field}: expected one of {', '.join(map(str, depths))}, got {getattr(self, field)}")
        image, video = (depths.get(blocks, "101") for blocks in (self.image_blocks, self.video_blocks))
        return {
            **args, "arch": "unival_base", "image_encoder_name": _IMAGE_NETWORK, "resnet_type": f"resnet{image}",
            "video_encoder_name": f"{_VIDEO_NETWORK}{video}" if self.video else None,
            "audio_encoder_name": _AUDIO_NETWORK if self.audio else None,
        }  # fmt: skip


def _networks(args: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the networks that upstream's arguments name."""
    found: dict[str, Any] = {"networks": True}
    image, video, audio = (args.get(f"{name}_encoder_name") for name in ("image", "video", "audio"))
    require(image == _IMAGE_NETWORK, f"image_encoder_name: expected {_IMAGE_NETWORK}, got {image}")
    wanted = [("image_blocks", "resnet_type", args.get("resnet_type"), "resnet")]
    wanted += [("video_blocks", "video_encoder_name", video, _VIDEO_NETWORK)] if video else []
    for field, name, value, start in wanted:
        depth = str(value).removeprefix(start)
        expected = ", ".join(f"{start}{depth}" for depth in _BLOCKS)
        require(str(value).startswith(start) and depth in _BLOCKS, f"{name}: expected one of {expected}, got {value}")
        found[field] = _BLOCKS[depth]
    require(not audio or audio == _AUDIO_NETWORK, f"audio_encoder_name: expected {_AUDIO_NETWORK}, got {audio}")
    return found
