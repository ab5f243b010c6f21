"""``relative_bias_attention`` as an attention implementation of Hugging Face's transformers.

The models hand over a bias of all pairs, [1, heads, length, length]. Its vector is read from one pair for each
distance, so that autograd carries the vector's gradient to the model's table. Every bias is checked to be of that form:
on a CPU by a ValueError, elsewhere by an assertion on the device, so that the host waits for nothing but the lengths of
a padded batch, once.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from onepeace_fast.attention_structures import Segments
from onepeace_fast.checks import describe, require, require_values
from onepeace_fast.dense_bias import dense_vector, full_segments, is_relative, window_parts
from onepeace_fast.installation import install_command
from onepeace_fast.ops.relative_bias_attention import relative_bias_attention
from onepeace_fast.relative_position import window_code_offset, window_codes
from onepeace_fast.route_plan import RoutePlan

NAME = "onepeace_fast"
OLDEST, TOO_NEW = (5, 23), (6, 0)  # of transformers, the bounds of the extra
SERIES = ("t5", "mt5", "umt5")
SERVED = (*SERIES, "swin", "beit")
ELSEWHERE = "use attn_implementation='sdpa'"
SWIN_MASK = -100.0  # what Swin adds to a pair that its shift brought together
SWIN_PARTS = 4  # of a window, at most two along each axis

_PLANS = WeakIdKeyDictionary()  # of a padding mask, which all layers of a forward pass share
_VECTORS = WeakIdKeyDictionary()  # of a bias, which all layers of T5 share


class Rows(NamedTuple):
    """Which tokens of a batch are computed, and what attention knows of them."""

    segments: Segments
    source: Tensor | None = None  # int64 [rows], the place of each in the flattened batch; None: all in order


def register_attention() -> None:
    """Let models of transformers take ``attn_implementation="onepeace_fast"``.

    It serves the encoders of T5, mT5 and UMT5, with padding masks, and Swin and BEiT. Everything else is refused in one
    line when the model is called: decoders, cross attention, other models, dropout of attention's probabilities, and
    ``output_attentions``. Outputs at padding are zeros. It may be called more than once. Of an encoder and a decoder,
    give it to the encoder alone::

        model.encoder.set_attn_implementation("onepeace_fast")

    Raises:
        ImportError: transformers is missing, or of a version whose models do not hand over their bias; one line that
            says how to install it.
    """
    try:
        transformers = importlib.import_module("transformers")
        require_version(transformers.__version__)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(
            f"transformers: cannot be used ({reason}); type: {install_command('transformers')}", name="transformers"
        ) from None
    # A compiled model calls it as it is: the plans and vectors that it keeps are no part of a graph.
    not_in_a_graph = torch.compiler.disable(attention_of_module, reason=f"{NAME} breaks the graph; omit fullgraph=True")
    transformers.AttentionInterface.register(NAME, not_in_a_graph)
    transformers.AttentionMaskInterface.register(NAME, padding_mask)


def require_version(version: str) -> None:
    """Raise ImportError unless models of this version of transformers hand their bias to an attention function."""
    major, minor = map(int, version.split(".")[:2])
    if not OLDEST <= (major, minor) < TOO_NEW:
        bounds = [".".join(map(str, bound)) for bound in (OLDEST, TOO_NEW)]
        raise ImportError(f"expected at least {bounds[0]} and below {bounds[1]}, got {version}")


def padding_mask(
    *, q_length: int, kv_length: int, mask_function: Any, attention_mask: Tensor | None, config: Any, **_: Any
) -> Tensor | None:
    """The mask that a model's layers get: bool [batch, length], True at tokens, or None."""
    from transformers.masking_utils import bidirectional_mask_function

    kind = _require_served(config)
    require(
        mask_function is bidirectional_mask_function and q_length == kv_length,
        f"{NAME}: expected self-attention of an encoder, got a decoder's or another mask; {ELSEWHERE}",
    )
    require(
        attention_mask is None or kind in SERIES,
        lambda: f"attention_mask: expected None for {kind}, got {describe(attention_mask)}",
    )
    # Anew in each forward pass: what is kept for it must not outlive a change of the caller's mask.
    return None if attention_mask is None else attention_mask.clone()


def attention_of_module(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, position_bias: Tensor | None = None, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of [batch, heads, length, head_dim]: [batch, length, heads, head_dim], and no probabilities."""
    kind = _require_served(module.config)
    is_decoder = getattr(module, "is_decoder", False) or getattr(module, "is_causal", False)
    require(
        not is_decoder and query.shape == key.shape,
        f"{NAME}: expected self-attention of an encoder, got a decoder's or cross attention; {ELSEWHERE}",
    )
    require(
        not dropout,
        f"dropout: expected 0, got {dropout}; attention has none of its probabilities: set the configuration's to 0",
    )
    require(
        not keywords.get("output_attentions"),
        "output_attentions: expected False, got True; attention's probabilities are not kept",
    )
    window: tuple[int, ...]
    if kind in SERIES:
        dense, window, rows = position_bias, (query.shape[2],), _rows_of_series(query, attention_mask)
    elif kind == "swin":
        dense, window, rows = _swin(module, query, attention_mask)
    else:
        dense, window = attention_mask, (query.shape[2] - 1,)
        if dense is not None:
            window = _beit_window(module.config, query.shape[2])
        rows = Rows(full_segments(query.shape[0], window, True, query.device))
    with_cls = kind == "beit"
    bias = [] if dense is None else [_vector(dense, query, window, with_cls)]
    return attend((query, key, value), rows, bias, window_code_offset(window), scaling), None


def _require_served(config: Any) -> str:
    kind = config.model_type
    require(kind in SERVED, lambda: f"{NAME}: expected a model of {', '.join(SERVED)}, got {kind}; {ELSEWHERE}")
    return kind


def _rows_of_series(query: Tensor, mask: Tensor | None) -> Rows:
    batch, _, length, _ = query.shape
    if mask is None:
        return Rows(full_segments(batch, (length,), False, query.device))
    require(
        mask.dtype == torch.bool and mask.shape == (batch, length),
        lambda: f"attention_mask: expected one of tokens, [{batch}, {length}], got {describe(mask)}",
    )
    if (found := _PLANS.get(mask)) is None:
        plan = RoutePlan.from_masks({"tokens": mask})
        is_whole = plan.capacity == plan.padded_rows
        _PLANS[mask] = found = Rows(plan.segments, None if is_whole else plan.source)
    return found


def _vector(dense: Tensor, query: Tensor, window: tuple[int, ...], with_cls: bool) -> Tensor:
    """The bias's vector; made once where layers share a bias."""
    _, heads, length, _ = query.shape
    require(
        dense.shape == (1, heads, length, length),
        lambda: f"bias: expected one of all pairs for all samples, {[1, heads, length, length]}, got {describe(dense)}",
    )
    found = _VECTORS.get(dense)
    # A recomputed layer may come again with the same bias, once without and once with gradients.
    if found is None or found.requires_grad != (dense.requires_grad and torch.is_grad_enabled()):
        require_values(
            is_relative(dense.detach()[0], window, with_cls),
            f"bias: expected numbers that depend on the distance in {list(window)} tokens alone, got others, such as "
            f"those with a mask; {ELSEWHERE}",
        )
        found = dense_vector(dense[0], window, with_cls)
        if not (dense.requires_grad and dense.is_leaf):  # of a leaf it would keep alive what it is kept for
            _VECTORS[dense] = found
    return found


def _swin(module: nn.Module, query: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...], Rows]:
    """Swin's bias without the mask of its shift, the window, and a segment for each part of each window.

    Its module adds the mask to the bias, so the bias alone is asked of the module once more.
    """
    own: Any = module.relative_position_bias
    windows, _, length, _ = query.shape
    window = tuple(own.window_size)
    require(
        mask is not None and mask.shape[0] in (1, windows) and math.prod(window) == length,
        lambda: f"attention_mask: expected the bias of windows {list(window)}, got {describe(mask)}",
    )
    assert mask is not None
    if mask.shape[0] < windows:
        return mask, window, Rows(full_segments(windows, window, False, query.device))
    dense = own()
    with torch.no_grad():
        hidden = mask[:, 0] != dense[:, 0]
        part, fits = window_parts(hidden, SWIN_PARTS)
        added = torch.zeros_like(hidden, dtype=mask.dtype).masked_fill_(hidden, SWIN_MASK)
        fits = fits & (mask == dense + added[:, None]).all()
    require_values(
        fits, f"attention_mask: expected the bias and Swin's mask of shifted windows, got another one; {ELSEWHERE}"
    )
    return dense, window, rows_of_parts(part, window)


def rows_of_parts(part: Tensor, window: tuple[int, ...]) -> Rows:
    """Rows in which each part of each window is a segment; ``part`` is that of each token, int64 [windows, tokens]."""
    windows, length = part.shape
    segment = part + SWIN_PARTS * torch.arange(windows, device=part.device)[:, None]
    plan = RoutePlan.from_modality_ids(
        torch.zeros_like(segment).flatten(), ("tokens",), sample_ids=segment.flatten(),
        sample_count=SWIN_PARTS * windows, positions=window_codes(window, window, part.device).repeat(windows),
        max_position=window_code_offset(window),
    )  # fmt: skip
    return Rows(plan.segments._replace(max_length=length), plan.source)


def _beit_window(config: Any, tokens: int) -> tuple[int, ...]:
    """Patches along each axis: those of the configuration's images, or a square of another size."""
    images, patches = (
        size if isinstance(size, list | tuple) else (size, size) for size in (config.image_size, config.patch_size)
    )
    window = tuple(image // patch for image, patch in zip(images, patches, strict=True))
    if math.prod(window) + 1 != tokens:
        side = math.isqrt(tokens - 1)
        require(
            side * side + 1 == tokens,
            f"images: expected {list(window)} patches, as configured, or a square of patches, got {tokens - 1} patches",
        )
        window = (side, side)
    return window


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], rows: Rows, bias: list[Tensor], code_offset: int, scale: float | None
) -> Tensor:
    """[batch, heads, length, head_dim] each to [batch, length, heads, head_dim]."""
    batch, _, length, _ = qkv[0].shape
    q, k, v = (_rows(x, rows.source) for x in qkv)
    segments = rows.segments
    out = relative_bias_attention(
        (q, k, v), cu_seqlens=segments.cu_seqlens, modality=segments.modality, code=segments.code,
        is_cls=segments.is_cls, bias=bias, code_offsets=[code_offset] * len(bias), scale=scale,
        max_length=segments.max_length,
    )  # fmt: skip
    if rows.source is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, rows.source, out)
    return out.unflatten(0, (batch, length))


def _rows(x: Tensor, source: Tensor | None) -> Tensor:
    """[batch, heads, length, size] to [rows, heads, size]."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if source is None else F.embedding(source, flat.flatten(1)).unflatten(1, flat.shape[1:])
