"""Reads the model sections of upstream's YAML files as fields of this library's configuration."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

# Upstream's keys by what becomes of them: read into a field, required to hold this value, or of no effect here.
_ADAPTER_REQUIRED = {"layernorm_embedding": False, "shrink_alpha": 1.0, "dropout": 0.0}
_REQUIRED: dict[str, dict[str, Any]] = {
    "": {
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "activation_fn": "gelu",
        "layers_to_keep": None,
        "embed_path": None,
    },
    "text_adapter": _ADAPTER_REQUIRED,
    "image_adapter": _ADAPTER_REQUIRED,
    "audio_adapter": {**_ADAPTER_REQUIRED, "add_type_embedding": False, "conv_pos_pre_ln": False, "conv_bias": False},
}
_UPSTREAM_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "embed_dim": 512, "ffn_embed_dim": 2048, "layers": 6, "attention_heads": 8, "drop_path_rate": 0.0,
        "dropout": 0.1, "magneto_scale_attn": False, "scale_attn": True, "scale_fc": True, "scale_heads": True,
        "use_layer_scale": True, "layer_scale_init_value": 1e-2, "copy_rel_pos_table": False,
        "checkpoint_activations": False, "use_text_moe": True, "use_image_moe": True, "use_audio_moe": True,
        "text_adapter": {}, "image_adapter": {}, "audio_adapter": {},
    },
    "text_adapter": {"bucket_size": 256, "use_attn_bias": False, "add_type_embedding": False},
    "image_adapter": {
        "bucket_size": 16, "rel_bucket_size": 16, "vision_encoder_type": "hmlp", "use_attn_bias": False,
        "add_type_embedding": False,
    },
    "audio_adapter": {
        "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "abs_pos_type": "conv", "conv_pos_depth": 5, "conv_pos_width": 95, "conv_pos_groups": 16, "bucket_size": 256,
        "use_attn_bias": False,
    },
}  # fmt: skip
# The keys that say which model it is, and not how it is trained.
ARCHITECTURE = frozenset(key for section in _UPSTREAM_DEFAULTS.values() for key in section) - {
    "drop_path_rate", "dropout", "layer_scale_init_value", "checkpoint_activations"
}  # fmt: skip
_NO_EFFECT: dict[str, set[str]] = {
    "": {"normalize_before", "learned_pos", "max_positions", "offload_activations", "max_source_positions",
         "fsdp_checkpoint_wrap_layer_preserve_frequency", "fsdp_checkpoint_wrap_layer_skip_frequency", "_name"},
    "text_adapter": {"_name"},
    "image_adapter": {"_name"},
    "audio_adapter": {"feature_embed_dim", "freeze_extractor", "_name"},
}  # fmt: skip


def _read_section(
    values: Mapping[str, Any], section: str, where: str, unknown: list[str] | None = None
) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a section of upstream's model YAML, got {values!r}")
    defaults, required = _UPSTREAM_DEFAULTS[section], _REQUIRED[section]
    others = sorted(set(values) - set(defaults) - set(required) - _NO_EFFECT.get(section, set()))
    if others and unknown is None:
        raise ValueError(f"{where}: expected keys of upstream's model section, got unknown ones {others}")
    if unknown is not None:
        unknown += [f"{where}.{key}" for key in others]
    if refused := {k: values[k] for k in required if k in values and values[k] != required[k]}:
        raise ValueError(f"{where}: expected { ({k: required[k] for k in refused}) }, got {refused}")
    return {**defaults, **values}


def _feature_layers(spec: str) -> tuple[tuple[int, int, int], ...]:
    """Read "[(512, 10, 5)] + [(512, 3, 2)] * 4" without evaluating code."""

    def read(node: ast.expr) -> list[tuple[int, int, int]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return read(node.left) + read(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            times = ast.literal_eval(node.right)
            return read(node.left) * (times if times in range(1, 100) else 0)
        return ast.literal_eval(node)

    try:
        layers = tuple(
            (int(channels), int(kernel), int(stride))
            for channels, kernel, stride in read(ast.parse(spec, mode="eval").body)
        )
    except (SyntaxError, TypeError, ValueError):
        layers = ()
    if not layers or min(map(min, layers)) < 1:
        raise ValueError(
            f"feature_encoder_spec: expected lists of positive (channels, kernel, stride), + and *, got {spec!r}"
        )
    return layers


def read_transformer(values: Mapping[str, Any], where: str, unknown: list[str] | None = None) -> dict[str, Any]:
    """The fields of one stack from its section, "encoder" or "decoder"; absent keys take upstream's defaults.

    Raises:
        ValueError: keys whose value this library does not implement, or that are unknown, which ``unknown`` collects
            where it is given.
    """
    top = _read_section(values, "", where, unknown)
    adapters: dict[str, Any] = {}
    for name, read in _ADAPTER_READERS.items():
        section = _read_section(top[f"{name}_adapter"], f"{name}_adapter", f"{where}.{name}_adapter", unknown)
        adapters[name] = read(section, where) if top[f"use_{name}_moe"] else None
    fields = {
        "sub_layer_norm": "magneto_scale_attn", "attention_layer_norm": "scale_attn", "ffn_layer_norm": "scale_fc",
        "head_scale": "scale_heads", "bias_table_per_layer": "copy_rel_pos_table",
    }  # fmt: skip
    same = ("embed_dim", "ffn_embed_dim", "layers", "attention_heads", "drop_path_rate", "dropout")
    return {
        **{name: top[name] for name in (*same, "checkpoint_activations")},
        **{name: top[key] for name, key in fields.items()},
        "layer_scale": _float(top["layer_scale_init_value"]) if top["use_layer_scale"] else None,
        **adapters,
    }


def _float(value: Any) -> Any:
    """PyYAML reads 1e-6, as upstream's files have it, as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _text(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {"bucket_size": "bucket_size", "use_bias": "use_attn_bias", "type_embedding": "add_type_embedding"}
    return {name: section[key] for name, key in fields.items()}


def _image(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    _require_kind(f"{where}.image_adapter", "vision_encoder_type", section, "hmlp" if where == "encoder" else "none")
    fields = {"position_grid": "bucket_size", "bias_grid": "rel_bucket_size", "use_bias": "use_attn_bias"}
    fields |= {"type_embedding": "add_type_embedding"}
    return {name: section[key] for name, key in fields.items()}


def _audio(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    _require_kind(f"{where}.audio_adapter", "abs_pos_type", section, "conv" if where == "encoder" else "fixed")
    fields = {"position_layers": "conv_pos_depth", "position_width": "conv_pos_width"}
    fields |= {"position_groups": "conv_pos_groups", "bucket_size": "bucket_size", "use_bias": "use_attn_bias"}
    layers = {"feature_layers": _feature_layers(section["feature_encoder_spec"])} if where == "encoder" else {}
    return {name: section[key] for name, key in fields.items()} | layers


def _require_kind(where: str, key: str, section: Mapping[str, Any], expected: str) -> None:
    if section[key] != expected:
        raise ValueError(f"{where}.{key}: expected {expected!r}, got {section[key]!r}")


_ADAPTER_READERS = {"text": _text, "image": _image, "audio": _audio}
