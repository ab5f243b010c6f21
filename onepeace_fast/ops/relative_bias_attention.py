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
from onepeace_fast.ops.arguments import FLOATS
from onepeace_fast.ops.attention_on_gpu import attend_by_sdpa, launch_backward, launch_forward, refusal
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import accumulation_dtype
from onepeace_fast.ops.pair_bias import pair_entries, sum_by_index, walk
from onepeace_fast.ops.segments import Group, check_codes, check_segments, head_slices, is_on_host, longest_sample
from onepeace_fast.relative_position import CLS_ENTRIES
from onepeace_fast.structures import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputs,
    AttentionSaved,
    Needs,
    RelativeBias,
    Segments,
    VectorGradients,
)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v, [N, heads, L, head_dim], and the scores' log-sum-exp, [N, heads, L]."""
    if is_on_host(q):
        bias = None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], q.shape[2])
        # Twice as fast as the products below, and what scaled_dot_product_attention runs, which hides the log-sum-exp.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    score = scores(q, k, bias, scale)
    p = score.softmax(-1)
    # The largest probability is exp(largest score - log-sum-exp).
    return torch.matmul(p, v), score.amax(-1) - p.amax(-1).log()


def scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale q k^T + bias: [N, heads, L, L]."""
    score = torch.matmul(q * scale, k.transpose(-1, -2))
    return score if bias is None else score.add_(bias)


def _heads(qkv: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the rows, each [N, heads, L, head_dim], in at least float32."""
    q, k, v = group.read(qkv).to(accumulation_dtype(qkv.dtype)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def relative_bias_attention_reference(given: AttentionInputs) -> AttentionOutputs:
    """Samples of similar length after one another."""
    qkv, head_scale = given.qkv, given.head_scale
    dtype = accumulation_dtype(qkv.dtype)
    rows, _, heads, head_dim = qkv.shape
    out = log_sum_exp = None
    for group, _, bias in walk(given.bias, given.segments, rows, dtype):
        attended, total = attend(*_heads(qkv, group), bias, given.scale)
        if head_scale is not None:
            attended = attended * head_scale.to(dtype)[:, None, None]
        out = group.placed(out, attended.transpose(1, 2), rows, qkv.dtype)
        log_sum_exp = group.placed(log_sum_exp, total.transpose(1, 2), rows, dtype)
    if out is None or log_sum_exp is None:  # there is no token
        return AttentionOutputs(qkv.new_zeros(rows, heads, head_dim), qkv.new_zeros(rows, heads, dtype=dtype))
    return AttentionOutputs(out[:rows], log_sum_exp[:rows])


def relative_bias_attention_backward_reference(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    """With p the probabilities, o = p v and do = c grad:

    dv = p^T do,  dp = do v^T,  ds = p (dp - sum_j p dp),  dq = scale ds k,  dk = scale ds^T q,
    dc = sum(grad o),  dbias[entry] = sum of ds over the pairs that take the entry.

    The kernel reads the log-sum-exp to repeat p block by block; here whole rows are at hand.
    """
    qkv, head_scale, scale = saved.qkv, saved.head_scale, saved.scale
    dtype = accumulation_dtype(qkv.dtype)
    rows, heads = qkv.shape[0], qkv.shape[2]
    dqkv = None
    widths = [vector.shape[1] for vector in saved.bias.vectors]
    dvectors = qkv.new_zeros(heads, sum(widths) + 1, dtype=dtype) if any(needs.bias.vectors) else None
    dscale = torch.zeros_like(head_scale, dtype=dtype) if needs.head_scale else None
    for group, entries, bias in walk(saved.bias, saved.segments, rows, dtype):
        q, k, v = _heads(qkv, group)
        p = scores(q, k, bias, scale).softmax(-1)
        dout = group.read(saved.grad_out).to(dtype).transpose(1, 2)
        if group.valid is not None:
            p = p * group.valid[:, None, :, None]
        if dscale is not None:
            dscale += (dout * torch.matmul(p, v)).sum((0, 2, 3))
        if head_scale is not None:
            dout = dout * head_scale.to(dtype)[:, None, None]
        dv = torch.matmul(p.transpose(-1, -2), dout)
        ds = torch.ops.aten._softmax_backward_data(torch.matmul(dout, v.transpose(-1, -2)), p, -1, dtype)
        if dvectors is not None:
            by_entry = ds.sum(0, keepdim=True) if entries.shape[0] < group.samples else ds
            dvectors += sum_by_index(by_entry.movedim(1, 0).flatten(1), entries.flatten(), dvectors.shape[1])
        dq, dk = torch.matmul(ds, k) * scale, torch.matmul(ds.transpose(-1, -2), q) * scale
        gradient = torch.stack([x.transpose(1, 2) for x in (dq, dk, dv)], 2)
        dqkv = group.placed(dqkv, gradient, rows, qkv.dtype)
    parts = [None] * len(widths) if dvectors is None else dvectors.split([*widths, 1], dim=1)[:-1]
    gradients = [
        part.to(vector.dtype, copy=True) if need else None
        for part, vector, need in zip(parts, saved.bias.vectors, needs.bias.vectors, strict=True)
    ]
    dscale = None if dscale is None else dscale.to(head_scale.dtype, copy=True)
    dqkv = qkv.new_zeros(qkv.shape) if dqkv is None else dqkv[:rows]
    return AttentionGradients(dqkv, VectorGradients(gradients), dscale)


def relative_bias_attention_on_gpu(given: AttentionInputs) -> AttentionOutputs:
    """What the reference returns, by the CUDA extension; where it cannot, by PyTorch's attention, and says so."""
    qkv, segments = given.qkv, given.segments
    if checks_devices():
        _check_values(given)
        if segments.max_length:
            taken = f"the longest sample's length, or 0, got {segments.max_length} and a longer sample"
            fits = (segments.cu_seqlens.diff(dim=1).sum(0) <= segments.max_length).all()
            require_values(fits, f"max_length: expected {taken}")
    if (reason := refusal(qkv, segments.cu_seqlens.shape[0], given.bias.vectors)) is None:
        return launch_forward(given)
    _say_once(reason if segments.max_length else f"{reason}; without max_length each call waits for the device")
    return attend_by_sdpa(given, pair_entries(given.bias, segments))


def _check_values(given: AttentionInputs) -> None:
    check_segments(given.segments.cu_seqlens, given.qkv.shape[0])
    check_codes(given.bias, given.segments)


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
    qkv, segments = saved.qkv, saved.segments
    if refusal(qkv, segments.cu_seqlens.shape[0], saved.bias.vectors) is None:
        return launch_backward(saved, needs)
    segments = segments._replace(max_length=longest_sample(segments))
    parts = [
        relative_bias_attention_backward_reference(_some_heads(saved, heads)._replace(segments=segments), needs)
        for heads in head_slices(qkv.shape[2], segments.cu_seqlens.shape[1] - 1, segments.max_length)
    ]
    dvectors = [
        torch.cat(vectors) if need else None
        for need, *vectors in zip(needs.bias.vectors, *(part.bias.vectors for part in parts), strict=True)
    ]
    dscale = torch.cat([part.head_scale for part in parts]) if needs.head_scale else None
    return AttentionGradients(torch.cat([part.qkv for part in parts], 2), VectorGradients(dvectors), dscale)


def _some_heads(saved: AttentionSaved, heads: slice) -> AttentionSaved:
    return saved._replace(
        grad_out=saved.grad_out[:, heads],
        qkv=saved.qkv[:, :, heads],
        bias=saved.bias._replace(vectors=[vector[heads] for vector in saved.bias.vectors]),
        head_scale=None if saved.head_scale is None else saved.head_scale[heads],
        log_sum_exp=saved.log_sum_exp[:, heads],
    )


def _fake(given: AttentionInputs) -> AttentionOutputs:
    qkv = given.qkv
    out = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
    return AttentionOutputs(out, qkv.new_empty(qkv.shape[:1] + qkv.shape[2:3], dtype=accumulation_dtype(qkv.dtype)))


def _fake_backward(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    vectors = zip(saved.bias.vectors, needs.bias.vectors, strict=True)
    return AttentionGradients(
        torch.empty_like(saved.qkv, memory_format=torch.contiguous_format),
        VectorGradients([vector.new_empty(vector.shape) if need else None for vector, need in vectors]),
        torch.empty_like(saved.head_scale) if needs.head_scale else None,
    )


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
)  # fmt: skip


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

    The bias is that of ONE-PEACE (arXiv 2305.11172), the head scale that of NormFormer (arXiv 2110.09456).

    Args:
        qkv: floating point [rows, 3, heads, head_dim], queries, keys and values of packed rows, any strides.
        cu_seqlens: int32 [G, S + 1]; rows cu_seqlens[m, s] to cu_seqlens[m, s + 1] are sample s's of modality m.
        modality, code: int32 [rows], the plan's.
        is_cls: bool [rows], the plan's.
        bias: one floating-point [heads, entries] per modality, the expanded vectors with their three CLS entries last;
            empty for none.
        code_offsets: per modality, the entry that belongs to equal codes.
        head_scale: floating point [heads], a factor of each head's output, or None.
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
    require_tensor("qkv", qkv, FLOATS, "[rows, 3, heads, head_dim]", 4)
    require(qkv.shape[1] == 3, lambda: f"qkv: expected 3 in dimension 1, query, key, value, got {describe(qkv)}")
    rows, _, heads, head_dim = qkv.shape
    require_tensor("cu_seqlens", cu_seqlens, (torch.int32,), "[modalities, samples + 1]", 2)
    for name, value in (("modality", modality), ("code", code), ("is_cls", is_cls)):
        dtype = torch.bool if name == "is_cls" else torch.int32
        require_tensor(name, value, (dtype,), "[rows]", 1)
        if value.shape[0] != rows:
            raise ValueError(f"{name}: expected one entry per row, [{rows}], got {describe(value)}")
    for name, value in (("cu_seqlens", cu_seqlens), ("modality", modality), ("code", code), ("is_cls", is_cls)):
        require_device(name, value, qkv.device)
    modalities = cu_seqlens.shape[0]
    bias, code_offsets = list(bias), list(code_offsets)
    if bias and len(bias) != modalities:
        raise ValueError(f"bias: expected one vector per modality, {modalities}, or none, got {len(bias)}")
    if bias and len(code_offsets) != modalities:
        raise ValueError(f"code_offsets: expected one per modality, {modalities}, got {len(code_offsets)}")
    for m, vector in enumerate(bias):
        fits = vector.is_floating_point() and vector.dim() == 2 and vector.shape[0] == heads
        if not fits or vector.shape[1] <= CLS_ENTRIES:
            raise ValueError(
                f"bias[{m}]: expected floating point [{heads}, {CLS_ENTRIES + 1} or more], got {describe(vector)}"
            )
        require_device(f"bias[{m}]", vector, qkv.device)
    require_vector("head_scale", head_scale, heads, qkv.device)
    scale = head_dim**-0.5 if scale is None else scale
    segments = Segments(cu_seqlens, modality, code, is_cls, max_length)
    given = AttentionInputs(qkv, segments, RelativeBias(bias, tuple(code_offsets)), head_scale, scale)
    return RELATIVE_BIAS_ATTENTION(given)[0]
