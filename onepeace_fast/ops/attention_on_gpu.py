"""How ``relative_bias_attention`` runs on a GPU: launches of the CUDA kernels, and PyTorch's attention without them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import cuda_extension
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
from onepeace_fast.checks import describe
from onepeace_fast.ops.pair_bias import Batch, hidden_keys, joined, pair_entries, pair_values
from onepeace_fast.ops.segments import Pairs, head_slices, longest_sample, sample_pairs
from onepeace_fast.structures import Needs

HEAD_SIZES = (32, 64, 96, 128)
NARROW_VALUES = 64  # that the kernels take beside keys of the largest size
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements of 16 bits that one access of 16 bytes takes


def refusal(given: AttentionInputs | AttentionSaved) -> str | None:
    """Why the CUDA kernels do not run on these tensors, in one line, or None: for both passes of a call alike."""
    dtype = key_of(given).dtype
    if dtype not in KERNEL_DTYPES:
        return f"expected float16 or bfloat16, got {_name(dtype)}"
    if (reason := _unknown_to_kernels(given)) is not None:
        return reason
    if (reason := cuda_extension.unavailable_reason()) is not None:
        return reason
    device = key_of(given).device
    modalities = max(side.cu_seqlens.shape[0] for side in (given.segments, _keys_of(given)))
    if modalities > (most := cuda_extension.extension().MAX_MODALITIES):
        return f"expected at most {most} modalities, got {modalities}"
    if (reason := cuda_extension.unsupported_reason(torch.cuda.get_device_capability(device))) is not None:
        return reason
    sizes = dict(zip(("head_dim", "value_dim"), _padded_sizes(given), strict=True))
    needed, limit = cuda_extension.extension().shared_memory(
        device=key_of(given).get_device(), **sizes, entries=[vector.shape[1] for vector in given.bias.vectors],
    )  # fmt: skip
    if needed > limit:
        return f"expected at most {limit} bytes of shared memory for a thread block, got {needed}"
    return None


def _unknown_to_kernels(given: AttentionInputs | AttentionSaved) -> str | None:
    """What the op computes and the kernels do not."""
    head_dim = key_of(given).shape[-1]
    if not 0 < head_dim <= HEAD_SIZES[-1]:
        return f"expected heads of at most {HEAD_SIZES[-1]}, got {head_dim}"
    if given.v is not None and given.v.shape[-1] > head_dim:
        return f"expected values of at most the keys' {head_dim}, got {given.v.shape[-1]}"
    return None


def key_of(given: AttentionInputs | AttentionSaved) -> Tensor:
    """The tensor that has the keys."""
    found = given.k if given.qkv is None else given.qkv
    assert found is not None  # one of them is there
    return found


def _keys_of(given: AttentionInputs | AttentionSaved) -> Segments | KeySegments:
    return given.segments if given.key_segments.cu_seqlens is None else given.key_segments


def _padded_sizes(given: AttentionInputs | AttentionSaved) -> tuple[int, int]:
    """Head sizes of keys and of values that the kernels take, none smaller than these."""
    head_dim = next(size for size in HEAD_SIZES if size >= key_of(given).shape[-1])
    is_narrow = head_dim == HEAD_SIZES[-1] and given.v is not None and given.v.shape[-1] <= NARROW_VALUES
    return head_dim, NARROW_VALUES if is_narrow else head_dim


def _padded(x: Tensor, size: int) -> Tensor:
    """Heads of a size that the kernels take; zeros add nothing to a product, and what they give is cut off."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _apart(given: AttentionInputs | AttentionSaved) -> list[Tensor]:
    """Queries, keys and values as the kernels take them: [rows or key rows, heads, one of HEAD_SIZES] each."""
    head_dim, value_dim = _padded_sizes(given)
    if given.qkv is not None:
        qkv = _padded(given.qkv, head_dim)
        _require_readable(qkv)
        return [*qkv.unbind(1)]
    q, k, v = given.q, given.k, given.v
    assert q is not None and k is not None and v is not None
    return [_readable_rows(_padded(x, size)) for x, size in ((q, head_dim), (k, head_dim), (v, value_dim))]


def launch_forward(given: AttentionInputs) -> AttentionOutputs:
    """The CUDA kernel on the current stream."""
    q, k, v = _apart(given)
    rows, heads, _ = q.shape
    out, log_sum_exp = q.new_empty(rows, heads, v.shape[-1]), q.new_empty(rows, heads, dtype=torch.float32)
    if rows:
        attention, _held = _arguments(given, q, k, v)
        with torch.cuda.device_of(q):  # a launch makes the tensors' device the current one
            attention.forward(out=out.data_ptr(), log_sum_exp=log_sum_exp.data_ptr(), stream=_current_stream(q.device))
        cuda_extension.count_launch()
    value_dim = (given.v if given.qkv is None else given.qkv).shape[-1]
    return AttentionOutputs(out if value_dim == v.shape[-1] else out[..., :value_dim].contiguous(), log_sum_exp)


def launch_backward(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    """The CUDA kernels on the current stream.

    The log-sum-exp is that of ``launch_forward``. Gradients of float64 parameters are computed in float32.
    """
    q, k, v = _apart(saved)
    grad, value_dim = saved.grad_out, (saved.v if saved.qkv is None else saved.qkv).shape[-1]
    _require_like_output(grad, q, torch.Size((*q.shape[:2], value_dim)))
    grad = _padded(grad, v.shape[-1])
    dqkv = None if saved.qkv is None else q.new_empty(q.shape[0], 3, *q.shape[1:])
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    found = _launch_backward(saved, q, k, v, grad, gradients if dqkv is None else [*dqkv.unbind(1)], needs)
    if dqkv is not None:
        head_dim = saved.qkv.shape[-1]
        return found._replace(qkv=dqkv if head_dim == q.shape[-1] else dqkv[..., :head_dim].contiguous())
    cut = zip(gradients, (saved.q, saved.k, saved.v), strict=True)
    dq, dk, dv = (gradient[..., : x.shape[-1]].contiguous() for gradient, x in cut)
    return found._replace(q=dq, k=dk, v=dv)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _launch_backward(
    saved: AttentionSaved, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, gradients: Sequence[Tensor], needs: Needs
) -> AttentionGradients:
    bias_needs, heads = needs.bias.vectors, q.shape[1]
    attention, (_plan, vectors, scales) = _arguments(saved, q, k, v)
    # Autograd hands over expanded, transposed and sliced gradients, and contiguous ones that are off 16 bytes.
    grad = _readable_rows(grad)
    log_sum_exp = saved.log_sum_exp.contiguous()
    dbias = [v.new_empty(v.shape) if need else None for v, need in zip(vectors, bias_needs, strict=True)]
    dscale = scales[0].new_empty(heads) if needs.head_scale else None
    wanted: dict[str, Any] = {
        "multiprocessors": _multiprocessors(q.device),
        "bias": [0 if gradient is None else gradient.data_ptr() for gradient in dbias],
        "head_scale": 0 if dscale is None else dscale.data_ptr(),
    }
    workspace = q.new_empty(attention.backward_workspace(**wanted), dtype=torch.uint8)
    with torch.cuda.device_of(q):
        attention.backward(
            **wanted,
            grad=grad.data_ptr(),
            grad_strides=grad.stride()[:2],
            log_sum_exp=log_sum_exp.data_ptr(),
            **{name: (x.data_ptr(), x.stride(0)) for name, x in zip("qkv", gradients, strict=True)},
            workspace=workspace.data_ptr(),
            stream=_current_stream(q.device),
        )
    cuda_extension.count_launch()
    dvectors = [
        None if gradient is None else gradient.to(vector.dtype)
        for gradient, vector in zip(dbias, saved.bias.vectors, strict=True)
    ]
    dscale = None if dscale is None else dscale.to(saved.head_scale.dtype)
    return AttentionGradients(None, None, None, None, VectorGradients(dvectors), dscale)


def _require_like_output(grad: Tensor, qkv: Tensor, shape: torch.Size) -> None:
    if not (grad.dtype == qkv.dtype and grad.device == qkv.device and grad.shape == shape):
        raise ValueError(
            f"grad: expected {_name(qkv.dtype)} {[*shape]} on {qkv.device}, like the output of the"
            f" forward pass, got {describe(grad)}"
        )


def _arguments(
    given: AttentionInputs | AttentionSaved, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Any, tuple[list[Segments], list[Tensor], list[Tensor]]]:
    """The extension's arguments, and what must live until the launch: the plan, the vectors, the head scale if any."""
    plan = [_contiguous(given.segments)]
    plan.append(plan[0] if given.key_segments.cu_seqlens is None else _contiguous(given.key_segments))
    vectors = [_readable(vector) for vector in given.bias.vectors]
    scales = [] if given.head_scale is None else [_readable(given.head_scale).contiguous()]
    attention = cuda_extension.extension().RelativeBiasAttention(
        device=q.get_device(),
        samples=plan[0].cu_seqlens.shape[1] - 1,
        heads=q.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        scale=given.scale,
        type=_name(q.dtype),
        **{name: (x.data_ptr(), *x.stride()[:2]) for name, x in zip("qkv", (q, k, v), strict=True)},
        queries=_addresses(plan[0]),
        keys=_addresses(plan[1]),
        bias=[
            (vector.data_ptr(), _name(vector.dtype), *vector.stride(), vector.shape[1], offset)
            for vector, offset in zip(vectors, given.bias.code_offsets, strict=True)
        ],
        head_scale=scales[0].data_ptr() if scales else 0,
        head_scale_type=_name(scales[0].dtype) if scales else "float32",
    )
    return attention, (plan, vectors, scales)


def _contiguous(segments: Segments | KeySegments) -> Segments:
    return Segments._make(x.contiguous() if isinstance(x, Tensor) else x for x in segments)


def _addresses(segments: Segments) -> tuple[int, ...]:
    cu_seqlens, _, code, is_cls, max_length, order = segments
    addresses = [0 if x is None else x.data_ptr() for x in (cu_seqlens, code, is_cls, order)]
    return code.shape[0], cu_seqlens.shape[0], max_length, *addresses


def _readable_rows(x: Tensor) -> Tensor:
    """A copy where rows cannot be read 16 bytes at a time."""
    return x if _reads_16_bytes(x) else x.clone(memory_format=torch.contiguous_format)


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


def attend_by_sdpa(
    batch: Batch, heads_of: Callable[[Pairs], Sequence[Tensor]], bias: BiasVectors, head_scale: Tensor | None,
    scale: float, outputs: AttentionOutputs,
) -> None:  # fmt: skip
    """PyTorch's attention with the bias built for some samples and heads at once, into rows of which one is spare.

    The log-sum-exp, which PyTorch does not give and the backward reference does not read, is -inf on real rows.
    """
    out, log_sum_exp = outputs
    unknown = log_sum_exp.new_full((), -torch.inf)
    heads = out.shape[1]
    segments, keys = (
        # A bias whose rows begin at multiples of 16 bytes is not copied once more.
        side._replace(max_length=-(-longest_sample(side) // ALIGNMENT) * ALIGNMENT)
        for side in (batch.segments, batch.keys)
    )
    is_self = batch.keys is batch.segments
    entries = pair_entries(bias, batch.segments, batch.keys)
    vectors = joined(bias.vectors, out.dtype) if entries is not None else None
    for pairs in sample_pairs(segments, None if is_self else keys):
        q, k, v = heads_of(pairs)
        index = None if entries is None else entries.of(pairs)
        hidden = hidden_keys(pairs, batch)
        visible = None if hidden is None else ~hidden[:, None]
        sees = None if is_self or hidden is None else ~hidden.all(-1).expand(-1, q.shape[2])[:, None, :, None]
        for some in head_slices(heads, q.shape[0], q.shape[2], k.shape[2]):
            mask = visible
            if vectors is not None:
                mask = pair_values(vectors[some], index)
                if visible is not None:
                    mask.masked_fill_(~visible, -torch.inf)
            attended = F.scaled_dot_product_attention(q[:, some], k[:, some], v[:, some], attn_mask=mask, scale=scale)
            if head_scale is not None:
                attended = attended * head_scale[some, None, None]
            if sees is not None:
                attended = attended.masked_fill(~sees, 0)
            pairs.queries.scatter(out[:, some], attended.transpose(1, 2))
        pairs.queries.scatter(log_sum_exp, unknown.expand(q.shape[0], q.shape[2], heads))
