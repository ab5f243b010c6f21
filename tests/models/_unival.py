"""A small UnIVAL with every parameter randomised, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models._small import randomise
from torch import Tensor

from onepeace_fast.models.unival import Unival, UnivalConfig

CHANNELS, VOCABULARY = 5, 23
SOURCE = torch.tensor([[7, 4, 9, 2, 1], [5, 2, 1, 1, 1], [4, 8, 6, 12, 2], [11, 3, 2, 1, 1]])
TARGET = torch.tensor([[9, 4, 2, 1], [6, 2, 1, 1], [5, 8, 4, 2], [10, 3, 2, 1]])


def unival_config(**changed: Any) -> UnivalConfig:
    """A configuration of a few thousand parameters."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "embed_dim": 16, "ffn_dim": 12, "attention_heads": 2, "encoder_layers": 2,
        "decoder_layers": 2, "token_bucket_size": 3, "image_bucket_size": 4, "max_source_positions": 9,
        "max_target_positions": 8, "code_image_size": 16, "feature_channels": CHANNELS,
    }  # fmt: skip
    return UnivalConfig(**{**sizes, **changed})


def unival(backend: str | None = "fused", dtype: torch.dtype = torch.float64, **changed: Any) -> Unival:
    """A model in evaluation mode."""
    model = Unival(unival_config(**changed), backend).to(dtype)
    randomise(model)  # type: ignore[arg-type]  # it goes by names
    return model.eval()


def refusal(call: Callable[[], object]) -> str:
    """The line by which a call is refused; nothing where it is not, so that a comparison fails."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def maps(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Feature maps: an image of sample 2, a video of sample 0 and the audio of samples 3 and 1."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"image": (1, CHANNELS, 3, 2), "video": (1, CHANNELS, 2, 2, 3), "audio": (2, CHANNELS, 5, 1)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


SAMPLES = {"image": [2], "video": [0], "audio": [3, 1]}
