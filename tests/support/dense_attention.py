"""Packed attention as plain PyTorch has it: sample by sample, a dense bias, autograd; on any device, in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.ops._segments import Group, pair_bias


def dense_attention(
    qkv: Tensor, *, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor, bias: Sequence[Tensor] = (),
    code_offsets: Sequence[int] = (), head_scale: Tensor | None = None, max_length: int = 0,
) -> Tensor:  # fmt: skip
    """The arguments and the result are those of ``relative_bias_attention``; the host reads ``cu_seqlens``."""
    out = 0 * qkv[:, 0]
    wide = torch.promote_types(torch.float32, qkv.dtype)
    pairs = pair_bias(bias, modality, code, is_cls, code_offsets, bias[0].dtype if bias else wide)
    for sample in range(cu_seqlens.shape[1] - 1):
        bounds = cu_seqlens[:, sample : sample + 2].tolist()
        rows = torch.cat([torch.arange(*segment, device=qkv.device) for segment in bounds])
        q, k, v = qkv[rows].permute(1, 2, 0, 3)
        score = q.shape[-1] ** -0.5 * q @ k.mT
        if pairs is not None:
            score = score + pairs.values(pairs.index(Group(rows[None], None)))[0].to(qkv.dtype)
        attended = score.softmax(-1, dtype=wide).to(v.dtype) @ v
        scaled = attended if head_scale is None else head_scale.to(v.dtype)[:, None, None] * attended
        out[rows] = scaled.transpose(0, 1)
    return out
