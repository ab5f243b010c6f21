"""Files as upstream's trainer and its script for vision write them, made of small models with random numbers."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from onepeace_fast.config import ClassifyConfig, OnePeaceConfig, TransformerConfig


def settings_of(config: Any, copies: bool = False) -> dict[str, Any]:
    """The saved ``cfg`` of a model: model and task sections with keys that mean nothing here among them."""
    model: dict[str, Any] = {"_name": f"one_peace_{config.kind}", "encoder": _section(config.encoder, True)}
    model |= {"copy_rel_pos_table": copies, "decoder": _section(config.encoder, False)}
    if isinstance(config, OnePeaceConfig):
        model |= {"decoder": _section(config.decoder, False), "reset_logit_scale": False, "stage2_pretrain": False}
    task: dict[str, Any] = {"_name": "base_task", "patch_image_size": 64, "head_type": "vl"}
    if isinstance(config, ClassifyConfig):
        model |= {
            "head_scale_ratio": 2, "use_pooler": config.pooler, "pooler_dropout": config.pooler_dropout,
            "attn_pooling": config.attention_pooling, "use_image_features": config.use_image_features,
            "freeze_finetune_updates": 0,
        }  # fmt: skip
        task |= {"num_classes": config.classes, "use_two_images": config.two_images}
    return {"_name": None, "common": {"seed": 1, "bf16": True}, "model": model, "task": task, "bpe": None}


def _section(stack: TransformerConfig, encoder: bool) -> dict[str, Any]:
    section: dict[str, Any] = {
        "_name": None, "embed_path": None, "layers_to_keep": None, "layerdrop": 0, "normalize_before": True,
        "embed_dim": stack.embed_dim, "ffn_embed_dim": stack.ffn_embed_dim, "layers": stack.layers,
        "attention_heads": stack.attention_heads, "drop_path_rate": 0.1, "dropout": 0.0, "activation_fn": "gelu",
        "magneto_scale_attn": stack.sub_layer_norm, "scale_attn": stack.attention_layer_norm,
        "scale_fc": stack.ffn_layer_norm, "scale_heads": stack.head_scale,
        "use_layer_scale": stack.layer_scale is not None, "layer_scale_init_value": stack.layer_scale or 1e-2,
        "max_positions": 1024, "checkpoint_activations": False,
        "use_text_moe": True, "use_image_moe": True, "use_audio_moe": True,
    }  # fmt: skip
    shared = {"layernorm_embedding": False, "shrink_alpha": 1.0, "dropout": 0.0, "_name": None}
    if stack.text:
        section["text_adapter"] = {
            **shared, "bucket_size": stack.text.bucket_size, "use_attn_bias": stack.use_bias,
            "add_type_embedding": stack.text.type_embedding,
        }  # fmt: skip
    if stack.image:
        section["image_adapter"] = {
            **shared, "bucket_size": stack.image.position_grid, "rel_bucket_size": 16, "use_attn_bias": stack.use_bias,
            "vision_encoder_type": "hmlp" if encoder else "none", "add_type_embedding": stack.image.type_embedding,
        }  # fmt: skip
    if stack.audio:
        audio = stack.audio
        section["audio_adapter"] = {
            **shared, "bucket_size": audio.bucket_size, "use_attn_bias": stack.use_bias, "add_type_embedding": False,
            "feature_encoder_spec": str([*audio.feature_layers]) if encoder else None, "conv_pos_pre_ln": False,
            "abs_pos_type": "conv" if encoder else "fixed", "conv_pos_depth": audio.position_layers,
            "conv_pos_width": audio.position_width, "conv_pos_groups": audio.position_groups, "conv_bias": False,
        }  # fmt: skip
    return section


def state_of(model: Any, dtype: torch.dtype = torch.float32) -> OrderedDict[str, Tensor]:
    """A model's parameters, and the buffers that upstream's have too."""
    state = OrderedDict((name, value.to(dtype)) for name, value in model.to_upstream_state_dict().items())
    for wrapper in ("encoder_wrapper", "decoder_wrapper"):
        if not hasattr(model, wrapper):
            continue
        stack = getattr(model, wrapper)
        state[f"{wrapper}.fusion_model.version"] = torch.Tensor([3])
        for name, adapter in stack.adapters.items():
            place = f"{wrapper}.{name}_adapter"
            if name == "image":
                state[f"{place}.position_idx"] = torch.arange(adapter.position_grid**2 + 1)
            if adapter.has_bias:
                width = adapter.bias_grid**2 + 1 if name == "image" else 1024
                state[f"{place}.rp_bucket"] = adapter.dense_table_index(width)
    state._metadata = OrderedDict()  # type: ignore[attr-defined]  # as a module's state_dict has it
    return state


def checkpoint_of(
    model: Any, copies: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, Any]:
    """What upstream's trainer saves of a model; ``changes`` replace entries."""
    history = {"criterion_name": "C", "optimizer_name": "Adam", "num_updates": 7, "lr_scheduler_state": {"best": None}}
    return {
        "args": None,
        "cfg": settings_of(model.config, copies),
        "model": state_of(model, dtype),
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {"metrics": OrderedDict(a=[(0, "loss", numpy.float64(2.5))]), "val_loss": numpy.float32(1.5)},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.98)}]},
        **changes,
    }


def write(path: Path, values: Any, zipped: bool = True) -> Path:
    """Save as torch does today, or as it did before the zip format."""
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    return path


def write_vision(path: Path, model: Any, protocol: int | None = None) -> Path:
    """Write the images' part of a model as upstream's script for vision does: names of its own, a plain pickle."""
    kept = {}
    for name, value in state_of(model).items():
        dropped = ("text", "audio", "decoder", "mask", "logit_scale", "version", "image_proj", "image_layer_norm")
        if any(word in name for word in dropped):
            continue
        name = name.replace("encoder_wrapper", "encoder").replace("fusion_model.", "")
        kept[name.replace("encoder.", "") if "image_adapter" in name else name] = value
    with path.open("wb") as file:
        pickle.dump({"model": kept, "__author__": "someone", "matching_heuristics": True}, file, protocol)
    return path
