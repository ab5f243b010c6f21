"""How ``relative_bias_attention`` runs on a GPU: launches of the CUDA kernels, and PyTorch's attention without them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import cuda_extension
from onepeace_fast.checks import describe
from onepeace_fast.ops.packed_rows import accumulation_dtype
from onepeace_fast.ops.pair_bias import PairEntries, joined, pair_values
from onepeace_fast.ops.segments import head_slices, longest_sample, sample_groups
from onepeace_fast.structures import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputs,
    AttentionSaved,
    Needs,
    VectorGradients,
)

HEAD_SIZES = (32, 64, 128)
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements of 16 bits that one access of 16 bytes takes


def refusal(qkv: Tensor, modalities: int, bias: Sequence[Tensor]) -> str | None:
    """Why the CUDA kernels do not run on these tensors, in one line, or None: for both passes of a call alike."""
    if qkv.dtype not in KERNEL_DTYPES:
        return f"expected float16 or bfloat16, got {_name(qkv.dtype)}"
    if qkv.shape[-1] not in HEAD_SIZES:
        return f"expected heads of {', '.join(map(str, HEAD_SIZES))}, got {qkv.shape[-1]}"
    if (reason := cuda_extension.unavailable_reason()) is not None:
        return reason
    if modalities > (most := cuda_extension.extension().MAX_MODALITIES):
        return f"expected at most {most} modalities, got {modalities}"
    if (reason := cuda_extension.unsupported_reason(torch.cuda.get_device_capability(qkv.device))) is not None:
        return reason
    needed, limit = cuda_extension.extension().shared_memory(
        device=qkv.get_device(), head_dim=qkv.shape[-1], entries=[vector.shape[1] for vector in bias]
    )
    if needed > limit:
        return f"expected at most {limit} bytes of shared memory for a thread block, got {needed}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launch_forward(given: AttentionInputs) -> AttentionOutputs:
    """The CUDA kernel on the current stream."""
    qkv = given.qkv
    rows, _, heads, head_dim = qkv.shape
    _require_readable(qkv)
    out, log_sum_exp = qkv.new_empty(rows, heads, head_dim), qkv.new_empty(rows, heads, dtype=torch.float32)
    if not rows:
        return AttentionOutputs(out, log_sum_exp)
    attention, _held = _arguments(given)
    with torch.cuda.device_of(qkv):  # a launch makes the tensors' device the current one
        attention.forward(out=out.data_ptr(), log_sum_exp=log_sum_exp.data_ptr(), stream=_current_stream(qkv.device))
    cuda_extension.count_launch()
    return AttentionOutputs(out, log_sum_exp)


def launch_backward(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    """The CUDA kernels on the current stream.

    The log-sum-exp is that of ``launch_forward``. Gradients of float64 parameters are computed in float32.
    """
    qkv, grad, bias_needs = saved.qkv, saved.grad_out, needs.bias.vectors
    rows, _, heads, head_dim = qkv.shape
    _require_readable(qkv)
    if not (grad.dtype == qkv.dtype and grad.device == qkv.device and grad.shape == (rows, heads, head_dim)):
        raise ValueError(
            f"grad: expected {_name(qkv.dtype)} {[rows, heads, head_dim]} on {qkv.device}, like the output of the"
            f" forward pass, got {describe(grad)}"
        )
    attention, (_plan, vectors, scales) = _arguments(saved)
    # Autograd hands over expanded, transposed and sliced gradients, and contiguous ones that are off 16 bytes.
    grad = grad if _reads_16_bytes(grad) else grad.clone(memory_format=torch.contiguous_format)
    log_sum_exp = saved.log_sum_exp.contiguous()
    dqkv = qkv.new_empty(rows, 3, heads, head_dim)
    dbias = [v.new_empty(v.shape) if need else None for v, need in zip(vectors, bias_needs, strict=True)]
    dscale = scales[0].new_empty(heads) if needs.head_scale else None
    wanted: dict[str, Any] = {
        "multiprocessors": _multiprocessors(qkv.device),
        "bias": [0 if gradient is None else gradient.data_ptr() for gradient in dbias],
        "head_scale": 0 if dscale is None else dscale.data_ptr(),
    }
    workspace = qkv.new_empty(attention.backward_workspace(**wanted), dtype=torch.uint8)
    with torch.cuda.device_of(qkv):
        attention.backward(
            **wanted,
            grad=grad.data_ptr(),
            grad_strides=grad.stride()[:2],
            log_sum_exp=log_sum_exp.data_ptr(),
            qkv=dqkv.data_ptr(),
            workspace=workspace.data_ptr(),
            stream=_current_stream(qkv.device),
        )
    cuda_extension.count_launch()
    gradients = [
        None if gradient is None else gradient.to(vector.dtype)
        for gradient, vector in zip(dbias, saved.bias.vectors, strict=True)
    ]
    dscale = None if dscale is None else dscale.to(saved.head_scale.dtype)
    return AttentionGradients(dqkv, VectorGradients(gradients), dscale)


def _arguments(
    given: AttentionInputs | AttentionSaved,
) -> tuple[Any, tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """The extension's arguments, and what must live until the launch: the plan, the vectors, the head scale if any."""
    qkv, segments = given.qkv, given.segments
    rows, _, heads, head_dim = qkv.shape
    plan = [segments.cu_seqlens.contiguous(), segments.code.contiguous(), segments.is_cls.contiguous()]
    vectors = [_readable(vector) for vector in given.bias.vectors]
    scales = [] if given.head_scale is None else [_readable(given.head_scale).contiguous()]
    attention = cuda_extension.extension().RelativeBiasAttention(
        device=qkv.get_device(),
        samples=plan[0].shape[1] - 1,
        modalities=plan[0].shape[0],
        rows=rows,
        heads=heads,
        head_dim=head_dim,
        max_length=segments.max_length,
        scale=given.scale,
        type=_name(qkv.dtype),
        qkv=qkv.data_ptr(),
        strides=qkv.stride()[:3],
        cu_seqlens=plan[0].data_ptr(),
        code=plan[1].data_ptr(),
        is_cls=plan[2].data_ptr(),
        bias=[
            (vector.data_ptr(), _name(vector.dtype), *vector.stride(), vector.shape[1], offset)
            for vector, offset in zip(vectors, given.bias.code_offsets, strict=True)
        ],
        head_scale=scales[0].data_ptr() if scales else 0,
        head_scale_type=_name(scales[0].dtype) if scales else "float32",
    )
    return attention, (plan, vectors, scales)


def _require_readable(qkv: Tensor) -> None:
    if not _reads_16_bytes(qkv):
        raise ValueError(
            f"qkv: expected a last stride of 1, others that {ALIGNMENT} divides and an address that 16 divides, got"
            f" strides {list(qkv.stride())} at an address that is {qkv.data_ptr() % 16} modulo 16; call"
            " .clone(memory_format=torch.contiguous_format)"
        )


def _reads_16_bytes(x: Tensor) -> bool:
    """Whether every row of the last dimension can be read 16 bytes at a time."""
    *strides, last = x.stride()
    return last == 1 and not any(stride % ALIGNMENT for stride in strides) and x.data_ptr() % 16 == 0


def _readable(parameter: Tensor) -> Tensor:
    """The kernels read parameters as they are, but for float64, which they do not know."""
    return parameter.float() if parameter.dtype == torch.float64 else parameter


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend_by_sdpa(given: AttentionInputs, entries: PairEntries | None) -> AttentionOutputs:
    """PyTorch's attention with the bias built for some samples and heads at once.

    The log-sum-exp, which PyTorch does not give and the backward reference does not read, is -inf on real rows.
    """
    qkv, head_scale = given.qkv, given.head_scale
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_zeros(rows + 1, heads, head_dim)
    log_sum_exp = qkv.new_zeros(rows + 1, heads, dtype=accumulation_dtype(qkv.dtype))
    unknown = log_sum_exp.new_full((), -torch.inf)
    # A bias whose rows begin at multiples of 16 bytes is not copied once more.
    aligned = -(-longest_sample(given.segments) // ALIGNMENT) * ALIGNMENT
    vectors = joined(given.bias.vectors, qkv.dtype) if entries is not None else None
    for group in sample_groups(given.segments._replace(max_length=aligned)):
        q, k, v = group.read(qkv).permute(2, 0, 3, 1, 4).unbind()
        index = None if entries is None else entries.of(group)
        visible = None if group.valid is None else group.valid[:, None, None, :]
        for some in head_slices(heads, q.shape[0], q.shape[2]):
            mask = visible
            if vectors is not None:
                mask = pair_values(vectors[some], index)
                if visible is not None:
                    mask.masked_fill_(~visible, -torch.inf)
            attended = F.scaled_dot_product_attention(
                q[:, some], k[:, some], v[:, some], attn_mask=mask, scale=given.scale
            )
            if head_scale is not None:
                attended = attended * head_scale[some, None, None]
            group.scatter(out[:, some], attended.transpose(1, 2))
        group.scatter(log_sum_exp, unknown.expand(q.shape[0], q.shape[2], heads))
    return AttentionOutputs(out[:rows], log_sum_exp[:rows])
