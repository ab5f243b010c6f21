"""More modalities for a model that exists, and the freezing that trains one of them alone (stage 2)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from onepeace_fast.checks import describe, require
from onepeace_fast.config import OnePeaceConfig, TransformerConfig
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.layers.parameters import init_linear
from onepeace_fast.layers.plain import inside
from onepeace_fast.layers.transformer import Transformer, TransformerLayer, new_ffn
from onepeace_fast.models.stack import Stack


def add_modality(
    model: nn.Module, stack: Stack, config: OnePeaceConfig, name: str, adapter: Adapter, init_from: str | None
) -> OnePeaceConfig:
    """See ``OnePeacePretrain.add_modality``: ``stack`` is its encoder, ``config`` its configuration.

    Returns the configuration with the modality; raises ``ValueError``, and then has changed nothing.
    """
    encoder = config.encoder
    known = encoder.modalities
    if name in known:
        raise ValueError(f"name: expected one that the model does not have yet, got {name!r}: it has {list(known)}")
    # The configuration checks the name; nothing of the model is touched before all checks have passed.
    config = dataclasses.replace(config, encoder=dataclasses.replace(encoder, added=(*encoder.added, name)))
    if init_from is not None and init_from not in known:
        raise ValueError(f"init_from: expected None or one of {list(known)}, got {init_from!r}")
    check_adapter(encoder, name, adapter)
    taken = [own for own in (f"{name}_proj", f"{name}_mask_head") if hasattr(model, own)]
    require(not taken, f"name: expected another, got {name!r}: the model has a {', '.join(taken)} already")

    transformer = inside(stack.fusion_model, Transformer)
    like = next(transformer.parameters())

    def placed(module: nn.Module) -> nn.Module:
        module = module.to(device=like.device, dtype=like.dtype)
        return module.train(model.training).requires_grad_()

    def new(kind: str, owner: nn.Module, fresh: Callable[[], nn.Module]) -> nn.Module:
        if init_from is not None:
            return placed(copy.deepcopy(owner.get_submodule(f"{init_from}_{kind}")))
        with like.device:
            module = fresh()
        for inner in module.modules():
            if isinstance(inner, nn.Linear):
                init_linear(inner)
        return placed(module)

    stack.add_module(f"{name}_adapter", placed(adapter))
    for layer in (inside(layer, TransformerLayer) for layer in transformer.layers):
        layer.add_module(f"{name}_ffn", new("ffn", layer, lambda: new_ffn(encoder)))
    norm = new("layer_norm", transformer, lambda: nn.LayerNorm(encoder.embed_dim))
    transformer.add_module(f"{name}_layer_norm", norm)
    model.add_module(f"{name}_proj", new("proj", model, lambda: nn.Linear(encoder.embed_dim, encoder.embed_dim)))
    stack.config = transformer.config = config.encoder
    return config


def train_only(model: nn.Module, wrapper: nn.Module, encoder: Stack, name: str) -> None:
    """Freeze all of a model's encoder, in its wrapper, and of the projections, but what is one modality's own.

    Raises:
        ValueError: a modality that the encoder does not have.
    """
    known = encoder.config.modalities
    require(name in known, f"name: expected one of {list(known)}, got {name!r}")
    transformer = inside(encoder.fusion_model, Transformer)
    model.requires_grad_()
    wrapper.requires_grad_(False)
    own = [inside(layer, TransformerLayer).ffn(name) for layer in transformer.layers]
    for module in (encoder.embedder(name), transformer.final_norm(name), *own):
        module.requires_grad_()
    for other in known:
        model.get_submodule(f"{other}_proj").requires_grad_(other == name)


def parameters_of(model: nn.Module, modalities: Collection[str]) -> list[nn.Parameter]:
    """Every parameter that passes of these modalities alone read, in whatever it is wrapped."""
    places = ("{}_adapter", "{}_ffn", "{}_layer_norm", "{}_proj", "decoder_{}_embed", "{}_mask_token", "{}_mask_head")
    own = {place.format(name) for name in modalities for place in places}
    return [parameter for name, parameter in model.named_parameters() if not own.isdisjoint(name.split("."))]


def check_adapters(encoder: TransformerConfig, adapters: Mapping[str, Adapter]) -> None:
    """Raise ``ValueError`` unless there is a fitting adapter for exactly the added modalities."""
    require(
        set(adapters) == set(encoder.added),
        f"adapters: expected one for each added modality of the configuration, {list(encoder.added)}, "
        f"got {sorted(adapters)}",
    )
    for name, adapter in adapters.items():
        check_adapter(encoder, name, adapter)


def check_adapter(encoder: TransformerConfig, name: str, adapter: Adapter) -> None:
    """Raise ``ValueError`` unless an adapter has the width, heads and bias tables of an encoder."""
    require(isinstance(adapter, Adapter), f"adapter {name}: expected a subclass of Adapter, got {describe(adapter)}")
    width = adapter.cls_embedding.shape[-1]
    require(width == encoder.embed_dim, f"adapter {name}: expected embed_dim {encoder.embed_dim}, got {width}")
    tables: list[Any] = list(adapter.rel_pos_table_list) if adapter.has_bias else []
    heads = {table.embedding_dim for table in tables} or {encoder.attention_heads}
    require(
        len(tables) == encoder.bias_tables and heads == {encoder.attention_heads},
        f"adapter {name}: expected {encoder.bias_tables} bias tables of {encoder.attention_heads} heads, got "
        f"{len(tables)} of {sorted(heads)}",
    )
