"""What ``relative_bias_attention`` takes: shapes, dtypes and devices, looked at on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from onepeace_fast.attention_structures import AttentionInputs, KeySegments, Segments
from onepeace_fast.checks import describe, require, require_device, require_tensor, require_vector
from onepeace_fast.ops.arguments import FLOATS
from onepeace_fast.relative_position import CLS_ENTRIES


def check_arguments(given: AttentionInputs) -> None:
    """Raise ValueError, in one line, where an argument does not fit; every layer asks, so what fits is seen at once."""
    if given.qkv is not None:
        require_tensor("qkv", given.qkv, FLOATS, "[rows, 3, heads, head_dim]", 4)
        if given.qkv.shape[1] != 3:
            raise ValueError(f"qkv: expected 3 in dimension 1, query, key, value, got {describe(given.qkv)}")
        first, key_rows = given.qkv, given.qkv.shape[0]
    else:
        first, key_rows = _check_apart(given)
    rows, heads, device = first.shape[0], first.shape[-2], first.device
    if not (heads > 0 and first.shape[-1] > 0):
        raise ValueError(f"qkv: expected at least one head of at least one entry, got {describe(first)}")
    if isinstance(given.scale, Tensor):
        raise ValueError("scale: expected a number, got a tensor, which would get no gradient")
    segments, keys = given.segments, given.key_segments
    _check_segments("", segments, rows, device)
    if keys.cu_seqlens is not None:
        _check_keys(given, key_rows, device)
    elif key_rows != rows:
        raise ValueError(
            f"k: expected the queries' {rows} rows, got {key_rows}; the segments of others are given by keys"
        )
    _check_bias(given, heads, device)
    require_vector("head_scale", given.head_scale, heads, device)


def _check_apart(given: AttentionInputs) -> tuple[Tensor, int]:
    """Queries, keys and values apart: the queries, and how many keys there are."""
    q, k, v = given.q, given.k, given.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, FLOATS, "[rows, heads, size]", 3)
    assert q is not None and k is not None and v is not None
    for name, x, size in (("k", k, (k.shape[0], *q.shape[1:])), ("v", v, (*k.shape[:2], v.shape[2]))):
        if x.shape != size:
            raise ValueError(f"{name}: expected {list(size)}, got {describe(x)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's {q.dtype}, got {describe(x)}")
        require_device(name, x, q.device)
    return q, k.shape[0]


def _check_segments(prefix: str, segments: Segments | KeySegments, rows: int, device: torch.device) -> None:
    cu_seqlens, modality, code, is_cls, max_length, order = segments
    require_tensor(f"{prefix}cu_seqlens", cu_seqlens, (torch.int32,), "[modalities, samples + 1]", 2)
    require_device(f"{prefix}cu_seqlens", cu_seqlens, device, of_plan=True)
    require(max_length >= 0, lambda: f"{prefix}max_length: expected a length, or 0 where unknown, got {max_length}")
    of_rows = (("modality", modality, torch.int32), ("code", code, torch.int32), ("is_cls", is_cls, torch.bool))
    for name, value, dtype in of_rows if order is None else (*of_rows, ("order", order, torch.int32)):
        if isinstance(value, Tensor) and value.dtype == dtype and value.shape == (rows,) and value.device == device:
            continue
        require_tensor(prefix + name, value, (dtype,), "[rows]", 1)
        if value.shape[0] != rows:
            raise ValueError(f"{prefix}{name}: expected one entry per row, [{rows}], got {describe(value)}")
        require_device(prefix + name, value, device, of_plan=True)


def _check_keys(given: AttentionInputs, key_rows: int, device: torch.device) -> None:
    segments, keys = given.segments, given.key_segments
    require(given.qkv is None, "qkv: expected queries, keys and values apart beside keys, got one tensor")
    _check_segments("keys.", keys, key_rows, device)
    modalities = segments.cu_seqlens.shape[0]
    require(
        len(given.bias.vectors) < 2 or keys.cu_seqlens.shape[0] == modalities,
        lambda: f"keys: expected the {modalities} modalities of a bias for each, got {len(keys.cu_seqlens)}",
    )
    samples, of_keys = segments.cu_seqlens.shape[1] - 1, keys.cu_seqlens.shape[1] - 1
    require(samples == of_keys, lambda: f"keys.cu_seqlens: expected the queries' {samples} samples, got {of_keys}")
    require(
        (segments.order is None) == (keys.order is None),
        "order: expected that of queries and of keys, or none, got one of them",
    )


def _check_bias(given: AttentionInputs, heads: int, device: torch.device) -> None:
    modalities, (vectors, offsets) = given.segments.cu_seqlens.shape[0], given.bias
    if vectors and len(vectors) not in (1, modalities):
        raise ValueError(
            f"bias: expected one vector per modality, {modalities}, a single one for all pairs, or none, got "
            f"{len(vectors)}"
        )
    if vectors and len(offsets) != len(vectors):
        raise ValueError(f"code_offsets: expected one per vector, {len(vectors)}, got {len(offsets)}")
    for m, (vector, offset) in enumerate(zip(vectors, offsets, strict=False)):
        fits = isinstance(vector, Tensor) and vector.is_floating_point() and vector.dim() == 2
        if not fits or vector.shape[0] != heads or vector.shape[1] <= CLS_ENTRIES:
            raise ValueError(
                f"bias[{m}]: expected floating point [{heads}, {CLS_ENTRIES + 1} or more], got {describe(vector)}"
            )
        require_device(f"bias[{m}]", vector, device)
        entries = vector.shape[1] - CLS_ENTRIES
        if not 0 <= offset < entries:
            raise ValueError(f"code_offsets[{m}]: expected one of the {entries} entries of bias[{m}], got {offset}")
