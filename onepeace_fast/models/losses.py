"""The losses of ONE-PEACE's two pretraining tasks (arXiv 2305.11172, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.routing import compact_index

MASK_LOGIT_SCALE = 2.5
BLOCK_LOGITS = 1 << 22  # of the contrast, held at once; 16 MiB in float32


def smoothed_nll(log_probabilities: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean negative log-likelihood of ``target`` int64 [rows] under floating point [rows, classes]: a scalar.

    The label smoothing of probability ``smoothing`` is spread evenly over the other classes.
    """
    nll = -log_probabilities.gather(1, target[:, None]).squeeze(1)
    if smoothing:
        share = smoothing / max(log_probabilities.shape[1] - 1, 1)
        nll = (1.0 - smoothing - share) * nll - share * log_probabilities.sum(1)
    return nll.mean()


def log_softmax(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, in at least float32."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(torch.float32, logits.dtype))


def gather_without_gradient(local: Tensor, counts: Sequence[int] = ()) -> Tensor:
    """Rows of all ranks, detached, in the order of the ranks; ``counts`` are theirs where they may differ."""
    local = local.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return local
    if counts:  # a collective takes equal sizes
        local = F.pad(local, (0, 0, 0, max(counts) - len(local)))
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local.contiguous())
    return torch.cat([x[:count] for x, count in zip(gathered, counts, strict=True)] if counts else gathered)


class _Contrast(torch.autograd.Function):
    """One direction of the contrast, block by block of query rows, with its gradients taken in the forward pass."""

    @staticmethod
    def forward(
        query: Tensor, scale: Tensor, keys: Tensor, first: int, trained: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean loss, how many rows find their key first, and the gradients of query and scale, not scaled yet."""
        wide, rows = torch.promote_types(torch.float32, query.dtype), query.shape[0]
        with torch.autocast(query.device.type, enabled=False):
            query, scale, keys = query.to(wide), scale.to(wide), keys.to(wide)
            scaled, losses, gradient = scale * query, query.new_empty(rows, 1), torch.zeros_like(query)
            found = query.new_empty((rows, 1), dtype=torch.bool)
            blocks = _blocks_of_rows(rows, keys.shape[0])
            # One for all blocks: where each has its own, an allocator's heap breaks into pieces that fit no other.
            memory = query.new_empty(blocks[0][1], keys.shape[0])
            for place, count in blocks:
                block = slice(place, place + count)
                target = torch.arange(count, device=query.device)[:, None] + (first + place)
                logits = memory[:count].addmm_(scaled[block], keys.t(), beta=0)
                best = logits.argmax(1, keepdim=True)
                found[block] = best == target
                own = logits.gather(1, target) - (highest := logits.gather(1, best))
                # Without its own key, since beside it the others of a row that is sure would be rounded away.
                others = logits.sub_(highest).exp_().scatter_(1, target, 0.0).sum(1, keepdim=True)
                losses[block] = (others + own.expm1()).log1p() - own
                if trained:
                    gradient[block] = (logits.scatter_(1, target, -others) @ keys) / (others + own.exp())
            return losses.mean(), found.float().sum(), gradient * (scale / rows), (query * gradient).sum() / rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, scale, *own = ctx.saved_tensors
        return (*(_Once.apply(gradients[0] * one, x) for one, x in zip(own, (query, scale), strict=True)),
                None, None, None)  # fmt: skip


class _Once(torch.autograd.Function):
    """A gradient in the shape and dtype of its input, on which a second derivative would depend unseen."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.to(x.dtype).view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "contrastive_loss: expected a first derivative, got a request for its second; write it in plain PyTorch"
        )


def _blocks_of_rows(rows: int, keys: int) -> list[tuple[int, int]]:
    """Blocks of at most ``BLOCK_LOGITS`` logits: the first row of each, and how many it has."""
    if rows * keys <= BLOCK_LOGITS:  # apart, since torch.compile ties a loop to these very sizes
        return [(0, rows)]
    step = max(1, BLOCK_LOGITS // keys)
    return [(place, min(step, rows - place)) for place in range(0, rows, step)]


def contrastive_loss(
    a: Tensor, b: Tensor, scale: Tensor, *, counts: Sequence[int] = (), smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric contrast of L2-normalised [rows, dim] against the detached rows of all ranks.

    ``scale`` is the factor of the similarities, a scalar such as ``OnePeacePretrain.logit_scale_exp`` gives. All ranks
    must have equally many rows, unless ``counts`` says how many each has: then the mean over ranks is that over all
    rows. The label's ``smoothing`` is spread over all keys. The logits are made in blocks and never held; they are in
    at least float32, under autocast too. There is no second derivative.

    Returns the mean of both directions, in at least float32, and how many rows of a and of b find their own partner
    first, as float32 scalars on the device.

    Raises:
        ValueError: a and b of different shapes.
    """
    require(a.dim() == 2 and a.shape == b.shape,
            lambda: f"a, b: expected [rows, dim] of equal sizes, got {list(a.shape)} and {list(b.shape)}")  # fmt: skip
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    rows = a.shape[0]
    first = sum(counts[:rank]) if counts else rank * rows
    losses, correct = [], []
    for query, key in ((a, b), (b, a)):
        trained = torch.is_grad_enabled() and (query.requires_grad or scale.requires_grad)
        keys = gather_without_gradient(key, counts)
        if not rows:  # of no row there is no mean
            losses.append(_zero(query, scale))
            correct.append(scale.detach().new_zeros((), dtype=torch.float32))
            continue
        loss, found, *_ = _Contrast.apply(query, scale, keys, first, trained)
        if smoothing:
            loss = loss + smoothing * _above_mean(query, scale, keys, first)
        losses.append(loss * (rows * len(counts) / sum(counts)) if counts else loss)
        correct.append(found)
    return (losses[0] + losses[1]) / 2, correct[0], correct[1]


def _zero(query: Tensor, scale: Tensor) -> Tensor:
    """Zero, of which the gradients are zeros."""
    return query.to(torch.promote_types(torch.float32, query.dtype)).sum() + 0 * scale


def _above_mean(query: Tensor, scale: Tensor, keys: Tensor, first: int) -> Tensor:
    """How far a row's own logit is above the mean of its logits, the mean over rows: what smoothing takes of it.

    The mean of logits is the logit of the mean key, so they are not made.
    """
    wide = torch.promote_types(torch.float32, query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        query, keys = query.to(wide), keys.to(wide)
        own = keys[first : first + query.shape[0]]
        return (scale.to(wide) * (query * (own - keys.mean(0))).sum(1)).mean()


def select_rows(mask: Tensor, count: int) -> Tensor:
    """Flat indices of the ``count`` True entries of ``mask``, in order; nothing is read back from the device."""
    return compact_index(mask.flatten(), count, 0)


def denoising_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, tokens: int, hidden: Tensor, hidden_count: int, smoothing: float
) -> Tensor:
    """Cross-entropy of every hidden token's reconstruction against all real tokens of the batch: a scalar.

    Args:
        student, teacher: floating point [rows, length, dim]; the teacher is detached here.
        valid, hidden: bool [rows, length]; CLS is excluded here.
        tokens, hidden_count: how many of them are True, CLS not counted.
        smoothing: of the targets.
    """
    not_cls = torch.arange(valid.shape[1], device=valid.device) > 0
    real = select_rows(valid & not_cls, tokens)
    places = select_rows((hidden & not_cls).flatten()[real], hidden_count)
    student, teacher = student.flatten(0, 1)[real[places]], teacher.detach().flatten(0, 1)[real]
    query, key = (F.normalize(x.float() if x.dtype.itemsize < 4 else x, dim=1).to(x.dtype) for x in (student, teacher))
    return smoothed_nll(log_softmax(MASK_LOGIT_SCALE * query @ key.t()), places, smoothing)
