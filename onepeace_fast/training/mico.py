"""Runs of MiCo (arXiv 2406.09412): captions with samples of any modalities, contrasted, matched and completed."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.data.batches import BatchSampler
from onepeace_fast.data.sample_batches import SampleDataset, collate_samples
from onepeace_fast.data.samples import MixedSample, read_samples
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.data.word_pieces import BertTokenizer
from onepeace_fast.models.mico import Masked, Mico, MicoConfig, mask_captions
from onepeace_fast.models.parameter_names import upstream_names
from onepeace_fast.training import checkpoint
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.family import Family, Reading
from onepeace_fast.training.mico_config import MicoTrainingConfig
from onepeace_fast.training.trainer import Trainer


class MicoTrainer(Trainer):
    """Steps of MiCo's three losses."""

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Their weighted sum and each of them; wrong pairs are drawn here."""
        inputs = {name: value for name, value in batch.items() if name != "hidden"}
        inputs["masked"] = Masked(batch["masked"], batch["hidden"])
        return self.pass_forward("losses", inputs | {"generator": self.masks})


class MixedSamples(Family):
    """Captions with what they belong to."""

    config: MicoTrainingConfig
    entries: Sequence[MixedSample]
    default_model = MicoConfig()
    tokenizer_class = BertTokenizer

    @classmethod
    def read(cls, config: MicoTrainingConfig) -> list[MixedSample]:
        """As ``read_samples``, of the modalities that the model has."""
        place = config.path("init")
        if place is not None and not place.is_dir():  # it may have gone since the run began with it
            place = next(reversed(checkpoint.all_in(config.path("output"))), place)
        model = cls.sizes(config, place)
        return read_samples(config.path("manifest"), [*model.frames], missing=config.missing)

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.entries)

    def described(self) -> str:
        """The modalities and how many samples have each."""
        counts = Counter(name for sample in self.entries for name in sample.modalities)
        found = ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))
        return f"mico on {self.count:,} samples with {found}"

    def texts(self) -> Iterable[str]:
        """Captions and subtitles."""
        return (text for sample in self.entries for text in (sample.caption, sample.subtitle) if text is not None)

    def sized(self, model: MicoConfig, fields: Mapping[str, Any], tokenizer: Tokenizer) -> MicoConfig:
        """The words, the mask and the first word of the tokenizer, unless the configuration says others."""
        own, given = cast(BertTokenizer, tokenizer), fields.get("text", {})
        follows = {"vocab_size": own.vocab_size}
        if own.mask != model.text.mask_id:  # else it is BERT's own vocabulary, and the words begin as upstream says
            follows |= {"mask_id": own.mask, "first_word": own.first_word}
        try:
            text = dataclasses.replace(
                model.text, **{name: value for name, value in follows.items() if name not in given}
            )
        except ValueError as error:
            raise ValueError(f"model: text.{error}") from None
        return dataclasses.replace(model, text=text)

    def require_fit(self, model: MicoConfig, tokenizer: Tokenizer) -> None:
        """Raise ``ValueError`` where the tokenizer has more tokens than the model, or hides by another one."""
        text, own = model.text, cast(BertTokenizer, tokenizer)
        require(
            own.vocab_size <= text.vocab_size,
            f"tokenizer: expected at most the model's text.vocab_size, {text.vocab_size}, got {own.vocab_size} tokens",
        )
        require(
            own.mask == text.mask_id,
            f"model: expected text.mask_id {own.mask}, the tokenizer's [MASK], got {text.mask_id}",
        )
        require(
            text.first_word >= own.first_word,
            f"model: expected text.first_word of at least {own.first_word}, behind the tokenizer's special tokens, got "
            f"{text.first_word}",
        )
        require(
            text.max_positions > 2,
            f"model: expected text.max_positions of at least 3, [CLS], a token and [SEP], got {text.max_positions}",
        )

    def build(self, model: MicoConfig) -> Mico:
        """A fresh model."""
        return Mico(model, self.config.backend)

    def prepare(self, model: Mico) -> None:
        """Freeze what no sample reads, so that weight decay leaves it alone."""
        sets = {sample.modalities for sample in self.entries}
        for parameter in (*model.unread(sets), *model.vision_encoder.visual.head.parameters()):
            parameter.requires_grad_(False)

    def modalities(self, model: MicoConfig) -> Sequence[str]:
        """Text too."""
        return ("text", *model.context.modalities)

    def added(self, weights: Mapping[str, Tensor], model: MicoConfig) -> list[str]:
        """Those without an embedding of their type."""
        return [name for name in model.context.modalities if f"{name}_type_embeddings" not in weights]

    def fresh(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of added modalities, and the heads of what they are joined with."""
        model = cast(Mico, model)
        added = self.added(weights, model.config)
        own = {id(parameter) for name in added for parameter in model.parameters_of(name)}
        heads = tuple(
            f"contra_head_{name}." for name, parts in model.context_config.unions.items() if {*parts} & {*added}
        )
        return {
            name: parameter.detach()
            for name, parameter in upstream_names(model).items()
            if id(parameter) in own or name.startswith(heads)
        }

    def trainer(self, model: Mico, processes: Processes) -> MicoTrainer:
        """With wrong pairs of this process's own."""
        return MicoTrainer(model, self.config, processes)

    def trained(self, step: int) -> set[str]:
        """What there are samples of."""
        return {"text", *(name for sample in self.entries for name in sample.modalities)}

    def reading(self, model: MicoConfig, tokenizer: Tokenizer, processes: Processes, step: int) -> Reading:
        """The samples in an order of each epoch."""
        config = self.config
        dataset = SampleDataset(
            self.entries, cast(BertTokenizer, tokenizer), side=model.vision.image_size,
            longest=model.text.max_positions, hide=functools.partial(mask_captions, config=model.text),
            seed=config.seed, broken=config.broken,
        )  # fmt: skip
        first = step * config.accumulation
        sampler = BatchSampler(len(dataset), config.batch_size, config.seed, processes.rank, processes.count, first)
        return dataset, sampler, collate_samples
