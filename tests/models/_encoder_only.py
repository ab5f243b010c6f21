"""Small models without a decoder, randomised, for the tests of what loads and runs them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from models._small import VOCABULARY, randomise, small_config

from onepeace_fast import (
    ClassifyConfig,
    EncoderConfig,
    OnePeaceClassify,
    OnePeaceEncoder,
    OnePeaceRetrieval,
    RetrievalConfig,
)
from onepeace_fast.config import TransformerConfig


def encoder_of(*modalities: str, **fields: Any) -> TransformerConfig:
    """The small encoder with these modalities alone."""
    encoder = small_config().encoder
    absent = {name: None for name in encoder.modalities if name not in modalities}
    return dataclasses.replace(encoder, **{**fields, **absent})


def retrieval(*modalities: str, backend: str = "reference", **fields: Any) -> OnePeaceRetrieval:
    """A small retrieval model of these modalities, in float64."""
    config = RetrievalConfig(encoder=encoder_of(*modalities, **fields), vocab_size=VOCABULARY)
    return ready(OnePeaceRetrieval(config, backend))


def classify(*modalities: str, backend: str = "reference", head: Any = None, **fields: Any) -> OnePeaceClassify:
    """A small classification model of these modalities with attention pooling and a table per layer, in float64."""
    encoder = encoder_of(*modalities, **{"bias_table_per_layer": True, **fields})
    settings = {"classes": 5, "head_width": 56, "attention_pooling": True, **(head or {})}
    return ready(OnePeaceClassify(ClassifyConfig(encoder=encoder, vocab_size=VOCABULARY, **settings), backend))


def vision(backend: str = "reference") -> OnePeaceEncoder:
    """A small encoder of images without final norms, in float64."""
    config = EncoderConfig(encoder=encoder_of("image", final_norm=False), vocab_size=VOCABULARY)
    return ready(OnePeaceEncoder(config, backend))


def ready(model: Any) -> Any:
    """The model in float64, randomised, in evaluation mode."""
    model = model.to(torch.float64)
    randomise(model)
    return model.eval()
