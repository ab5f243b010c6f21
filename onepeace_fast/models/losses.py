"""The losses of ONE-PEACE's two pretraining tasks (arXiv 2305.11172, section 3.2)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.routing import compact_index

MASK_LOGIT_SCALE = 2.5


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


def gather_without_gradient(local: Tensor) -> Tensor:
    """Rows of all ranks, detached, in the order of the ranks, which must have equally many."""
    local = local.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return local
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local.contiguous())
    return torch.cat(gathered)


def contrastive_loss(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric contrast of L2-normalised [rows, dim] against the detached rows of all ranks.

    ``scale`` is the factor of the similarities, a scalar such as ``OnePeacePretrain.logit_scale_exp`` gives. All ranks
    must have equally many rows.

    Returns the mean of both directions, in at least float32, and how many rows of a and of b find their own partner
    first, as float32 scalars on the device.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    target = torch.arange(a.shape[0], device=a.device) + rank * a.shape[0]
    losses, correct = [], []
    for query, key in ((a, b), (b, a)):
        logits = scale * query @ gather_without_gradient(key).t()
        losses.append(smoothed_nll(log_softmax(logits), target, 0.0))
        correct.append((logits.argmax(1) == target).float().sum())
    return (losses[0] + losses[1]) / 2, correct[0], correct[1]


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
