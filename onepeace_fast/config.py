"""Configuration of ONE-PEACE. The defaults are the public 4 B model's; lengths are in tokens, sizes in elements."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from typing_extensions import Self

from onepeace_fast.upstream_config import read_transformer

MODALITIES = ("text", "image", "audio")
_INPUTS = ("samples", "self", "task")  # what a call has beside its modalities
_NAME = re.compile("[a-z][a-z0-9_]*")


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float, and finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _require_positive_integers(config: object, *names: str) -> None:
    for name in names:
        if not _is_positive_integer(value := getattr(config, name)):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _require_bucket_size(config: TextAdapterConfig | AudioAdapterConfig) -> None:
    _require_positive_integers(config, "bucket_size")
    if config.bucket_size < 2:
        raise ValueError(f"bucket_size: expected at least 2, got {config.bucket_size}")


@dataclass(frozen=True, kw_only=True)
class TextAdapterConfig:
    """Token embedding, learned positions and, with ``use_bias``, a 1-D relative position bias.

    ``type_embedding`` adds one learned vector to every token, as models of pairs of images have it.
    """

    bucket_size: int = 256
    use_bias: bool = True
    type_embedding: bool = False

    def __post_init__(self) -> None:
        _require_bucket_size(self)


@dataclass(frozen=True, kw_only=True)
class ImageAdapterConfig:
    """hMLP stem over 16 x 16 patches, learned positions of a square grid and a bias table of another.

    ``type_embedding`` adds one learned vector to every token, and one more to those of the second image of a pair.
    """

    position_grid: int = 16
    bias_grid: int = 16
    use_bias: bool = True
    type_embedding: bool = False

    def __post_init__(self) -> None:
        _require_positive_integers(self, "position_grid", "bias_grid")


@dataclass(frozen=True, kw_only=True)
class AudioAdapterConfig:
    """Convolutional extractor of 16 kHz audio; ``feature_layers`` holds (channels, kernel, stride) of each layer."""

    feature_layers: tuple[tuple[int, int, int], ...] = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)
    position_layers: int = 5
    position_width: int = 95
    position_groups: int = 16
    bucket_size: int = 512
    use_bias: bool = True

    def __post_init__(self) -> None:
        _require_bucket_size(self)
        _require_positive_integers(self, "position_layers", "position_width", "position_groups")
        layers = self.feature_layers
        if not layers or not all(
            isinstance(layer, tuple) and len(layer) == 3 and all(map(_is_positive_integer, layer)) for layer in layers
        ):
            raise ValueError(
                f"feature_layers: expected (channels, kernel, stride) of each layer, positive, got {layers!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One stack of modality-routed layers and its adapters; a modality without an adapter is not in the model.

    ``sub_layer_norm`` normalises before the attention's output projection, ``attention_layer_norm`` after it,
    ``ffn_layer_norm`` before the FFN's second projection. ``layer_scale`` is LayerScale's initial value, None for none.
    ``final_norm`` normalises each modality's tokens behind the last layer; the public vision file was saved without.
    ``added`` names the modalities that ``OnePeacePretrain.add_modality`` added, whose adapters are the user's own.
    """

    embed_dim: int = 1536
    ffn_embed_dim: int = 6144
    layers: int = 40
    attention_heads: int = 24
    drop_path_rate: float = 0.0
    dropout: float = 0.0
    sub_layer_norm: bool = True
    attention_layer_norm: bool = False
    ffn_layer_norm: bool = True
    head_scale: bool = False
    layer_scale: float | None = 1e-6
    final_norm: bool = True
    bias_table_per_layer: bool = False
    checkpoint_activations: bool = False
    text: TextAdapterConfig | None = TextAdapterConfig()
    image: ImageAdapterConfig | None = ImageAdapterConfig()
    audio: AudioAdapterConfig | None = AudioAdapterConfig()
    added: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_positive_integers(self, "embed_dim", "ffn_embed_dim", "layers", "attention_heads")
        if self.layer_scale is not None and not is_number(self.layer_scale):
            raise ValueError(f"layer_scale: expected a number or None, got {self.layer_scale!r}")
        if self.embed_dim % self.attention_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of attention_heads ({self.attention_heads}), got {self.embed_dim}"
            )
        built_in = self.modalities[: len(self.modalities) - len(self.added)]
        if not built_in:
            raise ValueError("text, image, audio: expected at least one adapter, got none")
        names = [*MODALITIES, *_INPUTS, *self.added]
        fits = all(isinstance(name, str) and _NAME.fullmatch(name) and not name.endswith("_padding") for name in names)
        if not fits or len(set(names)) < len(names):
            raise ValueError(
                f"added: expected names of lower-case letters, digits and underscores, each once, none that ends with "
                f"_padding and none of {[*MODALITIES, *_INPUTS]}, got {list(self.added)}"
            )
        if len({getattr(self, name).use_bias for name in built_in}) > 1:
            raise ValueError("use_bias: expected the same value in every adapter of a stack, got both True and False")
        for name in ("drop_path_rate", "dropout"):
            if not (is_number(value := getattr(self, name)) and 0.0 <= value < 1.0):
                raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities of this stack in the order of a sequence."""
        return (*(name for name in MODALITIES if getattr(self, name) is not None), *self.added)

    @property
    def use_bias(self) -> bool:
        """Whether attention has a relative position bias."""
        return getattr(self, self.modalities[0]).use_bias

    @property
    def bias_tables(self) -> int:
        """Bias tables per modality: one for the stack, one per layer, or none."""
        return (self.layers if self.bias_table_per_layer else 1) if self.use_bias else 0


class ModelConfig:
    """What the configuration of every model can do; a subclass is a dataclass that names its ``kind``."""

    kind: ClassVar[str]

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(self._to_dict(), indent=2) + "\n", encoding="utf-8")

    def _to_dict(self) -> dict[str, Any]:
        return {"model": self.kind, **dataclasses.asdict(cast(Any, self))}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            ValueError: no JSON, or as ``from_dict``.
        """
        return cls.from_dict(_read_json(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from nested fields, absent ones taking their defaults.

        Raises:
            ValueError: a field that is unknown or does not fit, or a section that is none.
        """
        if isinstance(values, Mapping) and "model" in values:
            if values["model"] != cls.kind:
                raise ValueError(f"config: expected that of a {cls.kind} model, got that of a {values['model']} model")
            values = {name: value for name, value in values.items() if name != "model"}
        return build(cls, values, "config")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """ONE-PEACE's encoder alone. ``vocab_size`` counts the 4 specials."""

    kind: ClassVar[str] = "encoder"
    encoder: TransformerConfig = TransformerConfig()
    vocab_size: int = 50264

    def __post_init__(self) -> None:
        if not self.encoder.use_bias:
            raise ValueError(
                "encoder: expected use_bias True, got False: upstream masks an encoder's padding by its bias"
            )
        if not _is_positive_integer(self.vocab_size) or self.vocab_size < 4:
            raise ValueError(f"vocab_size: expected at least the 4 specials, got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(EncoderConfig):
    """An encoder with a projection for each modality, whose CLS is embedded for retrieval."""

    kind: ClassVar[str] = "retrieval"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_final_norm(self.encoder)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(EncoderConfig):
    """An encoder and a head of ``classes`` outputs over the tokens of one modality.

    ``attention_pooling`` pools the tokens by attention, CLS left out, else CLS is taken. ``pooler`` puts a linear layer
    and tanh behind it. ``head_width`` is the hidden width of the classifier. ``two_images`` classifies pairs of images.
    ``use_image_features`` pools image tokens where there is text too.
    """

    kind: ClassVar[str] = "classify"
    classes: int
    attention_pooling: bool = False
    pooler: bool = False
    pooler_dropout: float = 0.0
    head_width: int
    two_images: bool = False
    use_image_features: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_final_norm(self.encoder)
        _require_positive_integers(self, "classes", "head_width")
        if not (is_number(self.pooler_dropout) and 0.0 <= self.pooler_dropout < 1.0):
            raise ValueError(f"pooler_dropout: expected a probability in [0, 1), got {self.pooler_dropout!r}")
        needed = [name for name in ("two_images", "use_image_features") if getattr(self, name)]
        if needed and self.encoder.image is None:
            raise ValueError(f"{needed[0]}: expected False without images, got True")


@dataclass(frozen=True, kw_only=True)
class OnePeaceConfig(EncoderConfig):
    """ONE-PEACE for pretraining: an encoder, and the light decoder of the denoising task."""

    kind: ClassVar[str] = "pretrain"
    decoder: TransformerConfig = TransformerConfig(
        embed_dim=768,
        ffn_embed_dim=2048,
        layers=2,
        attention_heads=12,
        layer_scale=None,
        text=TextAdapterConfig(use_bias=False),
        image=ImageAdapterConfig(use_bias=False),
        audio=AudioAdapterConfig(use_bias=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_final_norm(self.encoder)
        _require_final_norm(self.decoder)
        if self.decoder.added:
            raise ValueError(
                f"decoder: expected no added modalities, got {list(self.decoder.added)}: only an encoder can have some"
            )
        if extra := set(self.decoder.modalities) - set(self.encoder.modalities):
            raise ValueError(f"decoder: expected modalities that the encoder has too, got {sorted(extra)}")

    def _to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # a file that names no kind of model is a pretraining model's

    @classmethod
    def from_upstream(cls, encoder: Mapping[str, Any], decoder: Mapping[str, Any], vocab_size: int) -> OnePeaceConfig:
        """Read the ``encoder`` and ``decoder`` sections of an upstream YAML; absent keys take upstream's defaults.

        Raises ``ValueError`` naming every key whose value this library does not implement.
        """
        sections = {"encoder": read_transformer(encoder, "encoder"), "decoder": read_transformer(decoder, "decoder")}
        return cls.from_dict({**sections, "vocab_size": vocab_size})


def read_config(path: str | Path) -> EncoderConfig:
    """The configuration that ``save`` wrote, of whatever kind of model.

    Raises:
        ValueError: no JSON, an unknown kind, or as ``from_dict``.
    """
    values = _read_json(path)
    kind = values.get("model", OnePeaceConfig.kind) if isinstance(values, Mapping) else OnePeaceConfig.kind
    kinds = {one.kind: one for one in (EncoderConfig, RetrievalConfig, ClassifyConfig, OnePeaceConfig)}
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{path}: expected a model of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind].from_dict(values)


def named_kind(path: str | Path) -> Any:
    """The kind of model that a configuration names; None where it names none.

    Raises:
        ValueError: no JSON object.
    """
    values = _read_json(path)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected a configuration that save() wrote, got {type(values).__name__} {values!r}")
    return values.get("model")


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a configuration that save() wrote, got no JSON ({error})") from None


def _require_final_norm(config: TransformerConfig) -> None:
    if not config.final_norm:
        raise ValueError("final_norm: expected True, got False: only an encoder alone may end without norms")


_LISTS = {"feature_layers": "a list of [channels, kernel, stride]", "added": "a list of names"}


def build(cls: type, values: Any, where: str) -> Any:
    """A configuration class from nested fields; ``where`` names it in messages.

    Raises:
        ValueError: a field that is unknown, missing or does not fit, or a section that is none.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a section of fields, got {values!r}")
    items = dataclasses.fields(cls)
    defaults = {item.name: item.default for item in items}
    if unknown := sorted(set(values) - set(defaults)):
        raise ValueError(f"{where}: expected some of {sorted(defaults)}, got unknown fields {unknown}")
    needed = [one.name for one in items if one.default is one.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where}: expected {', '.join(needed)}, got no {', '.join(missing)}")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(defaults[name]) and value is not None:
            value = build(type(defaults[name]), value, name)
        elif isinstance(defaults[name], tuple):
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}: expected {_LISTS.get(name, 'a list')}, got {value!r}")
            value = tuple(tuple(item) if isinstance(item, (list, tuple)) else item for item in value)
        arguments[name] = value
    return cls(**arguments)
