"""How many parameters a model has, by building a shallow one without memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from onepeace_fast.estimate.scale import Sizes
from onepeace_fast.layers.transformer import TransformerLayer
from onepeace_fast.models.base import OnePeaceEncoder
from onepeace_fast.models.classify import OnePeaceClassify
from onepeace_fast.models.pretrain import OnePeacePretrain
from onepeace_fast.models.retrieval import OnePeaceRetrieval

CLASSES = {one.config_class: one for one in (OnePeaceEncoder, OnePeaceRetrieval, OnePeaceClassify, OnePeacePretrain)}


def sizes_of(config: Any) -> Sizes:
    """Of all of it, of its largest layer, and of what FSDP2 leaves to the root.

    From models of one and of two layers: each further one adds as many.
    """
    one, two = (_built(config, layers) for layers in (1, 2))
    more = config.encoder.layers - 1
    whole, root = (a + more * (b - a) for a, b in ((one.parameters, two.parameters), (one.root, two.root)))
    return Sizes(whole, one.layer, root)


def _built(config: Any, layers: int) -> Sizes:
    shallow = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, layers=layers))
    with torch.device("meta"):
        model = CLASSES[type(config)](shallow)
    sizes = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if isinstance(module, TransformerLayer)
    ]
    whole = sum(parameter.numel() for parameter in model.parameters())
    return Sizes(whole, max(sizes), whole - sum(sizes))
