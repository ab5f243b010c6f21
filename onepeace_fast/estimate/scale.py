"""Memory of a GPU and what it sends, when a model is sharded over N of them as ``onepeace-fast train`` does by FSDP2.

Each layer's weights are gathered for its forward and again for its backward pass, the root's once, in float32, and
gradients are reduced and scattered in float32. A ring sends (N - 1) / N of a gathered or scattered tensor from each
rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from onepeace_fast.estimate import constants
from onepeace_fast.estimate.constants import Span
from onepeace_fast.estimate.speed import step
from onepeace_fast.estimate.work import FLOAT32, Work
from onepeace_fast.models.losses import BLOCK_LOGITS

STATES = 4 * FLOAT32  # bytes of a parameter: itself, its gradient, two moments
GATHERED_LAYERS = 2  # the one that runs and the one that is gathered ahead
CONTEXT = Span(0.5e9, 1.5e9)  # bytes: a CUDA context, and what the allocator cannot use; assumed
LOGITS = BLOCK_LOGITS * FLOAT32  # bytes of the contrast's block


class Sizes(NamedTuple):
    """Parameters: of all, of one layer, and of what is in no layer."""

    parameters: int
    layer: int
    root: int


class Memory(NamedTuple):
    """Bytes of one GPU, by what they are for."""

    states: float
    gathered: float
    saved: float
    transient: Span

    @property
    def peak(self) -> Span:
        """All of it: the gradients are whole only when the activations are gone."""
        fixed = self.states + self.gathered
        gradients = self.states / STATES * FLOAT32
        least = fixed - gradients + max(self.saved, gradients)
        return Span(least + self.transient.low, fixed + self.saved + self.transient.high)


class Sent(NamedTuple):
    """Bytes that a rank sends in a step: gathered weights, gradients, and the embeddings of the contrastive loss."""

    gathered: float
    gradients: float
    contrast: float

    @property
    def total(self) -> float:
        """All."""
        return sum(self)


def memory(work: Work, sizes: Sizes, processes: int) -> Memory:
    """Of each GPU."""
    gathered = 0.0
    if processes > 1:  # a layer's weights and the gradients of one, and the root's weights and gradients
        gathered = FLOAT32 * ((GATHERED_LAYERS + 1) * sizes.layer + 2 * sizes.root)
    transient = Span(*work.transient_bytes()) + LOGITS + CONTEXT
    return Memory(STATES * sizes.parameters / processes, gathered, work.saved_bytes(), transient)


def sent(sizes: Sizes, samples: int, width: int, processes: int, forwards: int = 1, gloo: bool = False) -> Sent:
    """By each rank, in a ring. The contrast gathers the embeddings of both sides, in float32.

    ``forwards`` are the passes through the layers of which one goes back. With ``gloo`` instead of NCCL gradients are
    summed whole and then cut, which sends them twice.
    """
    share = (processes - 1) / processes
    in_layers = sizes.parameters - sizes.root
    return Sent(
        share * FLOAT32 * ((forwards + 1) * in_layers + sizes.root),
        share * FLOAT32 * sizes.parameters * (2 if gloo else 1),
        contrast_bytes(samples, width, processes),
    )


def contrast_bytes(samples: int, width: int, processes: int) -> float:
    """What a rank sends of its own rows of both sides, and passes on, to all others."""
    return 2 * (processes - 1) * samples * width * FLOAT32


def contrast_peak(samples: int, width: int, processes: int) -> Span:
    """What the contrast holds at most beside its inputs, in bytes, where the keys of all ranks are many.

    These keys, a block of logits, and five times its own rows: one side's gradient, and what the other's is made of. At
    most the keys as they came are still there too: it is not the loss that says when communication lets go of them.
    """
    keys = processes * samples
    least = FLOAT32 * (keys * width + min(samples * keys, BLOCK_LOGITS) + 5 * samples * width)
    return Span(least, least + FLOAT32 * keys * width)


def predicted(work: Mapping[str, Any], processes: int) -> dict[str, dict[str, Span]]:
    """Of one process, what ``benchmarks/scale.py`` measures over gloo; ``work`` is how its file describes it."""
    sizes, contrast, step_of = Sizes(**work["sizes"]), work["contrast"], work["step"]
    return {
        "contrast": {
            "sent_bytes": _one(contrast_bytes(contrast["samples"], contrast["width"], processes)),
            "peak_bytes": contrast_peak(contrast["samples"], contrast["width"], processes),
        },
        "step": {
            "sent_bytes": _one(sent(sizes, **step_of, processes=processes, gloo=True).total),
            "state_bytes": _one(STATES * sizes.parameters / processes),
        },
    }


def _one(value: float) -> Span:
    return Span(value, value)


def seconds(work: Work, gpu_name: str, way: str, sizes: Sizes, processes: int) -> Span:
    """A step on N GPUs: at least the longer of computing and sending, at most one after the other."""
    computed = step(work, gpu_name, way, sizes.parameters, processes)
    if processes == 1:
        return computed
    gpu = constants.gpus()[gpu_name]
    rate = (gpu.link_GBs if processes <= constants.GPUS_OF_A_NODE else gpu.network_GBs) * 1e9
    of_all = sent(sizes, work.batch.samples, work.config.embed_dim, processes)
    sending = of_all.total / rate
    return Span(max(computed.low, sending), computed.high + sending)
