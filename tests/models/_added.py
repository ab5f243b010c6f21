"""What every added modality owes the others: their bits, and one result of both backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from models._small import (
    BACKENDS,
    assert_close,
    assert_same_bits,
    at_tokens,
    audio_batch,
    batch_of,
    gradients_of,
    hide,
    randomise,
    small_config,
    small_model,
    valid_tokens,
    weighted_sum,
)
from torch import Tensor

from onepeace_fast import OnePeacePretrain
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers.adapters import Adapter

CONFIG = small_config().encoder


def everything(model: OnePeacePretrain) -> dict[str, Tensor]:
    """What a model makes of text, images and audio: together, alone and rebuilt."""
    batch = batch_of(text=[7, 2, 5], image=(3, 3), audio=[9, 4, 6])
    audio, padding = audio_batch([9, 4, 6])
    with torch.no_grad():
        return {
            **model.encode(**batch),
            "text alone": model.embed(text=batch["text"]),
            "image alone": model.embed(image=batch["image"]),
            "audio alone": model.embed(audio=audio, audio_padding=padding),
            **{f"{name} rebuilt": value for name, value in model.reconstruct(**batch, masks=hide(batch)).items()},
        }


def check_others_keep_their_bits(make: Callable[[TransformerConfig], Adapter]) -> None:
    """Adding the modality leaves every other output as it was, bit by bit, with both backends."""
    for backend in BACKENDS:
        model = small_model(backend)
        before = everything(model)
        model.add_modality("other", make(model.config.encoder), init_from="text")
        randomise_added(model)
        assert_same_bits(everything(model), before)


def randomise_added(model: OnePeacePretrain, seed: int = 5) -> None:
    """Numbers that hide nothing in all parameters of the modality that was added."""
    kept = {name: value.detach().clone() for name, value in model.named_parameters() if "other" not in name}
    randomise(model, seed)
    with torch.no_grad():
        for name, value in kept.items():
            model.get_parameter(name).copy_(value)


def extended(make: Callable[[TransformerConfig], Adapter], backend: str = "fused") -> OnePeacePretrain:
    """A small model in float64 with the modality."""
    model = small_model(backend)
    model.add_modality("other", make(model.config.encoder))
    randomise(model, seed=3)
    return model


def check_packed_is_padded(
    make: Callable[[TransformerConfig], Adapter], inputs: Mapping[str, Tensor], unread: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Outputs and all gradients of both backends are one, alone and beside text and images; every parameter has one.

    ``unread`` names parameters of the adapter that these inputs do not read. Returns the fused gradients.
    """
    rows = len(inputs["other"])
    for beside in ({}, batch_of(text=[7, 2, 5, 1][:rows], image=(rows, 2))):
        results = []
        for backend in BACKENDS:
            model = extended(make, backend)
            given = {**beside, **inputs}
            outputs = model.encode(**given)
            padding = inputs.get("other_padding", torch.zeros(outputs["other"].shape[:2], dtype=torch.bool))
            valid = valid_tokens(beside) | {"other": ~padding}
            results.append(at_tokens(outputs, valid) | gradients_of(model, weighted_sum(outputs, valid)))
            names = {name for name, _ in model.encoder.adapter("other").named_parameters()} - set(unread)
            gone = [name for name in names if not results[-1][f"encoder_wrapper.other_adapter.{name}"].any()]
            assert not gone, gone
        assert_close(results[1], results[0])
    return results[1]


def check_rows_stand_alone(
    make: Callable[[TransformerConfig], Adapter], inputs: Mapping[str, Tensor], singles: list[Mapping[str, Tensor]]
) -> None:
    """Each row embeds as it does by itself, without the others' padding."""
    model = extended(make)
    together = model.embed(**inputs)
    for row, single in enumerate(singles):
        torch.testing.assert_close(together[row : row + 1], model.embed(**single), rtol=1e-9, atol=1e-9)
