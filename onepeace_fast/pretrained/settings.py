"""Which model a checkpoint holds: its saved settings, and what the names and shapes of its weights say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onepeace_fast.config import (
    MODALITIES,
    ClassifyConfig,
    EncoderConfig,
    ImageAdapterConfig,
    OnePeaceConfig,
    RetrievalConfig,
    TransformerConfig,
    build,
)
from onepeace_fast.layers.adapters import PATCH
from onepeace_fast.models import OnePeaceClassify, OnePeaceEncoder, OnePeacePretrain, OnePeaceRetrieval
from onepeace_fast.pretrained.resample import grid_of_positions, grid_of_table
from onepeace_fast.upstream_config import read_transformer

ENCODER = "encoder_wrapper"
DECODER = "decoder_wrapper"
HEAD = "classify_head"
MODELS: dict[str, type[OnePeaceEncoder]] = {
    "pretrain": OnePeacePretrain,
    "retrieval": OnePeaceRetrieval,
    "classify": OnePeaceClassify,
    "encoder": OnePeaceEncoder,
}
_UPSTREAM = "one_peace_"
_MODEL_KEYS = {
    "_name", "encoder", "decoder", "copy_rel_pos_table", "reset_logit_scale", "logit_scale_init", "stage2_pretrain",
    "head_scale_ratio", "use_pooler", "pooler_dropout", "attn_pooling", "use_image_features", "freeze_finetune_updates",
}  # fmt: skip


@dataclass
class Found:
    """A file's weights under upstream's names, the configuration that they fit, and whether tables are to be copied."""

    weights: Mapping[str, Tensor]
    config: EncoderConfig
    copies_tables: bool = False


def kind_of(name: str) -> str:
    """A kind of model by this library's name for it or upstream's."""
    kind = name.removeprefix(_UPSTREAM)
    if kind not in MODELS:
        raise ValueError(f"model_type: expected one of {', '.join(MODELS)}, got {name!r}")
    return kind


def from_settings(settings: Any, weights: Mapping[str, Tensor], unknown: list[str], head: Mapping[str, Any]) -> Found:
    """What upstream's file holds; ``unknown`` collects settings that are not known.

    ``head`` are fields of a classification head that the file lacks.

    Raises:
        ValueError: no settings of a model, a value that this library does not implement, or no weights of an encoder.
    """
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("encoder"), Mapping):
        raise ValueError("cfg: expected upstream's settings with a section model.encoder, got none")
    unknown += [f"model.{key}" for key in sorted(set(model) - _MODEL_KEYS)]
    shared: dict[str, Any] = {"encoder": _stack(model["encoder"], weights, ENCODER, "encoder", unknown)}
    if (tokens := weights.get(f"{ENCODER}.text_adapter.embed_tokens.weight")) is not None:
        shared["vocab_size"] = _rows(tokens)
    kind = str(model.get("_name", "")).removeprefix(_UPSTREAM)
    copies = bool(model.get("copy_rel_pos_table")) or kind == ClassifyConfig.kind
    if kind == ClassifyConfig.kind:
        config: EncoderConfig = ClassifyConfig(**shared, **_head(model, weights, shared["encoder"], head))
    elif kind == RetrievalConfig.kind:
        config = RetrievalConfig(**shared)
    elif kind == OnePeaceConfig.kind:
        section = model.get("decoder") or {}
        config = OnePeaceConfig(**shared, decoder=_stack(section, weights, DECODER, "decoder", unknown))
    else:
        raise ValueError(f"cfg.model._name: expected {_UPSTREAM}pretrain, _retrieval or _classify, got {kind!r}")
    return Found(weights, config, copies)


def _stack(
    section: Mapping[str, Any], weights: Mapping[str, Tensor], wrapper: str, where: str, unknown: list[str]
) -> TransformerConfig:
    """A stack's configuration: modalities and sizes of images are the weights', since loading may have changed them."""
    there = {name: f"{wrapper}.{name}_adapter.cls_embedding" in weights for name in MODALITIES}
    if not any(there.values()):
        raise ValueError(f"weights: expected those of {wrapper}, got none")
    fields = read_transformer({**section, **{f"use_{name}_moe": there[name] for name in there}}, where, unknown)
    if there["image"]:
        fields["image"].update(_grids(weights, f"{wrapper}.image_adapter"))
    first = next(name for name in there if there[name])
    tables = [name for name in weights if name.startswith(f"{wrapper}.{first}_adapter.rel_pos_table_list.")]
    fields["bias_table_per_layer"] = len(tables) > 1
    return build(TransformerConfig, fields, where)


def _rows(value: Tensor) -> int:
    return value.shape[0] if value.dim() else 0


def _grids(weights: Mapping[str, Tensor], adapter: str) -> dict[str, Any]:
    found = {}
    if (positions := weights.get(f"{adapter}.pos_embed")) is not None:
        found["position_grid"] = grid_of_positions(_rows(positions))
    if (table := weights.get(f"{adapter}.rel_pos_table_list.0.weight")) is not None:
        found["bias_grid"] = grid_of_table(_rows(table))
    return found


def _head(
    model: Mapping[str, Any], weights: Mapping[str, Tensor], encoder: TransformerConfig, given: Mapping[str, Any]
) -> dict[str, Any]:
    """A head's fields: what the weights show, and of the settings the rest; without weights those that were given."""
    first = weights.get(f"{HEAD}.classifier.0.weight")
    last = weights.get(f"{HEAD}.classifier.3.weight")
    if first is None or last is None or first.dim() != 2 or not last.dim():
        _check_head(given)
        return dict(given)
    if given:
        raise ValueError(f"head: expected none for a file with a head, got {dict(given)}")
    return {
        "classes": len(last),
        "head_width": len(first),
        "two_images": first.shape[1] == 2 * encoder.embed_dim,
        "attention_pooling": f"{HEAD}.attn_pooling_func.q" in weights,
        "pooler": f"{HEAD}.pooler.1.weight" in weights,
        "pooler_dropout": model.get("pooler_dropout", 0.0),
        "use_image_features": bool(model.get("use_image_features")),
    }


def from_vision(weights: Mapping[str, Tensor]) -> Found:
    """What the vision pickle holds, which has no settings: an encoder of images, by its names and shapes."""
    layer, adapter = f"{ENCODER}.fusion_model.layers", f"{ENCODER}.image_adapter"
    numbers = {name.removeprefix(f"{layer}.").partition(".")[0] for name in weights if name.startswith(f"{layer}.")}
    wanted = [f"{adapter}.cls_embedding", f"{adapter}.pos_embed", f"{adapter}.rel_pos_table_list.0.weight"]
    wanted.append(f"{layer}.0.image_ffn.0.wi_0.weight")
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"weights: expected those of upstream's vision encoder, got none under {missing[0]}")
    tables = sum(name.startswith(f"{adapter}.rel_pos_table_list.") for name in weights)
    encoder = TransformerConfig(
        embed_dim=weights[f"{adapter}.cls_embedding"].shape[-1],
        ffn_embed_dim=len(weights[f"{layer}.0.image_ffn.0.wi_0.weight"]),
        layers=len(numbers),
        attention_heads=weights[f"{adapter}.rel_pos_table_list.0.weight"].shape[1],
        sub_layer_norm=f"{layer}.0.self_attn.ln.weight" in weights,
        attention_layer_norm=f"{layer}.0.attn_ln.weight" in weights,
        ffn_layer_norm=f"{layer}.0.image_ffn.2.weight" in weights,
        head_scale=f"{layer}.0.self_attn.c_attn" in weights,
        layer_scale=TransformerConfig.layer_scale if f"{layer}.0.gamma_1" in weights else None,
        final_norm=False,
        bias_table_per_layer=tables > 1,
        text=None,
        image=ImageAdapterConfig(**_grids(weights, adapter)),
        audio=None,
    )
    return Found(weights, EncoderConfig(encoder=encoder))


def target(found: Found, kind: str | None, image_size: int | None, head: Mapping[str, Any]) -> EncoderConfig:
    """The configuration of the model to build.

    Raises:
        ValueError: an image size for a model without images or no multiple of a patch, or a head for a model without.
    """
    config, encoder = found.config, found.config.encoder
    if kind is not None and kind != config.kind:
        config = _as_kind(config, MODELS[kind].config_class, head)
    if head and not isinstance(config, ClassifyConfig):
        raise ValueError(f"head: expected none for a {config.kind} model, got {dict(head)}; give model_type='classify'")
    if found.copies_tables or isinstance(config, ClassifyConfig):
        encoder = dataclasses.replace(encoder, bias_table_per_layer=True)
    if image_size is not None:
        if encoder.image is None:
            raise ValueError(f"image_size: expected None for a model without images, got {image_size}")
        if not isinstance(image_size, int) or image_size <= 0 or image_size % PATCH:
            raise ValueError(f"image_size: expected a positive multiple of {PATCH}, got {image_size!r}")
        grid = max(image_size // PATCH, encoder.image.bias_grid)  # a larger table serves smaller images too
        encoder = dataclasses.replace(encoder, image=dataclasses.replace(encoder.image, bias_grid=grid))
    return dataclasses.replace(config, encoder=encoder)


def _as_kind(config: EncoderConfig, kind: type[EncoderConfig], head: Mapping[str, Any]) -> EncoderConfig:
    if kind is OnePeaceConfig:
        raise ValueError(f"model_type: expected a model without a decoder, got 'pretrain' for a {config.kind} model")
    fields: dict[str, Any] = {"encoder": config.encoder, "vocab_size": config.vocab_size}
    if kind is not ClassifyConfig:
        return kind(**fields)
    if not head:
        raise ValueError(
            f"head: expected fields of ClassifyConfig, such as {{'classes': 10, 'head_width': 512}}, got none for "
            f"a {config.kind} model, which has no head"
        )
    _check_head(head)
    return ClassifyConfig(**fields, **head)


def _check_head(head: Mapping[str, Any]) -> None:
    names = {item.name for item in dataclasses.fields(ClassifyConfig)} - {"encoder", "vocab_size"}
    if set(head) - names or not {"classes", "head_width"} <= set(head):
        raise ValueError(f"head: expected classes, head_width and any of {sorted(names)}, got {sorted(head)}")
