"""Self-attention over packed segments with a relative position bias in code form.

For every sample, over all of its tokens of all modalities, and every head h:

    score[i, j] = scale * q_i . k_j + bias[h, i, j],   out_i = c_h * sum_j softmax_j(score[i, :]) v_j

bias is zero between modalities; within modality m it is entry ``code_i - code_j + code_offsets[m]`` of the vector
``bias[m][h]``, whose last three entries are those of CLS as query, CLS as key, and both (ONE-PEACE, arXiv 2305.11172;
head scale c: NormFormer, arXiv 2110.09456). No [length, length] tensor exists outside this op.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import (
    checks_devices,
    describe,
    require,
    require_device,
    require_tensor,
    require_values,
    require_vector,
)
from onepeace_fast.ops.attention_on_gpu import attend_by_sdpa, launch_backward, launch_forward, refusal
from onepeace_fast.ops.operation import define, no_gradient, only_needed, register_gradient
from onepeace_fast.ops.packed_rows import accumulation_dtype
from onepeace_fast.ops.segments import (
    Group,
    check_codes,
    check_segments,
    head_slices,
    longest_sample,
    pair_bias,
    sample_groups,
    sum_by_index,
)
from onepeace_fast.relative_position import CLS_ENTRIES


def scores(q: Tensor, k: Tensor, bias: Tensor | None, group: Group, scale: float) -> Tensor:
    """scale q k^T + bias, the smallest number where the key is padding: [N, heads, L, L]."""
    score = torch.matmul(q * scale, k.transpose(-1, -2))
    if bias is not None:
        score += bias
    if group.valid is not None:
        # Not minus infinity: a sample without tokens would be 0 / 0.
        score.masked_fill_(~group.valid[:, None, None, :], torch.finfo(score.dtype).min)
    return score


def _heads(qkv: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the rows, each [N, heads, L, head_dim], in at least float32."""
    return group.read(qkv).to(accumulation_dtype(qkv.dtype)).permute(2, 0, 3, 1, 4).unbind()


def relative_bias_attention_reference(
    qkv: Tensor, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor, bias: Sequence[Tensor],
    code_offsets: Sequence[int], head_scale: Tensor | None, scale: float, max_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns out [rows, heads, head_dim] in qkv's dtype and the scores' log-sum-exp [rows, heads]."""
    dtype = accumulation_dtype(qkv.dtype)
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_zeros(rows + 1, heads, head_dim)
    log_sum_exp = qkv.new_zeros(rows + 1, heads, dtype=dtype)
    if code.device.type == "cpu":
        _check_values(rows, cu_seqlens, modality, code, is_cls, bias, code_offsets)
    pairs = pair_bias(bias, modality, code, is_cls, code_offsets, dtype)
    for group in sample_groups(cu_seqlens, max_length):
        q, k, v = _heads(qkv, group)
        score = scores(q, k, pairs and pairs.values(pairs.index(group)), group, scale)
        p = score.softmax(-1)
        # The largest probability is exp(largest score - log-sum-exp).
        total = score.amax(-1) - p.amax(-1).log()
        attended = torch.matmul(p, v)
        if head_scale is not None:
            attended = attended * head_scale.to(dtype)[:, None, None]
        group.scatter(out, attended.transpose(1, 2))
        group.scatter(log_sum_exp, total.transpose(1, 2))
    return out[:rows], log_sum_exp[:rows]


def relative_bias_attention_backward_reference(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor,
    bias: Sequence[Tensor], code_offsets: Sequence[int], head_scale: Tensor | None, log_sum_exp: Tensor, scale: float,
    max_length: int, bias_needs: Sequence[bool], head_scale_need: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """With p the probabilities, o = p v and do = c grad:

    dv = p^T do,  dp = do v^T,  ds = p (dp - sum_j p dp),  dq = scale ds k,  dk = scale ds^T q,
    dc = sum(grad o),  dbias[entry] = sum of ds over the pairs that take the entry.

    Returns dqkv, the vectors' gradients and the head scale's, empty where none is needed. The kernel reads
    ``log_sum_exp`` to repeat p block by block; here whole rows are at hand.
    """
    dtype = accumulation_dtype(qkv.dtype)
    rows = qkv.shape[0]
    dqkv = qkv.new_zeros(rows + 1, *qkv.shape[1:])
    pairs = pair_bias(bias, modality, code, is_cls, code_offsets, dtype)
    dvectors = torch.zeros_like(pairs.vectors) if any(bias_needs) else None
    dscale = torch.zeros_like(head_scale, dtype=dtype) if head_scale_need else None
    for group in sample_groups(cu_seqlens, max_length):
        q, k, v = _heads(qkv, group)
        index = pairs and pairs.index(group)
        p = scores(q, k, pairs and pairs.values(index), group, scale).softmax(-1)
        dout = group.read(grad).to(dtype).transpose(1, 2)
        if group.valid is not None:
            p = p * group.valid[:, None, :, None]
        if dscale is not None:
            dscale += (dout * torch.matmul(p, v)).sum((0, 2, 3))
        if head_scale is not None:
            dout = dout * head_scale.to(dtype)[:, None, None]
        dv = torch.matmul(p.transpose(-1, -2), dout)
        ds = torch.ops.aten._softmax_backward_data(torch.matmul(dout, v.transpose(-1, -2)), p, -1, dtype)
        if dvectors is not None:
            dvectors += sum_by_index(ds.movedim(1, 0).flatten(1), index.flatten(), dvectors.shape[1])
        dq, dk = torch.matmul(ds, k) * scale, torch.matmul(ds.transpose(-1, -2), q) * scale
        for which, gradient in enumerate((dq, dk, dv)):
            group.scatter(dqkv[:, which], gradient.transpose(1, 2))
    gradients = []
    for m, (vector, need) in enumerate(zip(bias, bias_needs, strict=True)):
        part = dvectors[:, pairs.starts[m] : pairs.starts[m + 1]] if need else vector.new_empty(0)
        gradients.append(part.to(vector.dtype, copy=True))
    return dqkv[:rows], gradients, qkv.new_empty(0) if dscale is None else dscale.to(head_scale.dtype, copy=True)


def relative_bias_attention_on_gpu(
    qkv: Tensor, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor, bias: Sequence[Tensor],
    code_offsets: Sequence[int], head_scale: Tensor | None, scale: float, max_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the reference returns, by the CUDA extension; where it cannot, by PyTorch's attention, and says so."""
    if checks_devices():
        _check_values(qkv.shape[0], cu_seqlens, modality, code, is_cls, bias, code_offsets)
        _check_longest(cu_seqlens, max_length)
    if (reason := refusal(qkv, cu_seqlens.shape[0], bias)) is None:
        return launch_forward(qkv, cu_seqlens, code, is_cls, bias, code_offsets, head_scale, scale, max_length)
    _say_once(reason if max_length else f"{reason}; without max_length each call waits for the device")
    pairs = pair_bias(bias, modality, code, is_cls, code_offsets, qkv.dtype)
    return attend_by_sdpa(qkv, cu_seqlens, pairs, head_scale, scale, longest_sample(cu_seqlens, max_length))


def _check_values(
    rows: int, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor, bias: Sequence[Tensor],
    code_offsets: Sequence[int],
) -> None:  # fmt: skip
    check_segments(cu_seqlens, rows)
    check_codes(bias, modality, code, is_cls, code_offsets)


def _check_longest(cu_seqlens: Tensor, max_length: int) -> None:
    """Raise where a sample is longer than a ``max_length`` that was given."""
    if max_length:
        message = f"max_length: got {max_length} and a longer sample, takes the longest one's length, or 0"
        require_values((cu_seqlens.diff(dim=1).sum(0) <= max_length).all(), message)


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"relative_bias_attention: takes the slower path, PyTorch's scaled_dot_product_attention: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def relative_bias_attention_backward_on_gpu(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor,
    bias: Sequence[Tensor], code_offsets: Sequence[int], head_scale: Tensor | None, log_sum_exp: Tensor, scale: float,
    max_length: int, bias_needs: Sequence[bool], head_scale_need: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """What the backward reference returns, by the CUDA extension wherever that ran the forward pass.

    Otherwise by the reference, which does not need the log-sum-exp that PyTorch's attention leaves unknown; some
    heads after others, so that memory is linear in rows.
    """
    if refusal(qkv, cu_seqlens.shape[0], bias) is None:
        return launch_backward(
            grad, qkv, cu_seqlens, code, is_cls, bias, code_offsets, head_scale, log_sum_exp, scale, max_length,
            bias_needs, head_scale_need,
        )  # fmt: skip
    longest = longest_sample(cu_seqlens, max_length)
    parts = [
        relative_bias_attention_backward_reference(
            grad[:, heads], qkv[:, :, heads], cu_seqlens, modality, code, is_cls, [vector[heads] for vector in bias],
            code_offsets, None if head_scale is None else head_scale[heads], log_sum_exp[:, heads], scale, longest,
            bias_needs, head_scale_need,
        )
        for heads in head_slices(qkv.shape[2], cu_seqlens.shape[1] - 1, longest)
    ]  # fmt: skip
    dqkv, dbias, dscale = zip(*parts, strict=True)
    return torch.cat(dqkv, 2), [torch.cat(vectors) for vectors in zip(*dbias, strict=True)], torch.cat(dscale)


def _fake(qkv, cu_seqlens, modality, code, is_cls, bias, code_offsets, head_scale, scale, max_length):
    out = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
    return out, qkv.new_empty(qkv.shape[:1] + qkv.shape[2:3], dtype=accumulation_dtype(qkv.dtype))


def _fake_backward(
    grad, qkv, cu_seqlens, modality, code, is_cls, bias, code_offsets, head_scale, log_sum_exp, scale, max_length,
    bias_needs, head_scale_need,
):  # fmt: skip
    gradients = [b.new_empty(b.shape if n else 0) for b, n in zip(bias, bias_needs, strict=True)]
    dscale = torch.empty_like(head_scale) if head_scale_need else qkv.new_empty(0)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), gradients, dscale


_PLAN = "Tensor cu_seqlens, Tensor modality, Tensor code, Tensor is_cls, Tensor[] bias, SymInt[] code_offsets"
_op = define(
    "relative_bias_attention",
    f"(Tensor qkv, {_PLAN}, Tensor? head_scale, float scale, SymInt max_length) -> (Tensor, Tensor)",
    relative_bias_attention_reference,
    _fake,
    kernel=relative_bias_attention_on_gpu,
    triton=False,
)
_backward_op = define(
    "relative_bias_attention_backward",
    f"(Tensor grad, Tensor qkv, {_PLAN}, Tensor? head_scale, Tensor log_sum_exp, float scale, SymInt max_length,"
    " bool[] bias_needs, bool head_scale_need) -> (Tensor, Tensor[], Tensor)",
    relative_bias_attention_backward_reference,
    _fake_backward,
    kernel=relative_bias_attention_backward_on_gpu,
    triton=False,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cu_seqlens, modality, code, is_cls, bias, code_offsets, head_scale, scale, max_length = inputs
    _, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.code_offsets, ctx.scale, ctx.max_length = code_offsets, scale, max_length
    ctx.save_for_backward(qkv, cu_seqlens, modality, code, is_cls, head_scale, log_sum_exp, *bias)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
    qkv, cu_seqlens, modality, code, is_cls, head_scale, log_sum_exp, *bias = ctx.saved_tensors
    bias_needs, scale_need = list(ctx.needs_input_grad[5] or ()), ctx.needs_input_grad[7]
    dqkv, dbias, dscale = _backward_op(
        grad, qkv, cu_seqlens, modality, code, is_cls, bias, ctx.code_offsets, head_scale, log_sum_exp, ctx.scale,
        ctx.max_length, bias_needs, scale_need,
    )  # fmt: skip
    dscale = dscale if scale_need else None
    return (
        dqkv,
        None,
        None,
        None,
        None,
        only_needed(dbias, bias_needs),
        no_gradient(ctx.code_offsets),
        dscale,
        None,
        None,
    )


register_gradient("relative_bias_attention", _setup_context, _backward)


def relative_bias_attention(
    qkv: Tensor,
    *,
    cu_seqlens: Tensor,
    modality: Tensor,
    code: Tensor,
    is_cls: Tensor,
    bias: Sequence[Tensor] = (),
    code_offsets: Sequence[int] = (),
    head_scale: Tensor | None = None,
    scale: float | None = None,
    max_length: int = 0,
) -> Tensor:
    """Self-attention of every sample over all its tokens, with a relative position bias in code form.

    Args:
        qkv: floating point [rows, 3, heads, head_dim], queries, keys and values of packed rows, any strides.
        cu_seqlens: int32 [G, S + 1]; rows cu_seqlens[m, s] to cu_seqlens[m, s + 1] are sample s's of modality m.
        modality, code: int32 [rows], the plan's.
        is_cls: bool [rows], the plan's.
        bias: one [heads, entries] per modality, the expanded vectors with their three CLS entries last; empty for none.
        code_offsets: per modality, the entry that belongs to equal codes.
        head_scale: [heads], or None.
        scale: of q . k; by default head_dim ** -0.5.
        max_length: longest sample, where the host knows it; on a GPU a longer one may get gradients that are NaN.

    Returns:
        [rows, heads, head_dim] in qkv's dtype; scores and softmax are float32 for half precision. Inert rows are zero.
        On a GPU float16 and bfloat16 with heads of 32, 64 or 128 run the CUDA kernels, forward and backward; whatever
        they cannot take runs PyTorch's attention, which says so once, and has its gradients from the reference.

    Raises:
        ValueError: a dtype, shape or device that does not fit, on a GPU also strides that 16 bytes cannot be read from;
            on a CPU, and under ``ONEPEACE_FAST_CHECK=1`` by an assertion on the device, segments outside the rows and
            codes that differ by more than their vector covers; by that assertion alone samples past ``max_length``.
        RuntimeError: CUDA's error where the launch fails.
    """
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    require_tensor("qkv", qkv, floats, "[rows, 3, heads, head_dim]", 4)
    require(qkv.shape[1] == 3, lambda: f"qkv: got {describe(qkv)}, takes 3 in dimension 1: query, key, value")
    rows, _, heads, head_dim = qkv.shape
    require_tensor("cu_seqlens", cu_seqlens, (torch.int32,), "[modalities, samples + 1]", 2)
    for name, value in (("modality", modality), ("code", code), ("is_cls", is_cls)):
        dtype = torch.bool if name == "is_cls" else torch.int32
        require_tensor(name, value, (dtype,), "[rows]", 1)
        require(
            value.shape[0] == rows,
            lambda name=name, value=value: f"{name}: got {describe(value)}, takes one entry per row, [{rows}]",
        )
    for name, value in (("cu_seqlens", cu_seqlens), ("modality", modality), ("code", code), ("is_cls", is_cls)):
        require_device(name, value, qkv.device)
    groups = cu_seqlens.shape[0]
    bias, code_offsets = list(bias), list(code_offsets)
    require(
        not bias or len(bias) == groups,
        lambda: f"bias: got {len(bias)} vectors, takes one per modality, {groups}, or none",
    )
    require(
        not bias or len(code_offsets) == groups,
        lambda: f"code_offsets: got {len(code_offsets)}, takes one per modality, {groups}",
    )
    for m, vector in enumerate(bias):
        fits = vector.is_floating_point() and vector.dim() == 2 and vector.shape[0] == heads
        require(
            fits and vector.shape[1] > CLS_ENTRIES,
            lambda m=m, vector=vector: (
                f"bias[{m}]: got {describe(vector)}, takes floating point [{heads}, {CLS_ENTRIES + 1} or more]"
            ),
        )
        require_device(f"bias[{m}]", vector, qkv.device)
    require_vector("head_scale", head_scale, heads, qkv.device)
    scale = head_dim**-0.5 if scale is None else scale
    return _op(qkv, cu_seqlens, modality, code, is_cls, bias, code_offsets, head_scale, scale, max_length)[0]
