"""Self-attention over packed segments with a relative position bias in code form.

For every sample, over all of its tokens of all modalities, and every head h:

    score[i, j] = scale * q_i . k_j + bias[h, i, j],   out_i = c_h * sum_j softmax_j(score[i, :]) v_j

bias is zero between modalities; within modality m it is entry ``code_i - code_j + code_offsets[m]`` of the vector
``bias[m][h]``, whose last three entries are those of CLS as query, CLS as key, and both (ONE-PEACE, arXiv 2305.11172;
head scale c: NormFormer, arXiv 2110.09456). No [length, length] tensor exists outside this op.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_tensor, require_vector
from onepeace_fast.ops._library import accumulation_dtype, define, no_gradient, register_gradient
from onepeace_fast.ops.layer_norm import only_needed
from onepeace_fast.relative_position import CLS_ENTRIES

PAIRS_OF_A_GROUP = 2**13


class Group(NamedTuple):
    """N samples side by side: the rows of their tokens, int64 [N, L], or one slice of rows where N is 1.

    ``valid`` bool [N, L] marks real tokens, None where all are; padding is written to a spare row.
    """

    rows: Tensor | slice
    valid: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding repeats row 0."""
        return x[self.rows].unsqueeze(0) if isinstance(self.rows, slice) else x[self.rows]

    def read(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding is zero, so that a NaN in row 0 stays in its own sample."""
        tokens = self.gather(x)
        if self.valid is None:
            return tokens
        return tokens.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (x.dim() - 1)), 0)

    def scatter(self, x: Tensor, value: Tensor) -> None:
        """Store [N, L, ...] at its rows of x, whose last row is spare."""
        if isinstance(self.rows, slice):
            x[self.rows] = value[0]
        else:
            rows = self.rows if self.valid is None else torch.where(self.valid, self.rows, x.shape[0] - 1)
            x[rows] = value.to(x.dtype)


def sample_groups(cu_seqlens: Tensor, max_length: int) -> Iterator[Group]:
    """Samples to compute at once: on a CPU by length, elsewhere all, at ``max_length``, so that nothing is read."""
    starts, lengths = cu_seqlens[:, :-1].long(), cu_seqlens.diff(dim=1).long()
    totals = lengths.sum(0)
    if cu_seqlens.shape[1] == 1:
        return
    if cu_seqlens.device.type != "cpu":
        yield Group(*_padded_rows(starts, lengths, max_length or int(totals.max())))
        return
    host_starts, host_lengths, host_totals = starts.t().tolist(), lengths.t().tolist(), totals.tolist()
    for samples in _by_length(host_totals):
        first, longest = samples[0], host_totals[samples[-1]]
        parts = [(start, start + n) for start, n in zip(host_starts[first], host_lengths[first], strict=True) if n]
        if len(samples) == 1 and len(parts) == 1:
            yield Group(slice(*parts[0]), None)
        else:
            rows, valid = _padded_rows(starts[:, samples], lengths[:, samples], longest)
            yield Group(rows, None if host_totals[first] == longest else valid)


def _by_length(totals: Sequence[int]) -> Iterator[list[int]]:
    """Samples in groups of similar length; a group has so few pairs that padding costs less than a step of Python."""
    group: list[int] = []
    for sample in sorted((s for s, total in enumerate(totals) if total), key=totals.__getitem__):
        if group and (len(group) + 1) * totals[sample] ** 2 > PAIRS_OF_A_GROUP:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _padded_rows(starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Rows of each sample's tokens, its modalities one after another, and which are real: [samples, longest] each."""
    place = torch.arange(longest, device=starts.device)
    before = lengths.cumsum(0) - lengths
    rows = torch.zeros(lengths.shape[1], longest, dtype=torch.int64, device=starts.device)
    for start, length, first in zip(starts, lengths, before, strict=True):
        within = place - first[:, None]
        rows = torch.where((within >= 0) & (within < length[:, None]), start[:, None] + within, rows)
    return rows, place < lengths.sum(0)[:, None]


class PairBias(NamedTuple):
    """All modalities' vectors side by side, [heads, entries], a zero last, and each row's way into them, [rows]."""

    vectors: Tensor
    starts: list[int]
    modality: Tensor
    is_cls: Tensor
    code: Tensor
    equal_code_entry: Tensor
    cls_entry: Tensor

    def index(self, group: Group) -> Tensor:
        """Entry of every pair of tokens, queries before keys: int64 [N, L, L]."""
        code, is_cls, modality = (group.gather(x) for x in (self.code, self.is_cls, self.modality))
        entry, cls_entry = group.gather(self.equal_code_entry), group.gather(self.cls_entry)
        index = (code + entry).unsqueeze(-1) - code.unsqueeze(-2)
        as_query = torch.where(is_cls, cls_entry + 2, cls_entry)
        index = torch.where(is_cls.unsqueeze(-2), (cls_entry + 1).unsqueeze(-1), index)
        index = torch.where(is_cls.unsqueeze(-1), as_query.unsqueeze(-2), index)
        if len(self.starts) > 2:
            index = torch.where(modality.unsqueeze(-1) == modality.unsqueeze(-2), index, self.starts[-1])
        return index

    def values(self, index: Tensor) -> Tensor:
        """The bias of every pair: [N, heads, L, L]."""
        heads = self.vectors.shape[0]
        return self.vectors.index_select(1, index.flatten()).view(heads, *index.shape).movedim(0, 1)


def pair_bias(
    bias: Sequence[Tensor],
    modality: Tensor,
    code: Tensor,
    is_cls: Tensor,
    code_offsets: Sequence[int],
    dtype: torch.dtype,
) -> PairBias | None:
    """Join the vectors of all modalities so that one index reaches any of them; None without a bias."""
    if not bias:
        return None
    starts = [0]
    for vector in bias:
        starts.append(starts[-1] + vector.shape[1])
    if code.device.type == "cpu":
        _check_codes(bias, modality, code, is_cls, code_offsets)
    zero = bias[0].new_zeros(bias[0].shape[0], 1)
    # Inert rows have modality G: a last entry of no meaning keeps their look-up in range.
    equal = [start + offset for start, offset in zip(starts[:-1], code_offsets, strict=True)]
    cls = [stop - CLS_ENTRIES for stop in starts[1:]]
    group = modality.long()
    look_up = [torch.tensor([*entries, 0], device=modality.device)[group] for entries in (equal, cls)]
    return PairBias(torch.cat([*bias, zero], dim=1).to(dtype), starts, modality, is_cls, code.long(), *look_up)


def _check_codes(
    bias: Sequence[Tensor], modality: Tensor, code: Tensor, is_cls: Tensor, code_offsets: Sequence[int]
) -> None:
    """Raise where two codes of a modality differ by more than its vector covers; the host can read them on a CPU."""
    for m, (vector, offset) in enumerate(zip(bias, code_offsets, strict=True)):
        codes = code[(modality == m) & ~is_cls]
        span = int(codes.max() - codes.min()) if codes.numel() else 0
        covered = min(offset, vector.shape[1] - CLS_ENTRIES - 1 - offset)
        require(
            span <= covered,
            lambda m=m, span=span, covered=covered: (
                f"code: got codes of modality {m} that differ by {span}, takes at most {covered}, what bias[{m}] covers"
            ),
        )


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None, group: Group, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) over the real keys [N, heads, L, L], and the scores' log-sum-exp [N, heads, L]."""
    score = torch.matmul(q * scale, k.transpose(-1, -2))
    if bias is not None:
        score += bias
    if group.valid is not None:
        # Not minus infinity: a sample without tokens would be 0 / 0.
        score.masked_fill_(~group.valid[:, None, None, :], torch.finfo(score.dtype).min)
    p = score.softmax(-1)
    # The largest probability is exp(largest score - log-sum-exp).
    return p, score.amax(-1) - p.amax(-1).log()


def _heads(qkv: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the rows, each [N, heads, L, head_dim], in at least float32."""
    return group.read(qkv).to(accumulation_dtype(qkv.dtype)).permute(2, 0, 3, 1, 4).unbind()


def relative_bias_attention_specification(
    qkv: Tensor, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor, bias: Sequence[Tensor],
    code_offsets: Sequence[int], head_scale: Tensor | None, scale: float, max_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns out [rows, heads, head_dim] in qkv's dtype and the scores' log-sum-exp [rows, heads]."""
    dtype = accumulation_dtype(qkv.dtype)
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_zeros(rows + 1, heads, head_dim)
    log_sum_exp = qkv.new_zeros(rows + 1, heads, dtype=dtype)
    pairs = pair_bias(bias, modality, code, is_cls, code_offsets, dtype)
    for group in sample_groups(cu_seqlens, max_length):
        q, k, v = _heads(qkv, group)
        p, total = probabilities(q, k, pairs and pairs.values(pairs.index(group)), group, scale)
        attended = torch.matmul(p, v)
        if head_scale is not None:
            attended = attended * head_scale.to(dtype)[:, None, None]
        group.scatter(out, attended.transpose(1, 2))
        group.scatter(log_sum_exp, total.transpose(1, 2))
    return out[:rows], log_sum_exp[:rows]


def relative_bias_attention_backward_specification(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, modality: Tensor, code: Tensor, is_cls: Tensor,
    bias: Sequence[Tensor], code_offsets: Sequence[int], head_scale: Tensor | None, log_sum_exp: Tensor, scale: float,
    max_length: int, bias_needs: Sequence[bool], head_scale_need: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """With p the probabilities, o = p v and do = c grad:

    dv = p^T do,  dp = do v^T,  ds = p (dp - sum_j p dp),  dq = scale ds k,  dk = scale ds^T q,
    dc = sum(grad o),  dbias[entry] = sum of ds over the pairs that take the entry.

    Returns dqkv, the vectors' gradients and the head scale's, empty where none is needed. A kernel reads
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
        p, _ = probabilities(q, k, pairs and pairs.values(index), group, scale)
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


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum [heads, pairs] into [heads, size] by the pairs' index, in the same order every time on every device."""
    if values.device.type == "cpu":
        return values.new_zeros(values.shape[0], size).scatter_add_(1, index.expand_as(values), values)
    # On a GPU scatter_add is atomic; an accumulating index_put sorts first.
    return values.new_zeros(size, values.shape[0]).index_put_((index,), values.t(), accumulate=True).t()


def _fake(qkv, cu_seqlens, modality, code, is_cls, bias, code_offsets, head_scale, scale, max_length):
    out = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
    return out, qkv.new_empty(qkv.shape[:1] + qkv.shape[2:3], dtype=accumulation_dtype(qkv.dtype))


def _fake_backward(
    grad, qkv, cu_seqlens, modality, code, is_cls, bias, code_offsets, head_scale, log_sum_exp, scale, max_length,
    bias_needs, head_scale_need,
):  # fmt: skip
    gradients = [torch.empty_like(b) if n else b.new_empty(0) for b, n in zip(bias, bias_needs, strict=True)]
    dscale = torch.empty_like(head_scale) if head_scale_need else qkv.new_empty(0)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), gradients, dscale


_PLAN = "Tensor cu_seqlens, Tensor modality, Tensor code, Tensor is_cls, Tensor[] bias, SymInt[] code_offsets"
_op = define(
    "relative_bias_attention",
    f"(Tensor qkv, {_PLAN}, Tensor? head_scale, float scale, SymInt max_length) -> (Tensor, Tensor)",
    relative_bias_attention_specification,
    _fake,
)
_backward_op = define(
    "relative_bias_attention_backward",
    f"(Tensor grad, Tensor qkv, {_PLAN}, Tensor? head_scale, Tensor log_sum_exp, float scale, SymInt max_length,"
    " bool[] bias_needs, bool head_scale_need) -> (Tensor, Tensor[], Tensor)",
    relative_bias_attention_backward_specification,
    _fake_backward,
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
        max_length: longest sample, where the host knows it.

    Returns:
        [rows, heads, head_dim] in qkv's dtype; scores and softmax are float32 for half precision. Inert rows are zero.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
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
