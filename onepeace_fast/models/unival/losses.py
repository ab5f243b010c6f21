"""UnIVAL's losses of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from onepeace_fast.models.losses import log_softmax, smoothed_nll

LOG_END = 0.75  # the probability from which on the bonus is a line
LEAST = 1e-5


def token_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0, encouraging: bool = False) -> Tensor:
    """The mean over tokens of the label-smoothed cross-entropy, to which the encouraging loss adds a bonus.

    With p the probabilities, V tokens in the vocabulary and b = ln(1 - p), from p = 0.75 on its tangent, the bonus is
    (1 - smoothing) b_target + smoothing / V * sum_v b_v. So what is likely already keeps a gradient (Zhao et al.,
    "Well-classified examples are underestimated", arXiv 2110.06537).

    Args:
        logits: floating point [tokens, vocabulary].
        target: int64 [tokens].
        smoothing: the probability that is spread over the other tokens, evenly.
        encouraging: whether the bonus is added.
    """
    log_probabilities = log_softmax(logits)
    loss = smoothed_nll(log_probabilities, target, smoothing)
    if not encouraging:
        return loss
    p = log_probabilities.exp()
    bonus = (1 - p).clamp(min=LEAST).log()
    line = (p - LOG_END) / (LOG_END - 1) + torch.log1p(p.new_tensor(-LOG_END))
    bonus = torch.where(p > LOG_END, line, bonus)
    own = bonus.gather(1, target[:, None]).mean()
    return loss + (1 - smoothing) * own + smoothing / p.shape[1] * bonus.sum(1).mean()
