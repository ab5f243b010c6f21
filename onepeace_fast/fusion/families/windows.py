"""Attention of Swin and BEiT, as Hugging Face's transformers writes them from 5.23 on.

The projections are the model's own, called as they stand. Between them ``relative_bias_attention`` computes whole
windows, or the parts of a shifted one, with the table's numbers by distance: no scores of all pairs exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from onepeace_fast.backend import requested_backend
from onepeace_fast.checks import require_values
from onepeace_fast.dense_bias import dense_vector, full_segments, is_relative, window_parts
from onepeace_fast.fusion.family import FusedCall, Refusal
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.relative_position import CLS_ENTRIES, window_code_offset
from onepeace_fast.transformers_attention import SWIN_MASK, SWIN_PARTS, Rows, attend, rows_of_parts

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TABLE = "relative_position_bias_table"
WINDOW = "onepeace_fast_window"  # the keyword by which a layer's attention gets its window
ARGUMENTS = ("hidden_states", "attention_mask")
HARMLESS = ("output_hidden_states", "return_dict", "num_items_in_batch", "use_cache")
# Measured with Swin's windows of 49 and BEiT's of 197 and 1,025 tokens.
ON_A_CPU = "on a CPU, the model's own attention is faster; use_backend('fused') fuses it in any case"


class SwinAttention(FusedCall):
    """Attention over windows of tokens, shifted or not."""

    family = "Swin"

    def __init__(self, root: nn.Module) -> None:
        bias: Any = root.relative_position_bias
        self.window = tuple(bias.window_size)
        _check_attention("", root)
        # Every entry of the table at its place, and nothing else, for any numbers in it.
        table = _random_like(bias.get_parameter(TABLE))
        with torch.no_grad():
            dense = functional_call(bias, {TABLE: table}, ())[0]
        tokens = self.window[0] * self.window[1]
        if dense.shape[1:] != (tokens, tokens) or not torch.equal(
            F.pad(table.t(), (0, CLS_ENTRIES)), dense_vector(dense, self.window)
        ) or not is_relative(dense, self.window):  # fmt: skip
            raise Refusal("relative_position_bias: expected the table's row of each distance, got another bias")
        projections = [getattr(root, name) for name in PROJECTIONS]
        called = [module for part in projections for module in part.modules()]
        super().__init__(root, called, called)
        self.structure.watch("relative_position_bias", bias, "window_size")
        self.structure.watch_values("relative_position_bias", bias)

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        bias = module._modules.get("relative_position_bias")
        return bias is not None and TABLE in bias._parameters and "q_proj" in module._modules

    def declines(self, *args: Any, **kwargs: Any) -> str:
        x, mask = _given(*args, **kwargs)
        if reason := _declined(self.root, x, {name: one for name, one in kwargs.items() if name not in ARGUMENTS}):
            return reason
        if x.dim() != 3 or x.shape[1] != self.window[0] * self.window[1]:
            return "hidden_states: they are not windows of tokens"
        if mask is not None and x.device.type == "cpu" and not _parts(mask)[1]:
            return "attention_mask: it is not that of shifted windows"
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, mask = _given(*args, **kwargs)
        if mask is None:
            rows = Rows(full_segments(x.shape[0], self.window, False, x.device))
        else:
            part, fits = _parts(mask)
            require_values(fits, "attention_mask: expected Swin's mask of shifted windows, got another one")
            rows = rows_of_parts(part.repeat(x.shape[0] // mask.shape[0], 1), self.window)
        table: Any = self.root.get_parameter(f"relative_position_bias.{TABLE}")
        return _attended(self.root, x, rows, F.pad(table.t(), (0, CLS_ENTRIES)), self.window)


class BeitLayer(FusedCall):
    """A layer of BEiT with a bias of its own."""

    family = "BEiT"
    calls_own_forward = True

    def __init__(self, root: nn.Module) -> None:
        attention: Any = root.attention
        bias: Any = root.relative_position_bias
        _check_attention("attention.", attention)
        window = tuple(bias.window_size)
        with torch.no_grad():
            dense = functional_call(bias, {TABLE: _random_like(bias.get_parameter(TABLE))}, (window,))[0]
        tokens = window[0] * window[1] + 1
        if dense.shape[1:] != (tokens, tokens) or not is_relative(dense, window, with_cls=True):
            raise Refusal("relative_position_bias: expected numbers by the distance in the window, got others")
        inner = [module for module in root.modules() if module is not root]
        kept = (attention, *bias.modules())
        super().__init__(root, inner, [module for module in inner if all(module is not one for one in kept)])
        self.replace(attention, "forward", "attention")

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        parts = module._modules
        bias = parts.get("relative_position_bias")
        return bias is not None and TABLE in bias._parameters and "attention" in parts and "layernorm_before" in parts

    def declines(self, *args: Any, **kwargs: Any) -> str:
        attention: Any = self.root.attention
        known = (*ARGUMENTS, "interpolate_pos_encoding", "resolution")
        x, mask = _given(*args, **kwargs)
        if reason := _declined(attention, x, {name: one for name, one in kwargs.items() if name not in known}):
            return reason
        window = self._window(*args, **kwargs)
        if mask is not None:
            return "attention_mask: a mask or a bias of all layers is not known to a layer"
        if window is None or window[0] * window[1] + 1 != x.shape[1]:
            return "resolution: it is not that of the tokens"
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacements[0].original(*args, **kwargs, **{WINDOW: self._window(*args, **kwargs)})

    def attention(self, replacement: Replacement, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer's attention: by the window that the layer hands down, or the module's own."""
        window = kwargs.get(WINDOW)
        if window is None:
            return replacement.original(*args, **kwargs)
        x, dense = _given(*args, **kwargs)
        rows = Rows(full_segments(x.shape[0], window, True, x.device))
        assert dense is not None  # the layer's bias
        return _attended(replacement.module, x, rows, dense_vector(dense[0], window, True), window)

    def _window(self, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
        """Patches along each axis."""
        resolution = args[3] if len(args) > 3 else kwargs.get("resolution")
        if resolution is None:
            return None
        patch: Any = self.root.patch_size
        return resolution[0] // patch, resolution[1] // patch


def _random_like(table: Tensor) -> Tensor:
    # With a state of its own, so that fusing changes nothing that the program draws.
    return torch.rand(table.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(table)


def _given(*args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
    given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
    return given.get("hidden_states"), given.get("attention_mask")


def _declined(attention: Any, x: Any, others: dict[str, Any]) -> str:
    """Why neither family's call is fused; ``others`` are the keywords that they do not know."""
    if not isinstance(x, Tensor):
        return "hidden_states: they are not a tensor"
    if requested_backend(None) != "fused" and x.device.type == "cpu":
        return ON_A_CPU
    if others.get("output_attentions") or getattr(attention.config, "output_attentions", False):
        return "output_attentions: attention's probabilities are not kept"
    for name, value in others.items():
        if name not in HARMLESS and value is not None and value is not False:
            return f"{name}: it is not known to fused attention"
    return "dropout in training" if attention.training and attention.attention_dropout else ""


def _attended(module: Any, x: Tensor, rows: Rows, vector: Tensor, window: tuple[int, ...]) -> tuple[Tensor, None]:
    q, k, v = (getattr(module, name)(x).unflatten(-1, (-1, module.head_dim)) for name in PROJECTIONS[:3])
    qkv = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out = attend(qkv, rows, [vector], window_code_offset(window), module.scaling)
    return module.o_proj(out.flatten(2)), None


def _parts(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each token that a mask of windows keeps apart, and whether it is such a mask."""
    hidden = mask != 0
    part, fits = window_parts(hidden, SWIN_PARTS)
    return part, fits & ((mask == SWIN_MASK) | ~hidden).all()


def _check_attention(prefix: str, module: Any) -> None:
    for name in PROJECTIONS:
        if name not in module._modules:
            raise Refusal(f"{prefix}{name}: expected a projection, got none")
    for setting in ("head_dim", "scaling", "attention_dropout"):
        if not isinstance(value := getattr(module, setting, None), int | float):
            raise Refusal(f"{prefix}{setting}: expected a number, got {value!r}")
    if (causal := getattr(module, "is_causal", None)) is not False:
        raise Refusal(f"{prefix}is_causal: expected False, got {causal}")
