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
    VectorGradients,
)
from onepeace_fast.checks import describe
from onepeace_fast.ops.pair_bias import Batch, hidden_keys, joined, pair_entries, pair_values
from onepeace_fast.ops.segments import Pairs, head_slices, is_shared, longest_sample, sample_pairs
from onepeace_fast.structures import Needs

HEAD_SIZES = (32, 64, 96, 128)
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements of 16 bits that one access of 16 bytes takes


def refusal(given: AttentionInputs | AttentionSaved) -> str | None:
    """Why the CUDA kernels do not run on these tensors, in one line, or None: for both passes of a call alike."""
    dtype, head_dim = key_of(given).dtype, key_of(given).shape[-1]
    if dtype not in KERNEL_DTYPES:
        return f"expected float16 or bfloat16, got {_name(dtype)}"
    if (reason := _unknown_to_kernels(given)) is not None:
        return reason
    if (reason := cuda_extension.unavailable_reason()) is not None:
        return reason
    modalities, device = given.segments.cu_seqlens.shape[0], key_of(given).device
    if modalities > (most := cuda_extension.extension().MAX_MODALITIES):
        return f"expected at most {most} modalities, got {modalities}"
    if (reason := cuda_extension.unsupported_reason(torch.cuda.get_device_capability(device))) is not None:
        return reason
    needed, limit = cuda_extension.extension().shared_memory(
        device=key_of(given).get_device(), head_dim=_padded_size(head_dim),
        entries=[vector.shape[1] for vector in given.bias.vectors],
    )  # fmt: skip
    if needed > limit:
        return f"expected at most {limit} bytes of shared memory for a thread block, got {needed}"
    return None


def _unknown_to_kernels(given: AttentionInputs | AttentionSaved) -> str | None:
    """What the op computes and the kernels do not."""
    head_dim = key_of(given).shape[-1]
    if given.key_segments.cu_seqlens is not None:
        return "expected keys of the queries' own tokens, got keys of others"
    if given.segments.order is not None:
        return "expected no order, got one"
    if is_shared(given.bias, given.segments, given.segments):
        return f"expected a bias for each of {given.segments.cu_seqlens.shape[0]} modalities, got one for all"
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


def _padded_size(head_dim: int) -> int:
    return next(size for size in HEAD_SIZES if size >= head_dim)


def _padded(x: Tensor) -> Tensor:
    """Heads of a size that the kernels take; zeros add nothing to a product, and what they give is cut off."""
    size = _padded_size(x.shape[-1])
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _joined(given: AttentionInputs | AttentionSaved) -> Tensor:
    """Queries, keys and values as the kernels take them: [rows, 3, heads, one of HEAD_SIZES]."""
    if given.qkv is not None:
        return _padded(given.qkv)
    q, k, v = given.q, given.k, given.v
    assert q is not None and k is not None and v is not None
    return torch.stack([_padded(q), _padded(k), F.pad(v, (0, _padded_size(k.shape[-1]) - v.shape[-1]))], 1)


def launch_forward(given: AttentionInputs) -> AttentionOutputs:
    """The CUDA kernel on the current stream."""
    value_dim = (given.v if given.qkv is None else given.qkv).shape[-1]
    given = given._replace(qkv=_joined(given), q=None, k=None, v=None)
    found = _launch_forward(given)
    return found if found.out.shape[-1] == value_dim else found._replace(out=found.out[..., :value_dim].contiguous())


def launch_backward(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    """The CUDA kernels on the current stream.

    The log-sum-exp is that of ``launch_forward``. Gradients of float64 parameters are computed in float32.
    """
    joined_qkv, grad = _joined(saved), saved.grad_out
    shape = torch.Size(
        (*key_of(saved).shape[:1], *key_of(saved).shape[-2:-1], (saved.v if saved.qkv is None else saved.qkv).shape[-1])
    )
    _require_like_output(grad, joined_qkv, shape)
    size = joined_qkv.shape[-1]
    if shape[-1] != size:
        grad = F.pad(grad, (0, size - shape[-1]))
    found = _launch_backward(saved._replace(qkv=joined_qkv, q=None, k=None, v=None, grad_out=grad), needs)
    dqkv = found.qkv
    assert dqkv is not None
    if saved.qkv is not None:
        head_dim = saved.qkv.shape[-1]
        return found if head_dim == size else found._replace(qkv=dqkv[..., :head_dim].contiguous())
    apart = zip(dqkv.unbind(1), (saved.q, saved.k, saved.v), strict=True)
    dq, dk, dv = (gradient[..., : x.shape[-1]].contiguous() for gradient, x in apart)
    return found._replace(qkv=None, q=dq, k=dk, v=dv)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _launch_forward(given: AttentionInputs) -> AttentionOutputs:
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


def _launch_backward(saved: AttentionSaved, needs: Needs) -> AttentionGradients:
    qkv, grad, bias_needs = saved.qkv, saved.grad_out, needs.bias.vectors
    rows, _, heads, head_dim = qkv.shape
    _require_readable(qkv)
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
    return AttentionGradients(dqkv, None, None, None, VectorGradients(gradients), dscale)


def _require_like_output(grad: Tensor, qkv: Tensor, shape: torch.Size) -> None:
    if not (grad.dtype == qkv.dtype and grad.device == qkv.device and grad.shape == shape):
        raise ValueError(
            f"grad: expected {_name(qkv.dtype)} {[*shape]} on {qkv.device}, like the output of the"
            f" forward pass, got {describe(grad)}"
        )


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
