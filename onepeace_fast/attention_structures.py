"""Inputs, outputs and gradients of attention, as ``onepeace_fast.structures`` has those of the ops over rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Where each sample's tokens of each modality are, and what each row is: ``RoutePlan.segments``."""

    cu_seqlens: Tensor  # int32 [modalities, samples + 1]
    modality: Tensor  # int32 [rows]
    code: Tensor  # int32 [rows]
    is_cls: Tensor  # bool [rows]
    max_length: int = 0  # of the longest sample; 0: the host does not know it
    order: Tensor | None = None  # int32 [rows], a query sees the keys of its own order and of lower ones; None: all


def equal_segments(samples: int, code: Tensor) -> Segments:
    """Those of samples of one length and one modality, each with tokens of these codes: int32 [length]."""
    length, code = code.shape[0], code.repeat(samples)
    starts = torch.arange(samples + 1, dtype=torch.int32, device=code.device) * length
    no = torch.zeros_like(code)
    return Segments(starts[None], no, code, no.bool(), length)


class KeySegments(NamedTuple):
    """``Segments`` of keys and values that are not the queries' own tokens; nothing: they are."""

    cu_seqlens: Tensor | None = None
    modality: Tensor | None = None
    code: Tensor | None = None
    is_cls: Tensor | None = None
    max_length: int = 0
    order: Tensor | None = None


class BiasVectors(NamedTuple):
    """The expanded vectors of all modalities: none, one of each, or one between all tokens."""

    vectors: list[Tensor]  # [heads, entries]
    code_offsets: tuple[int, ...]  # the entry of equal codes, per modality


class AttentionInputs(NamedTuple):
    """``relative_bias_attention``, with ``qkv`` or the three apart."""

    qkv: Tensor | None  # [rows, 3, heads, head_dim]
    q: Tensor | None  # [rows, heads, head_dim]
    k: Tensor | None  # [key rows, heads, head_dim]
    v: Tensor | None  # [key rows, heads, value_dim]
    segments: Segments
    key_segments: KeySegments
    bias: BiasVectors
    head_scale: Tensor | None  # [heads]
    scale: float
    with_log_sum_exp: bool = False  # whether the caller reads it


class AttentionOutputs(NamedTuple):
    """The result and the scores' log-sum-exp, float32 for half precision."""

    out: Tensor  # [rows, heads, value_dim]
    log_sum_exp: Tensor  # [rows, heads]


class AttentionSaved(NamedTuple):
    """What the backward pass of ``relative_bias_attention`` is given."""

    grad_out: Tensor
    qkv: Tensor | None
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    segments: Segments
    key_segments: KeySegments
    bias: BiasVectors
    head_scale: Tensor | None
    log_sum_exp: Tensor
    scale: float


class VectorGradients(NamedTuple):
    """Gradients of the vectors of ``BiasVectors``."""

    vectors: list[Tensor | None]


class AttentionGradients(NamedTuple):
    """Gradients of ``relative_bias_attention``."""

    qkv: Tensor | None
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: VectorGradients
    head_scale: Tensor | None
