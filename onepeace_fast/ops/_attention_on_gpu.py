"""How ``relative_bias_attention`` runs on a GPU: the launch of the CUDA kernel, and PyTorch's attention without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import cuda_extension
from onepeace_fast.checks import require
from onepeace_fast.ops._library import accumulation_dtype
from onepeace_fast.ops._segments import PairBias, head_slices, sample_groups

HEAD_SIZES = (32, 64, 128)
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements of 16 bits that one access of 16 bytes takes


def refusal(qkv: Tensor, modalities: int) -> str | None:
    """Why the CUDA kernel does not run on these tensors, in one line, or None."""
    if qkv.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float16 or bfloat16, got {_name(qkv.dtype)}"
    if qkv.shape[-1] not in HEAD_SIZES:
        return f"the kernel takes heads of {', '.join(map(str, HEAD_SIZES))}, got {qkv.shape[-1]}"
    if (reason := cuda_extension.unavailable_reason()) is not None:
        return reason
    if modalities > (most := cuda_extension.extension().MAX_MODALITIES):
        return f"the kernel takes at most {most} modalities, got {modalities}"
    return cuda_extension.unsupported_reason(torch.cuda.get_device_capability(qkv.device))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launch_forward(
    qkv: Tensor, cu_seqlens: Tensor, code: Tensor, is_cls: Tensor, bias: Sequence[Tensor], code_offsets: Sequence[int],
    head_scale: Tensor | None, scale: float, max_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The CUDA kernel on the current stream: out [rows, heads, head_dim] and the log-sum-exp, float32 [rows, heads]."""
    rows, _, heads, head_dim = qkv.shape
    strides = qkv.stride()
    require(
        strides[3] == 1 and not any(s % ALIGNMENT for s in strides[:3]) and qkv.data_ptr() % 16 == 0,
        lambda: (
            f"qkv: got strides {list(strides)} at an address that is {qkv.data_ptr() % 16} modulo 16, takes a last"
            f" stride of 1, others that {ALIGNMENT} divides and an address that 16 divides; call .contiguous()"
        ),
    )
    out, log_sum_exp = qkv.new_empty(rows, heads, head_dim), qkv.new_empty(rows, heads, dtype=torch.float32)
    if not rows:
        return out, log_sum_exp
    cu_seqlens, code, is_cls = cu_seqlens.contiguous(), code.contiguous(), is_cls.contiguous()
    vectors = [_readable(vector) for vector in bias]
    head_scale = None if head_scale is None else _readable(head_scale).contiguous()
    cuda_extension.extension().relative_bias_attention_forward(
        device=qkv.get_device(),
        samples=cu_seqlens.shape[1] - 1,
        modalities=cu_seqlens.shape[0],
        rows=rows,
        heads=heads,
        head_dim=head_dim,
        max_length=max_length,
        scale=scale,
        type=_name(qkv.dtype),
        qkv=qkv.data_ptr(),
        strides=strides[:3],
        cu_seqlens=cu_seqlens.data_ptr(),
        code=code.data_ptr(),
        is_cls=is_cls.data_ptr(),
        bias=[
            (vector.data_ptr(), _name(vector.dtype), *vector.stride(), vector.shape[1], offset)
            for vector, offset in zip(vectors, code_offsets, strict=True)
        ],
        head_scale=0 if head_scale is None else head_scale.data_ptr(),
        head_scale_type="float32" if head_scale is None else _name(head_scale.dtype),
        out=out.data_ptr(),
        log_sum_exp=log_sum_exp.data_ptr(),
        stream=_current_stream(qkv.device),
    )
    cuda_extension.count_launch()
    return out, log_sum_exp


def _readable(parameter: Tensor) -> Tensor:
    """The kernel reads parameters as they are, but for float64, which it does not know."""
    return parameter.float() if parameter.dtype == torch.float64 else parameter


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def attend_by_sdpa(
    qkv: Tensor, cu_seqlens: Tensor, pairs: PairBias | None, head_scale: Tensor | None, scale: float, longest: int
) -> tuple[Tensor, Tensor]:
    """PyTorch's attention with the bias built for some samples and heads at once.

    The log-sum-exp, which PyTorch does not give and the backward specification does not read, is -inf on real rows.
    """
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_zeros(rows + 1, heads, head_dim)
    log_sum_exp = qkv.new_zeros(rows + 1, heads, dtype=accumulation_dtype(qkv.dtype))
    unknown = log_sum_exp.new_full((), -torch.inf)
    # A bias whose rows begin at multiples of 16 bytes is not copied once more.
    aligned = -(-longest // ALIGNMENT) * ALIGNMENT
    for group in sample_groups(cu_seqlens, aligned):
        q, k, v = group.read(qkv).permute(2, 0, 3, 1, 4).unbind()
        index = pairs and pairs.index(group)
        visible = None if group.valid is None else group.valid[:, None, None, :]
        for some in head_slices(heads, q.shape[0], q.shape[2]):
            mask = visible
            if pairs is not None:
                mask = pairs._replace(vectors=pairs.vectors[some]).values(index)
                if visible is not None:
                    mask.masked_fill_(~visible, -torch.inf)
            attended = F.scaled_dot_product_attention(q[:, some], k[:, some], v[:, some], attn_mask=mask, scale=scale)
            if head_scale is not None:
                attended = attended * head_scale[some, None, None]
            group.scatter(out[:, some], attended.transpose(1, 2))
        group.scatter(log_sum_exp, unknown.expand(q.shape[0], q.shape[2], heads))
    return out[:rows], log_sum_exp[:rows]
