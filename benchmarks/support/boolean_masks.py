"""The reference with tokens routed as public mixture-of-transformers code does: by a boolean mask in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.encoder import EncoderCase
from benchmarks.support.shapes import Shape
from onepeace_fast.models.stack import Stack

ALL = "routed"


class BooleanMasks(nn.Module):
    """Every token of a padded batch through the module of its modality; padding is of its modality too."""

    def __init__(self, modules: Sequence[nn.Module], modality: Tensor) -> None:
        super().__init__()
        self.of_modalities, self.modality = nn.ModuleList(modules), modality

    def forward(self, x: Tensor) -> Tensor:
        """[length, batch, width], with the modality of each token, int64 [length * batch]; the same shape."""
        rows = x.flatten(0, 1)
        out = torch.empty_like(rows)
        for m, module in enumerate(self.of_modalities):
            mask = self.modality == m
            out[mask] = module(rows[mask])
        return out.view_as(x)


def routed_by_masks(case: EncoderCase) -> EncoderCase:
    """Change a case's reference: the whole sequence is one span, whose feed-forward and final norm choose by masks."""
    route_by_masks(case.stack, case.shape, torch.device("cpu"))
    return case


def route_by_masks(stack: Stack, shape: Shape, device: torch.device) -> None:
    """Change the reference of a stack that gets batches of one shape."""
    model, lengths = stack.fusion_model, shape.lengths
    counts = torch.tensor([len(row) * max(row) for row in lengths.values()])
    modality = torch.arange(len(lengths)).repeat_interleave(counts).to(device)
    for layer in model.layers:
        layer.add_module(f"{ALL}_ffn", BooleanMasks([layer.ffn(name) for name in lengths], modality))
    model.add_module(f"{ALL}_layer_norm", BooleanMasks([model.final_norm(name) for name in lengths], modality))

    def one_span(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, _, *others = arguments
        return x, [(ALL, 0, x.shape[0])], *others

    model.register_forward_pre_hook(one_span)
