"""MiCo (arXiv 2406.09412): one encoder for frames of every modality, and BERT, which reads texts beside them.

Each sample has any of the modalities, in any number of frames; a batch is one packed sequence for each encoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.backend import check_backend, resolve_backend
from onepeace_fast.checks import describe, require, require_device
from onepeace_fast.layers.parameters import with_unread
from onepeace_fast.models import upstream
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.mico import losses
from onepeace_fast.models.mico.config import LOSSES, MicoConfig
from onepeace_fast.models.mico.context import Context, PackedContext, Tokens, pooled
from onepeace_fast.models.mico.encoder import EvaEncoder
from onepeace_fast.models.mico.inputs import (
    Given,
    Rows,
    count_rows,
    integers,
    read_frames,
    read_samples,
    read_texts,
    require_every_sample,
)
from onepeace_fast.models.mico.losses import Masked
from onepeace_fast.models.mico.text_encoder import TextEncoder

Samples = Mapping[str, Sequence[int] | Tensor]
UNION = "union"


class Seen(NamedTuple):
    """What the encoders make of a batch without its texts."""

    tokens: dict[str, Tokens]
    pooled: dict[str, Tensor]  # [rows, width] of each modality
    rows: dict[str, Rows]
    samples: int

    def parts(self) -> dict[tuple[str, ...], list[int]]:
        """The samples of each set of modalities that there is."""
        there = {name: {*one.samples} for name, one in self.rows.items()}
        found: dict[tuple[str, ...], list[int]] = {}
        for sample in range(self.samples):
            names = tuple(name for name, samples in there.items() if sample in samples)
            found.setdefault(names, []).append(sample)
        return found


class Clip(nn.Module):
    """The encoder at its place in upstream's names, and EVA-CLIP's temperature, which nothing reads."""

    def __init__(self, visual: EvaEncoder) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


class Mico(Context):
    """Encoders, context and heads; parameters have upstream's names.

    Args:
        config: sizes.
        backend: "reference" (padded, as upstream computes it), "fused" (packed), or None: automatic, by device.
    """

    tasks: ClassVar[tuple[str, ...]] = ("encode", "contexts", "embed", "match", "losses")
    load_report: LoadReport | None = None

    def __init__(self, config: MicoConfig, backend: str | None = None) -> None:
        super().__init__(config.context)
        self.config = config
        self.vision_encoder = Clip(EvaEncoder(config.vision))
        self.multimodal_encoder = TextEncoder(config.text)
        self.backend = backend

    @property
    def backend(self) -> str | None:
        """That of both encoders."""
        return self.multimodal_encoder.backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        if backend is not None:
            check_backend(backend)
        self.multimodal_encoder.backend = self.vision_encoder.visual.backend = backend

    def forward(self, task: str, **inputs: Any) -> Any:
        """Call a method by its name, one of ``tasks`` (else ``ValueError``), so that wrappers and hooks see it."""
        require(task in self.tasks, f"task: expected one of {', '.join(self.tasks)}, got {task!r}")
        return getattr(self, task)(**inputs)

    def encode(self, **frames: Given | None) -> dict[str, list[Tensor]]:
        """The encoder's tokens, of all frames of all modalities in one pass.

        Args:
            frames: {modality: floating point [rows, frames, 3, side, side], or of one channel [rows, frames, side,
                side], as spectrograms are; or a list of rows, each with its own number of frames}.

        Returns:
            {modality: of each row [frames, tokens, width]}, CLS first.

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        seen = self._see(frames, None, None, None)
        return {name: [*own.x.split([*own.counts])] for name, own in seen.tokens.items()}

    def contexts(
        self, *, subtitle: Tensor | None = None, samples: Samples | None = None, **frames: Given | None
    ) -> PackedContext:
        """What texts see of each sample, for a decoder of one's own.

        Args:
            subtitle, samples, frames: as in ``embed``.

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        seen = self._see(frames, subtitle, samples, None)
        context = self._context(seen)
        beside = ("contra_", "itm_head.", "multimodal_encoder.")
        unread = [parameter for name, parameter in self.named_parameters() if name.startswith(beside)]
        return context._replace(x=with_unread(context.x, *self.unread(seen.parts()), *unread))

    def embed(
        self, *, text: Tensor | None = None, subtitle: Tensor | None = None, samples: Samples | None = None,
        **frames: Given | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Normalised features for retrieval.

        Args:
            text, subtitle: integers [rows, length], token ids, 0 behind each text.
            samples: {modality or "subtitle": the sample of each row}; by default row i is sample i's.
            frames: as in ``encode``.

        Returns:
            {modality, "subtitle" or "text": [rows, contra_dim]}, rows in their order in the input; and where a batch
            has more than texts, "union": [samples, contra_dim], of all that each sample has.

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        given = subtitle is not None or any(x is not None for x in frames.values())
        require(given or text is not None, "embed: expected a text or at least one modality, got none")
        found: dict[str, Tensor] = {}
        if given:
            if text is not None:
                read_texts("text", text, self.config.text)
            seen = self._see(frames, subtitle, samples, None)
            for name, x in seen.pooled.items():
                order = torch.tensor(seen.rows[name].given, dtype=torch.int64, device=x.device)
                feature = self.feature(name, x)
                found[name] = torch.zeros_like(feature).index_copy(0, order, feature)
            found[UNION] = self._union(seen)
        if text is not None:
            found["text"] = self.feature("text", self.multimodal_encoder(text).first)
        return found

    def match(
        self, text: Tensor, *, of: Sequence[int] | Tensor | None = None, subtitle: Tensor | None = None,
        samples: Samples | None = None, **frames: Given | None,
    ) -> Tensor:  # fmt: skip
        """The probability that each text belongs to a sample.

        Args:
            text, subtitle, samples, frames: as in ``embed``.
            of: the sample that each text is matched with; by default text i with sample i.

        Returns:
            [texts].

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        read_texts("text", text, self.config.text)
        own = [*range(len(text))] if of is None else integers("of", of)
        require(len(own) == len(text), lambda: f"of: expected a sample for each of {len(text)} texts, got {len(own)}")
        order = sorted(range(len(own)), key=lambda place: own[place])
        seen = self._see(frames, subtitle, samples, None, text.device)
        fits = all(0 <= sample < seen.samples for sample in own)
        require(fits, lambda: f"of: expected samples from 0 to {seen.samples - 1}, got {own}")
        index = torch.tensor(order, dtype=torch.int64, device=text.device)
        logits = self._match(text[index], self._context(seen), [own[place] for place in order])
        found = logits.softmax(1)[:, 1]
        return torch.zeros_like(found).index_copy(0, index, found)

    def losses(
        self, text: Tensor, *, subtitle: Tensor | None = None, samples: Samples | None = None,
        masked: Masked | None = None, generator: torch.Generator | None = None, **frames: Given | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """VAST's pretraining losses (arXiv 2305.18500) of a batch with a caption for each sample.

        Contrast of captions with each modality and with all that a sample has together; matching of captions with
        contexts, and with wrong ones that are drawn by their similarity; captions, whose hidden tokens are found from
        what comes before them and from the context.

        Args:
            text: integers [samples, length], the captions.
            subtitle, samples, frames: as in ``embed``.
            masked: what is hidden of the captions, by ``mask_captions``; None: it is drawn here.
            generator: on the CPU, of what is hidden and of the wrong pairs; None: the default one.

        Returns:
            "contrast", "matching", "caption" and "loss", the sum of them with their weights.

        Raises:
            ValueError: an input that does not fit, before any work: a sample without any modality, a single sample.
        """
        config = self.config
        read_texts("text", text, config.text)
        require(len(text) > 1, f"text: expected at least 2 samples, to pair one with another's, got {len(text)}")
        masked = losses.mask_captions(text, config.text, generator) if masked is None else masked
        own_hidden = losses.check_masked(text, masked)
        seen = self._see(frames, subtitle, samples, len(text), text.device)
        context = self._context(seen)
        scale = 1 / self.contra_temp
        feature = self.feature("text", self.multimodal_encoder(text).first)
        features = {name: (self.feature(name, x), seen.rows[name].samples) for name, x in seen.pooled.items()}
        union = self._union(seen)
        for name in self.context_config.modalities:  # of another process's batch
            features.setdefault(name, (feature[:0], []))
        features[UNION] = (union, [*range(seen.samples)])
        names = sorted(features)
        counts = [len(features[name][1]) for name in names] + [own_hidden]
        *of_names, hidden = losses.counts_of_processes(counts, text.device)
        contrast = losses.contrast(
            feature, {name: features[name] for name in names}, scale, dict(zip(names, of_names, strict=True))
        )
        pairs = losses.draw_pairs(feature, union, scale, generator)
        chosen = torch.tensor(pairs.texts, dtype=torch.int64, device=text.device)
        matching = losses.matching(self._match(text[chosen], context, pairs.samples), pairs.belongs)
        read = self.multimodal_encoder(masked.ids, context, causal=True)
        found = read.texts.tokens(read.x, masked.hidden)
        caption = losses.captioning(self.multimodal_encoder.scores(found, read.texts.packed), text, masked, hidden)
        parts = dict(zip(LOSSES, (contrast, matching, caption), strict=True))
        weighted = torch.stack([getattr(config, f"{name}_weight") * x for name, x in parts.items()])
        # Before the sum, since FSDP2 warns of results that are views.
        loss = with_unread(weighted, *self.unread(seen.parts())).sum()
        return {"loss": loss, **{name: x.detach() for name, x in parts.items()}}

    @classmethod
    def load(cls, directory: str | Path, backend: str | None = None) -> Mico:
        """Build the model of a checkpoint of ``onepeace-fast train``, on the CPU, in training mode.

        Raises:
            ValueError: a file that is missing or does not fit.
        """
        config, weights = upstream.read_folder(Path(directory).expanduser(), MicoConfig)
        model = cls(config, backend)
        model.load_upstream_state_dict(weights)
        return model

    def _see(
        self, frames: Mapping[str, Given | None], subtitle: Tensor | None, samples: Samples | None, count: int | None,
        device: torch.device | None = None,
    ) -> Seen:  # fmt: skip
        """Read a batch and encode it; ``count`` is the number of samples where texts say it."""
        rows = self._read(frames, subtitle, {} if samples is None else samples, count, device)
        known = 1 + max(sample for one in rows.values() for sample in one.samples) if count is None else count
        require_every_sample(known, rows)
        tokens: dict[str, Tokens] = {}
        pools: dict[str, Tensor] = {}
        visual = {name: one for name, one in rows.items() if name != "subtitle"}
        if visual:
            pixels = [one.values for one in visual.values()]
            x = self.vision_encoder.visual(pixels[0] if len(pixels) == 1 else torch.cat(pixels))
            parts = x.split([len(one) for one in pixels])
            for (name, one), part in zip(visual.items(), parts, strict=True):
                tokens[name] = Tokens(part, one.counts, one.samples)
                pools[name] = pooled(part, one.counts)
        if "subtitle" in rows:
            one = rows["subtitle"]
            read = self.multimodal_encoder(one.values)
            real = one.values != 0
            tokens["subtitle"] = Tokens(read.texts.tokens(read.x, real), one.counts, one.samples)
            pools["subtitle"] = read.first
        return Seen(tokens, pools, rows, known)

    def _read(
        self, frames: Mapping[str, Given | None], subtitle: Tensor | None, samples: Samples, count: int | None,
        device: torch.device | None,
    ) -> dict[str, Rows]:  # fmt: skip
        """Each modality in the order of its samples; raises before any work."""
        given = {name: x for name, x in frames.items() if x is not None}
        unknown = [name for name in given if name not in self.config.frames]
        require(not unknown, lambda: f"frames: expected some of {', '.join(self.config.frames)}, got {unknown}")
        present = [*given, "subtitle"] if subtitle is not None else [*given]
        fits = isinstance(samples, Mapping)
        require(fits, lambda: f"samples: expected modalities with the sample of each row, got {describe(samples)}")
        strangers = [name for name in samples if name not in present]
        require(not strangers, lambda: f"samples: expected those of {present}, got {strangers}")
        require(bool(present), "frames: expected at least one modality, got none")
        found: dict[str, Rows] = {}
        for name in self.config.frames:
            if name in given:
                own = read_samples(name, count_rows(name, given[name]), samples.get(name), count)
                found[name] = read_frames(name, given[name], self.config.vision, own, device)
                device = found[name].values.device
        if subtitle is not None:
            valid = read_texts("subtitle", subtitle, self.config.text)
            require_device("subtitle", subtitle, subtitle.device if device is None else device)
            own = read_samples("subtitle", len(subtitle), samples.get("subtitle"), count)
            order = sorted(range(len(own)), key=lambda row: own[row])
            index = torch.tensor(order, dtype=torch.int64, device=subtitle.device)
            lengths = valid[index].sum(1).tolist()
            found["subtitle"] = Rows(subtitle[index], lengths, [own[row] for row in order], order)
        return found

    def _context(self, seen: Seen) -> PackedContext:
        packed = resolve_backend(self.backend, next(iter(seen.pooled.values())).device) == "fused"
        return self.context(seen.tokens, packed, self.config.pool)

    def _match(self, text: Tensor, context: PackedContext, samples: Sequence[int]) -> Tensor:
        read = self.multimodal_encoder(text, context, samples=samples)
        return self.itm_head(read.first, read.texts.packed)

    def _union(self, seen: Seen) -> Tensor:
        """The feature of all that each sample has: [samples, contra_dim]."""
        parts, order = [], []
        for names, samples in seen.parts().items():
            pools = {}
            for name in names:
                place = {sample: row for row, sample in enumerate(seen.rows[name].samples)}
                x = seen.pooled[name]
                index = torch.tensor([place[sample] for sample in samples], dtype=torch.int64, device=x.device)
                pools[name] = F.embedding(index, x)
            parts.append(self.union_feature(pools))
            order += samples
        found = torch.cat(parts)
        index = torch.tensor(order, dtype=torch.int64, device=found.device)
        return torch.zeros_like(found).index_copy(0, index, found)

    def unread(self, sets: Iterable[Iterable[str]]) -> list[nn.Parameter]:
        """The parameters that ``losses`` does not read of samples with these sets of modalities."""
        seen = [{*names} for names in sets]
        read = {name for names in seen for name in names}
        found: list[nn.Parameter] = [self.vision_encoder.logit_scale]
        for name in self.context_config.modalities:
            found += [] if name in read else self.parameters_of(name)
        unions = self.context_config.unions.items()
        modules: list[nn.Module] = [
            self.get_submodule(f"contra_head_{name}") for name, parts in unions if {*parts} not in seen
        ]
        if read == {"subtitle"}:
            modules.append(self.vision_encoder.visual)
        return found + [parameter for module in modules for parameter in module.parameters()]
