"""MiCo's context in front of a causal language model of Hugging Face's transformers, which writes captions of it.

A projector of two layers, as LLaVA's (arXiv 2310.03744), takes each token of the context into the space
of the language model's embeddings. Nothing of transformers is imported here: the language model is the user's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import describe, read_values, require, require_device, require_tensor, require_values
from onepeace_fast.models.losses import log_softmax, smoothed_nll
from onepeace_fast.models.mico.config import MicoConfig
from onepeace_fast.models.mico.inputs import Given
from onepeace_fast.models.mico.losses import counts_of_processes
from onepeace_fast.models.mico.model import Mico, Samples
from onepeace_fast.models.mico.texts import padded
from onepeace_fast.routing import INTEGERS

FIXED = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids")  # of ``generate``, made here
WRITTEN = 20  # tokens that ``generate`` of transformers writes where nothing says how many


class Prefix(NamedTuple):
    """What the language model reads of each sample before its text."""

    x: Tensor  # [samples, longest, the language model's width], each sample's tokens first
    there: Tensor  # bool [samples, longest]
    shortest: int
    longest: int


class LanguageConnector(nn.Module):
    """MiCo, a projector and a causal language model. What trains of each is what has ``requires_grad``.

    Args:
        mico: whose context is seen.
        language_model: a causal one of transformers, such as GPT-2 or Llama.

    Raises:
        ValueError: another kind of model.
    """

    tasks: ClassVar[tuple[str, ...]] = ("prefix", "loss", "generate")

    def __init__(self, mico: Mico, language_model: Any) -> None:
        super().__init__()
        fits = isinstance(getattr(mico, "config", None), MicoConfig)
        require(fits, lambda: f"mico: expected a Mico, got {type(mico).__name__}")
        writes = isinstance(language_model, nn.Module) and getattr(language_model, "can_generate", bool)()
        require(
            writes and not language_model.config.is_encoder_decoder,
            lambda: (
                "language_model: expected a causal language model of transformers, got "
                f"{type(language_model).__name__}; take one of AutoModelForCausalLM"
            ),
        )
        table = language_model.get_input_embeddings().weight
        own, width = mico.config.text.width, table.shape[1]
        self.mico, self.language_model = mico, language_model
        self.projector = nn.Sequential(nn.Linear(own, width), nn.GELU(), nn.Linear(width, width))
        parameter = mico.contra_temp
        self.projector.to(parameter.device, parameter.dtype)

    def forward(self, task: str, **inputs: Any) -> Any:
        """Call a method by its name, one of ``tasks`` (else ``ValueError``), so that wrappers and hooks see it."""
        require(task in self.tasks, f"task: expected one of {', '.join(self.tasks)}, got {task!r}")
        return getattr(self, task)(**inputs)

    def prefix(
        self, *, subtitle: Tensor | None = None, samples: Samples | None = None,
        **frames: Given | None,
    ) -> Prefix:  # fmt: skip
        """The context of each sample in the language model's space; inputs are those of ``Mico.embed``.

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        table = self.language_model.get_input_embeddings().weight
        require_device("language_model", table, self.mico.contra_temp.device)
        context = self.mico("contexts", subtitle=subtitle, samples=samples, **frames)
        x, there = padded(context._replace(x=self.projector(context.x).to(table.dtype)))
        lengths = [sum(own) for own in zip(*context.plan.segment_lengths, strict=True)]
        return Prefix(x, there, min(lengths), max(lengths))

    def loss(
        self, text: Tensor, *, mask: Tensor | None = None, subtitle: Tensor | None = None,
        samples: Samples | None = None, **frames: Given | None,
    ) -> Tensor:  # fmt: skip
        """The mean cross-entropy of the captions' tokens, the first of which is found from the context alone.

        Averaged over processes it is that of one process with all samples.

        Args:
            text: integers [samples, length], the language model's tokens; with its end token, if it shall end.
            mask: bool or integers [samples, length], 0 at padding, on either side: a tokenizer's attention_mask.
                None: there is no padding.
            subtitle, samples, frames: as in ``Mico.embed``.

        Raises:
            ValueError: an input that does not fit.
        """
        real = self._real(text, mask)
        prefix = self.prefix(subtitle=subtitle, samples=samples, **frames)
        count = len(prefix.x)
        require(len(text) == count, lambda: f"text: expected a caption for each of {count} samples, got {len(text)}")
        require_device("text", text, prefix.x.device)
        words = self.language_model.get_input_embeddings()(text)
        x, there = torch.cat([prefix.x, words], 1), torch.cat([prefix.there, real], 1)
        wanted = torch.cat([torch.zeros_like(prefix.there), real], 1)
        ids = F.pad(text.long(), (prefix.x.shape[1], 0))
        order = (~there).byte().argsort(dim=1, stable=True)[:, : max(read_values(there.sum(1)))]
        x, there, wanted, ids = (_ordered(one, order) for one in (x, there, wanted, ids))
        self._require_room(x.shape[1])
        kept = x.shape[1] - prefix.shortest + 1  # from the token on that finds the first of any caption
        takes = "logits_to_keep" in inspect.signature(self.language_model.forward).parameters
        options = {"logits_to_keep": kept} if takes else {}
        read = self.language_model(inputs_embeds=x, attention_mask=there.long(), use_cache=False, **options)
        wanted, ids = wanted[:, 1 - kept :], ids[:, 1 - kept :]
        own = wanted.flatten().nonzero()[:, 0]
        scores = F.embedding(own, read.logits[:, -kept:-1].flatten(0, 1))
        ((*counts,),) = counts_of_processes([len(own)], text.device)
        loss = smoothed_nll(log_softmax(scores), ids.flatten()[own], 0.0)
        return loss * (len(own) * len(counts) / sum(counts))

    @torch.no_grad()
    def generate(
        self, *, subtitle: Tensor | None = None, samples: Samples | None = None,
        options: Mapping[str, Any] | None = None, **frames: Given | None,
    ) -> Tensor:  # fmt: skip
        """What the language model's own ``generate`` writes of each sample: its result for these options.

        Args:
            subtitle, samples, frames: as in ``Mico.embed``.
            options: of the language model's ``generate``, such as ``max_new_tokens``; its configuration has the others.

        Raises:
            ValueError: an input that does not fit, or options that are made here.
        """
        options = {} if options is None else options
        require(isinstance(options, Mapping), lambda: f"options: expected a dict of them, got {describe(options)}")
        made = [name for name in FIXED if name in options]
        require(not made, lambda: f"options: expected those of a search, got {', '.join(made)}; the context makes it")
        prefix = self.prefix(subtitle=subtitle, samples=samples, **frames)
        self._require_room(prefix.longest + self._most_written(options, prefix.longest))
        order = prefix.there.byte().argsort(dim=1, stable=True)  # padding in front, so that the text goes on behind
        x, there = _ordered(prefix.x, order), _ordered(prefix.there, order)
        return self.language_model.generate(inputs_embeds=x, attention_mask=there.long(), **options)

    def _most_written(self, options: Mapping[str, Any], read: int) -> int:
        """How many tokens ``generate`` writes at most behind ``read`` ones, as transformers reads its options."""
        settings = (options.get("generation_config"), self.language_model.generation_config)

        def set_to(name: str) -> int | None:
            places = (options.get(name), *(getattr(place, name, None) for place in settings))
            value = next((value for value in places if value is not None), None)
            require(
                value is None or (isinstance(value, int) and value > 0),
                lambda: f"options: expected {name} of at least 1, got {describe(value)}",
            )
            return value

        new, all_of_them = set_to("max_new_tokens"), set_to("max_length")
        if new is not None or all_of_them is None:
            return WRITTEN if new is None else new
        require(
            all_of_them > read,
            lambda: (
                f"options: expected max_length of more than the context's {read} tokens, got {all_of_them}; "
                "max_new_tokens counts those behind it"
            ),
        )
        return all_of_them - read

    def _real(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """bool [samples, length], the captions' tokens."""
        require_tensor("text", text, INTEGERS, "[samples, length]", 2)
        size = self.language_model.get_input_embeddings().weight.shape[0]
        real = torch.ones_like(text, dtype=torch.bool)
        if mask is not None:
            require_tensor("mask", mask, (*INTEGERS, torch.bool), "[samples, length]", 2)
            require_device("mask", mask, text.device)
            shape, got = [*text.shape], [*mask.shape]
            require(got == shape, f"mask: expected the captions' {shape}, got {got}")
            real = mask != 0
        require_values(real.any(1).all(), "mask: expected a token in each caption, got one without any")
        require_values(
            ((text >= 0) & (text < size)).all(), f"text: expected ids from 0 to {size - 1}, got others"
        )  # fmt: skip
        return real

    def _require_room(self, length: int) -> None:
        limit = getattr(self.language_model.config, "max_position_embeddings", None)
        require(
            limit is None or length <= limit,
            f"text: expected context and caption in the language model's {limit} positions, got {length}; give fewer "
            "frames, fewer tokens, or a MicoConfig with pool=True",
        )


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """Rows of each sample in an order: [samples, length, ...] by [samples, new length]."""
    return x.gather(1, order if x.dim() == 2 else order[..., None].expand(-1, -1, x.shape[2]))
