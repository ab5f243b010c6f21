"""Packed attention as plain PyTorch has it: sample by sample, a dense bias, autograd; on any device, in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention(
    qkv: Tensor, *, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor, bias: Sequence[Tensor] = (),
    code_offsets: Sequence[int] = (), head_scale: Tensor | None = None, max_length: int = 0,
) -> Tensor:  # fmt: skip
    """The arguments and the result are those of ``relative_bias_attention``; the host reads ``cu_seqlens``."""
    out = 0 * qkv[:, 0]
    wide = torch.promote_types(torch.float32, qkv.dtype)
    for sample in range(cu_seqlens.shape[1] - 1):
        bounds = cu_seqlens[:, sample : sample + 2].tolist()
        rows = torch.cat([torch.arange(*segment, device=qkv.device) for segment in bounds])
        q, k, v = qkv[rows].permute(1, 2, 0, 3)
        score = q.shape[-1] ** -0.5 * q @ k.mT
        before = 0
        for (start, stop), vector, offset in zip(bounds, bias, code_offsets, strict=bool(bias)):
            index = entries(code[start:stop], is_cls[start:stop], offset, vector.shape[1])
            after = len(rows) - before - len(index)
            score = score + F.pad(vector[:, index].to(qkv.dtype), (before, after, before, after))
            before += len(index)
        attended = score.softmax(-1, dtype=wide).to(v.dtype) @ v
        scaled = attended if head_scale is None else head_scale.to(v.dtype)[:, None, None] * attended
        out[rows] = scaled.transpose(0, 1)
    return out


def entries(code: Tensor, is_cls: Tensor, offset: int, size: int) -> Tensor:
    """Entry of a vector of ``size`` for every query and key: by the codes' difference; the last three are those of CLS.

    They are CLS as query, CLS as key, and both.
    """
    index = code[:, None].long() - code.long() + offset
    index[is_cls] = size - 3
    index[:, is_cls] = size - 2
    index[is_cls[:, None] & is_cls] = size - 1
    return index
