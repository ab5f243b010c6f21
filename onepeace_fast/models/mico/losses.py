"""MiCo's pretraining losses, those of VAST (arXiv 2305.18500): contrast, matching and captions.

Averaged over processes, contrast and captions are those of one process with all samples; wrong pairs of the matching
are drawn among a process's own samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import read_values, require, require_device, require_values
from onepeace_fast.models import losses
from onepeace_fast.models.losses import contrastive_loss, log_softmax, smoothed_nll
from onepeace_fast.models.mico.config import PADDING, TextConfig

SMOOTHING = 0.1  # of the contrast
HIDDEN_SHARE = 0.6  # of a caption's tokens
MASKED, REPLACED = 0.8, 0.1  # of the hidden ones; the others stay as they are
LEAST_WEIGHT = 1e-4  # of a wrong partner, beside its probability


class Masked(NamedTuple):
    """Captions of which some tokens are hidden."""

    ids: Tensor  # int64 [texts, length]
    hidden: Tensor  # bool [texts, length], where the captions' own tokens are to be found


class Pairs(NamedTuple):
    """What texts are matched with, in the order of the samples whose context is seen."""

    texts: list[int]
    samples: list[int]  # ascending
    belongs: list[int]  # 1, or 0 for a wrong pair


def mask_captions(ids: Tensor, config: TextConfig, generator: torch.Generator | None = None) -> Masked:
    """Hide 60% of each caption's tokens behind its first, at least one: each for itself, as VAST does.

    Of the hidden ones 80% are replaced by the mask, 10% by any word, and the others stay.

    Args:
        ids: integers [texts, length], 0 behind each text.
        config: whose mask and words are put in.
        generator: of the random numbers, on the CPU; None: the default one.

    Raises:
        ValueError: a caption of less than two tokens.
    """
    tokens = ids.detach().cpu().long()
    can = tokens != PADDING
    can[:, 0] = False
    short = (~can.any(1)).nonzero().flatten().tolist()
    require(not short, lambda: f"text: expected at least 2 tokens in each caption, to hide one, got less in {short}")
    hidden = torch.zeros_like(can)
    while (open_rows := ~hidden.any(1)).any():
        drawn = _uniform(tokens, generator) < HIDDEN_SHARE
        hidden = torch.where(open_rows[:, None], drawn & can, hidden)
    kind = _uniform(tokens, generator)
    words = torch.randint(config.first_word, config.vocab_size, tokens.shape, generator=generator, device="cpu")
    put = torch.where(kind < MASKED, torch.full_like(tokens, config.mask_id), words)
    masked = torch.where(hidden & (kind < MASKED + REPLACED), put, tokens)
    return Masked(masked.to(ids.device), hidden.to(ids.device))


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1) on the CPU, whatever the process's defaults are."""
    return torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu")


def counts_of_processes(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """Of each of these numbers what every process has, by rank."""
    own = torch.tensor([*counts], device=device)
    if not (dist.is_available() and dist.is_initialized()):
        return [[count] for count in counts]
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.stack(found, 1).tolist()


def contrast(
    text: Tensor, features: Mapping[str, tuple[Tensor, Sequence[int]]], scale: Tensor,
    counts: Mapping[str, Sequence[int]],
) -> Tensor:  # fmt: skip
    """The mean over modalities and their union of the contrast of texts with them.

    Args:
        text: [samples, dim], normalised.
        features: {modality, or "union": its rows [rows, dim], normalised, and their samples}.
        scale: of the similarities.
        counts: {the same name: how many rows each process has}; one without any is left out.
    """
    terms = []
    for name, (x, samples) in features.items():
        if sum(counts[name]):
            index = torch.tensor([*samples], dtype=torch.int64, device=text.device)
            own = F.embedding(index, text)
            terms.append(contrastive_loss(own, x, scale, counts=counts[name], smoothing=SMOOTHING)[0])
    return torch.stack(terms).mean()


@torch.no_grad()
def draw_wrong(
    queries: Tensor, keys: Tensor, scale: Tensor, generator: torch.Generator | None = None
) -> list[int]:  # fmt: skip
    """For each query another row than its own, the likelier the more similar it is.

    Args:
        queries, keys: [rows, dim], normalised; row i of one belongs to row i of the other.
        scale: of the similarities.
        generator: of the random numbers, on the CPU; None: the default one.

    Raises:
        ValueError: a single row.
    """
    rows = queries.shape[0]
    require(rows > 1, f"text: expected at least 2 samples, to pair one with another's, got {rows}")
    wide, found = torch.promote_types(torch.float32, queries.dtype), []
    queries, keys = scale.to(wide) * queries.to(wide), keys.to(wide)
    step = max(1, losses.BLOCK_LOGITS // rows)
    for place in range(0, rows, step):
        with torch.autocast(queries.device.type, enabled=False):
            weights = (queries[place : place + step] @ keys.t()).softmax(1).add_(LEAST_WEIGHT)
        # Features that are no numbers draw any row: the loss then says that they are none.
        weights = weights.nan_to_num_(1.0).cpu()
        own = torch.arange(len(weights), device="cpu")
        weights[own, own + place] = 0
        found += torch.multinomial(weights, 1, generator=generator)[:, 0].tolist()
    return found


def draw_pairs(text: Tensor, union: Tensor, scale: Tensor, generator: torch.Generator | None = None) -> Pairs:
    """Of each sample its pair, its text with another's context, and another's text with its context."""
    other_context, other_text = draw_wrong(text, union, scale, generator), draw_wrong(union, text, scale, generator)
    own = [(sample, sample, 1) for sample in range(len(text))]
    wrong = [(sample, text, 0) for sample, text in enumerate(other_text)]
    wrong += [(sample, text, 0) for text, sample in enumerate(other_context)]
    samples, texts, belongs = zip(*sorted(own + wrong), strict=True)
    return Pairs([*texts], [*samples], [*belongs])


def matching(logits: Tensor, belongs: Sequence[int]) -> Tensor:
    """The mean cross-entropy of [pairs, 2], no and yes."""
    return smoothed_nll(log_softmax(logits), torch.tensor([*belongs], device=logits.device), 0.0)


def captioning(scores: Tensor, ids: Tensor, masked: Masked, counts: Sequence[int]) -> Tensor:
    """The mean cross-entropy of the hidden tokens, of all processes' together in the mean over processes.

    Args:
        scores: [hidden tokens, words], in the order of the captions.
        ids: integers [texts, length], the captions.
        masked: what was hidden of them.
        counts: how many each process has hidden.
    """
    own = masked.hidden.flatten().nonzero()[:, 0]
    loss = smoothed_nll(log_softmax(scores), ids.flatten()[own].long(), 0.0)
    return loss * (len(own) * len(counts) / sum(counts))


def check_masked(text: Tensor, masked: Masked) -> int:
    """How many tokens of the captions are hidden; raises ``ValueError`` where they are not theirs, or none is."""
    fits = isinstance(masked, Masked) and masked.ids.shape == masked.hidden.shape == text.shape
    require(
        fits and masked.hidden.dtype == torch.bool,
        lambda: f"masked: expected ids and hidden tokens of the captions' {list(text.shape)}, got others",
    )
    require_device("masked", masked.hidden, text.device)
    real = text != PADDING
    require_values(
        (((masked.ids != PADDING) == real) & (real | ~masked.hidden)).all(),
        "masked: expected the captions' own padding, and nothing hidden there, got other padding",
    )
    count = sum(read_values(masked.hidden.sum(1)))
    require(count > 0, "masked: expected at least one hidden token, got none")
    return count
