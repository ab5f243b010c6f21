"""Attention over packed segments with a relative position bias in code form.

For every sample, over all of its tokens of all modalities, and every head h:

    score[i, j] = scale * q_i . k_j + bias[h, i, j],   out_i = c_h * sum_j softmax_j(score[i, :]) v_j

bias is zero between modalities; within modality m it is entry ``code_i - code_j + code_offsets[m]`` of the vector
``bias[m][h]``, whose last three entries are those of CLS as query, CLS as key, and both (ONE-PEACE, arXiv 2305.11172;
head scale c: NormFormer, arXiv 2110.09456). One vector for all modalities is the bias of all pairs. With an order, the
sum is over the keys whose order is at most the query's. No [length, length] tensor exists outside this op.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from onepeace_fast.attention_structures import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputs,
    AttentionSaved,
    BiasVectors,
    KeySegments,
    Segments,
    VectorGradients,
)
from onepeace_fast.checks import checks_devices, is_on_host
from onepeace_fast.ops.attention_arguments import check_arguments
from onepeace_fast.ops.attention_on_gpu import attend_by_sdpa, key_of, launch_backward, launch_forward, refusal
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import accumulation_dtype
from onepeace_fast.ops.pair_bias import Batch, sum_by_index, walk
from onepeace_fast.ops.segments import Pairs, head_slices, longest_sample
from onepeace_fast.structures import Needs

QKV: TypeAlias = Tensor | tuple[Tensor, Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v, [N, heads, Lq, value_dim], and the scores' log-sum-exp, [N, heads, Lq]."""
    if is_on_host(q) and q.shape[-1] == v.shape[-1]:
        bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
        # Twice as fast as the products below, and what scaled_dot_product_attention runs, which hides the log-sum-exp.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    score = scores(q, k, bias, scale)
    p = score.softmax(-1)
    # The largest probability is exp(largest score - log-sum-exp).
    return torch.matmul(p, v), score.amax(-1) - p.amax(-1).log()


def scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale q k^T + bias: [N, heads, Lq, Lk]."""
    score = torch.matmul(q * scale, k.transpose(-1, -2))
    return score if bias is None else score.add_(bias)


def _batch(given: AttentionInputs | AttentionSaved) -> Batch:
    """Segments and rows of queries and of keys; where there is no key at all, a row stands for the padding."""
    if given.key_segments.cu_seqlens is None:
        rows = key_of(given).shape[0]
        return Batch(given.segments, given.segments, rows, rows)
    keys, key_rows = Segments(*given.key_segments), key_of(given).shape[0]
    if not key_rows:
        zero, order = keys.code.new_zeros(1), None if keys.order is None else keys.order.new_zeros(1)
        keys = keys._replace(modality=zero, code=zero, is_cls=zero == 0, order=order)  # of no code that is counted
    assert given.q is not None  # keys of others come apart
    return Batch(given.segments, keys, given.q.shape[0], key_rows)


def _heads(given: AttentionInputs | AttentionSaved, pairs: Pairs, dtype: torch.dtype) -> Sequence[Tensor]:
    """q, k, v of the groups' rows, each [N, heads, L, size]."""
    if given.qkv is not None:
        return pairs.queries.read(given.qkv).to(dtype).permute(2, 0, 3, 1, 4).unbind()
    groups = (pairs.queries, pairs.keys, pairs.keys)
    return [
        group.read(_at_least_a_row(x)).to(dtype).transpose(1, 2)
        for group, x in zip(groups, (given.q, given.k, given.v), strict=True)
    ]


def _at_least_a_row(x: Tensor) -> Tensor:
    """What stands for the padding of samples without keys."""
    return x if x.shape[0] else x.new_zeros(1, *x.shape[1:])


def output_shape(given: AttentionInputs) -> tuple[int, int, int]:
    """[rows, heads, value_dim]."""
    return (*given.q.shape[:2], given.v.shape[2]) if given.qkv is None else (given.qkv.shape[0], *given.qkv.shape[2:])


def relative_bias_attention_reference(given: AttentionInputs) -> AttentionOutputs:
    """Samples of similar length after one another."""
    like, head_scale = key_of(given), given.head_scale
    dtype, (rows, *size) = accumulation_dtype(like.dtype), output_shape(given)
    out = log_sum_exp = None
    for pairs, _, added, sees in walk(given.bias, _batch(given), dtype):
        q, k, v = _heads(given, pairs, dtype)
        attended, total = attend(q, k, v, added, given.scale)
        if head_scale is not None:
            attended = attended * head_scale.to(dtype)[:, None, None]
        if sees is not None:
            attended = attended.masked_fill(~sees[:, None, :, None], 0)
            total = total.masked_fill(~sees[:, None], -torch.inf)
        out = pairs.queries.placed(out, attended.transpose(1, 2), rows, like.dtype)
        log_sum_exp = pairs.queries.placed(log_sum_exp, total.transpose(1, 2), rows, dtype)
    if out is None or log_sum_exp is None:  # there is no token
        return AttentionOutputs(like.new_zeros(rows, *size), like.new_zeros(rows, size[0], dtype=dtype))
    return AttentionOutputs(out[:rows], log_sum_exp[:rows])


def relative_bias_attention_backward_reference(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    """With p the probabilities, o = p v and do = c grad:

    dv = p^T do,  dp = do v^T,  ds = p (dp - sum_j p dp),  dq = scale ds k,  dk = scale ds^T q,
    dc = sum(grad o),  dbias[entry] = sum of ds over the pairs that take the entry.

    The kernel reads the log-sum-exp to repeat p block by block; here whole rows are at hand.
    """
    like, head_scale, scale = key_of(saved), saved.head_scale, saved.scale
    dtype = accumulation_dtype(like.dtype)
    # Of qkv and the three apart only the first or the others are there.
    found: list[Tensor | None] = [None] * 4
    widths = [vector.shape[1] for vector in saved.bias.vectors]
    heads = saved.grad_out.shape[1]
    dvectors = like.new_zeros(heads, sum(widths) + 1, dtype=dtype) if any(needs.bias.vectors) else None
    dscale = torch.zeros_like(head_scale, dtype=dtype) if needs.head_scale else None
    for pairs, entries, added, sees in walk(saved.bias, _batch(saved), dtype):
        q, k, v = _heads(saved, pairs, dtype)
        p = scores(q, k, added, scale).softmax(-1)
        dout = pairs.queries.read(saved.grad_out).to(dtype).transpose(1, 2)
        for real in (pairs.queries.valid, sees):
            if real is not None:
                p = p * real[:, None, :, None]
        if dscale is not None:
            dscale += (dout * torch.matmul(p, v)).sum((0, 2, 3))
        if head_scale is not None:
            dout = dout * head_scale.to(dtype)[:, None, None]
        dv = torch.matmul(p.transpose(-1, -2), dout)
        ds = torch.ops.aten._softmax_backward_data(torch.matmul(dout, v.transpose(-1, -2)), p, -1, dtype)
        if dvectors is not None:
            by_entry = ds.sum(0, keepdim=True) if entries.shape[0] < pairs.queries.samples else ds
            dvectors += sum_by_index(by_entry.movedim(1, 0).flatten(1), entries.flatten(), dvectors.shape[1])
        dq, dk = torch.matmul(ds, k) * scale, torch.matmul(ds.transpose(-1, -2), q) * scale
        of_rows = [x.transpose(1, 2) for x in (dq, dk, dv)]
        if saved.qkv is not None:
            found[0] = pairs.queries.placed(found[0], torch.stack(of_rows, 2), like.shape[0], like.dtype)
            continue
        for place, (group, gradient) in enumerate(
            zip((pairs.queries, pairs.keys, pairs.keys), of_rows, strict=True), 1
        ):
            rows = like.shape[0] if place > 1 else saved.grad_out.shape[0]
            found[place] = group.placed(found[place], gradient, rows, like.dtype)
    parts = [None] * len(widths) if dvectors is None else dvectors.split([*widths, 1], dim=1)[:-1]
    gradients = [
        part.to(vector.dtype, copy=True) if need else None
        for part, vector, need in zip(parts, saved.bias.vectors, needs.bias.vectors, strict=True)
    ]
    dscale = None if dscale is None else dscale.to(head_scale.dtype, copy=True)
    of_qkv = [
        None if x is None else torch.zeros_like(x) if gradient is None else gradient[: x.shape[0]]
        for x, gradient in zip(saved[1:5], found, strict=True)
    ]
    return AttentionGradients._make([*of_qkv, VectorGradients(gradients), dscale])


def relative_bias_attention_on_gpu(given: AttentionInputs) -> AttentionOutputs:
    """What the reference returns, by the CUDA extension; where it cannot, by PyTorch's attention, and says so."""
    batch = _batch(given)
    if checks_devices():
        batch.check(given.bias)
    if (reason := refusal(given)) is None:
        return launch_forward(given)
    known = batch.segments.max_length and batch.keys.max_length
    _say_once(reason if known else f"{reason}; without max_length each call waits for the device")
    if given.with_log_sum_exp:  # PyTorch's attention does not give it
        return relative_bias_attention_reference(given)
    like, (rows, *size) = key_of(given), output_shape(given)
    log_sum_exp = like.new_zeros(rows + 1, size[0], dtype=accumulation_dtype(like.dtype))
    outputs = AttentionOutputs(like.new_zeros(rows + 1, *size), log_sum_exp)
    attend_by_sdpa(
        batch, functools.partial(_heads, given, dtype=key_of(given).dtype), given.bias, given.head_scale, given.scale,
        outputs,
    )  # fmt: skip
    return AttentionOutputs(outputs.out[:-1], outputs.log_sum_exp[:-1])


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"relative_bias_attention: takes the slower path, PyTorch's scaled_dot_product_attention: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def relative_bias_attention_backward_on_gpu(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    """What the backward reference returns, by the CUDA extension wherever that ran the forward pass.

    Otherwise by the reference, which does not need the log-sum-exp that PyTorch's attention leaves unknown; some heads
    after others, so that memory is linear in rows.
    """
    if refusal(saved) is None:
        return launch_backward(saved, needs)
    batch = _batch(saved)
    segments, keys = (side._replace(max_length=longest_sample(side)) for side in (batch.segments, batch.keys))
    saved = saved._replace(segments=segments)
    if batch.keys is not batch.segments:
        saved = saved._replace(key_segments=KeySegments(*keys))
    samples = segments.cu_seqlens.shape[1] - 1
    parts = [
        relative_bias_attention_backward_reference(_some_heads(saved, heads), needs)
        for heads in head_slices(saved.grad_out.shape[1], samples, segments.max_length, keys.max_length)
    ]
    dvectors = [
        torch.cat(vectors) if need else None
        for need, *vectors in zip(needs.bias.vectors, *(part.bias.vectors for part in parts), strict=True)
    ]
    dscale = torch.cat([part.head_scale for part in parts]) if needs.head_scale else None
    of_qkv = [
        None if found[0] is None else torch.cat(found, -2)
        for found in zip(*((part.qkv, part.q, part.k, part.v) for part in parts), strict=True)
    ]
    return AttentionGradients._make([*of_qkv, VectorGradients(dvectors), dscale])


def _some_heads(saved: AttentionSaved, heads: slice) -> AttentionSaved:
    qkv, q, k, v = (None if x is None else x[..., heads, :] for x in saved[1:5])
    return saved._replace(
        grad_out=saved.grad_out[:, heads],
        qkv=qkv,
        q=q,
        k=k,
        v=v,
        bias=saved.bias._replace(vectors=[vector[heads] for vector in saved.bias.vectors]),
        head_scale=None if saved.head_scale is None else saved.head_scale[heads],
        log_sum_exp=saved.log_sum_exp[:, heads],
    )


def _fake(given: AttentionInputs) -> AttentionOutputs:
    like, shape = key_of(given), output_shape(given)
    return AttentionOutputs(like.new_empty(shape), like.new_empty(shape[:2], dtype=accumulation_dtype(like.dtype)))


def _fake_backward(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    vectors = zip(saved.bias.vectors, needs.bias.vectors, strict=True)
    of_qkv = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved[1:5]]
    dvectors = VectorGradients([vector.new_empty(vector.shape) if need else None for vector, need in vectors])
    dscale = torch.empty_like(saved.head_scale) if needs.head_scale else None
    return AttentionGradients._make([*of_qkv, dvectors, dscale])


RELATIVE_BIAS_ATTENTION = Operation(
    "relative_bias_attention",
    AttentionInputs,
    AttentionOutputs,
    reference=relative_bias_attention_reference,
    kernel=relative_bias_attention_on_gpu,
    fake=_fake,
    gradient=Gradient(
        AttentionSaved, AttentionGradients, relative_bias_attention_backward_reference,
        relative_bias_attention_backward_on_gpu, _fake_backward,
    ),
    triton=False,
    shown=2,
)  # fmt: skip


@overload
def relative_bias_attention(
    qkv: QKV, *, return_log_sum_exp: Literal[True], **arguments: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def relative_bias_attention(qkv: QKV, **arguments: Any) -> Tensor: ...
def relative_bias_attention(  # type: ignore[misc]  # the overloads leave the arguments open
    qkv: QKV,
    *,
    cu_seqlens: Tensor,
    modality: Tensor,
    code: Tensor,
    is_cls: Tensor,
    order: Tensor | None = None,
    keys: Segments | None = None,
    bias: Sequence[Tensor] = (),
    code_offsets: Sequence[int] = (),
    head_scale: Tensor | None = None,
    scale: float | None = None,
    max_length: int = 0,
    return_log_sum_exp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every sample over all its tokens, with a relative position bias in code form.

    The bias is that of ONE-PEACE (arXiv 2305.11172), the head scale that of NormFormer (arXiv 2110.09456).

    Args:
        qkv: floating point [rows, 3, heads, head_dim], queries, keys and values of packed rows, any strides; or the
            three apart, q [rows, heads, head_dim], k [key rows, heads, head_dim], v [key rows, heads, value_dim].
        cu_seqlens: int32 [G, S + 1]; rows cu_seqlens[m, s] to cu_seqlens[m, s + 1] are sample s's of modality m.
        modality, code: int32 [rows], the plan's.
        is_cls: bool [rows], the plan's.
        order: int32 [rows]; a query sees the keys of its sample whose order is at most its own: a plan's
            ``causal_order()`` or ``prefix_order(...)``. None: a query sees all. 2**31 - 1 of a key: none sees it.
        keys: for cross attention, the segments of the key rows, of as many samples; with ``order`` they have theirs.
            Those of a ``KeyValueCache``, for new tokens of samples that are generated.
        bias: one floating-point [heads, entries] per modality, the expanded vectors with their three CLS entries last;
            or a single one for the pairs of all tokens, whatever their modalities; empty for none.
        code_offsets: per vector, the entry that belongs to equal codes.
        head_scale: floating point [heads], a factor of each head's output, or None.
        scale: of q . k, a number; by default head_dim ** -0.5.
        max_length: longest sample, where the host knows it; on a GPU a longer one loses tokens, or gets gradients that
            are NaN.
        return_log_sum_exp: return also the log-sum-exp of each query's scores, which has no gradient.

    Returns:
        [rows, heads, value_dim] in qkv's dtype; scores and softmax are float32 for half precision. Inert rows are zero,
        and so is a query that sees no key. The log-sum-exp is [rows, heads], float32 for half precision, -inf where a
        query sees no key. On a GPU float16 and bfloat16 with heads of at most 128 run the CUDA kernels, forward and
        backward, with or without an order, ``keys`` and vectors. Zeros fill heads up to 32, 64, 96 or 128, and values
        beside keys of 128 up to 64 or 128; tiles that an order hides cost nothing. Whatever they cannot take, such as
        values wider than the keys, runs PyTorch's attention, which says so once, and has its gradients from the
        reference.

    Raises:
        ValueError: a dtype, shape or device that does not fit, on a GPU also strides that 16 bytes cannot be read from;
            on a CPU, and under ``ONEPEACE_FAST_CHECK=1`` by an assertion on the device, segments outside the rows,
            samples past ``max_length`` and codes that differ by more than their vector covers; on a CPU alone an order
            that leaves out a number.
        RuntimeError: CUDA's error where the launch fails.
    """
    segments = Segments(cu_seqlens, modality, code, is_cls, max_length, order)
    if not isinstance(qkv, Tensor) and len(qkv) != 3:
        raise ValueError(f"qkv: expected a tensor, or queries, keys and values, got {len(qkv)} of them")
    if keys is not None and not isinstance(keys, Segments):
        raise ValueError(f"keys: expected Segments, such as plan.segments, got {type(keys).__name__}")
    joint, q, k, v = (qkv, None, None, None) if isinstance(qkv, Tensor) else (None, *qkv)
    inputs = (
        joint, q, k, v, segments, KeySegments() if keys is None else KeySegments(*keys),
        BiasVectors(list(bias), tuple(code_offsets)), head_scale,
    )  # fmt: skip
    given = AttentionInputs(*inputs, 0.0 if scale is None else scale, return_log_sum_exp)
    check_arguments(given)
    if scale is None:  # torch 2.8 does not trace _replace
        given = AttentionInputs(*inputs, key_of(given).shape[-1] ** -0.5, return_log_sum_exp)
    out, log_sum_exp = RELATIVE_BIAS_ATTENTION(given)
    return (out, log_sum_exp) if return_log_sum_exp else out
