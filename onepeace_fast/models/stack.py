"""One stack, encoder or decoder: its adapters and its transformer, run padded (reference) or packed (fused)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onepeace_fast.backend import resolve_backend
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers import AudioAdapter, ImageAdapter, TextAdapter, Transformer
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.models.inputs import Batch, Subset
from onepeace_fast.models.reference import PaddedTokens, encode_padded
from onepeace_fast.route_plan import RoutePlan, draw_keep


class Encoded(NamedTuple):
    """A stack's output: padded {modality: [rows, length, dim]}, or packed rows with their plan."""

    padded: dict[str, Tensor] | None
    packed: Tensor | None
    plan: RoutePlan | None

    def unpacked(self) -> dict[str, Tensor]:
        """{modality: [rows, length, dim]}, CLS first; packed padding comes out as zero."""
        return self.padded if self.padded is not None else self.plan.unpack(self.packed)

    def cls(self, modality: str) -> Tensor:
        """The CLS rows of the only modality, [rows, dim]."""
        if self.padded is not None:
            return self.padded[modality][:, 0]
        return self.packed[self.plan.cu_seqlens[0, 1:].long() - 1]


class Stack(nn.Module):
    """Adapters and transformer under upstream's names. A decoder's adapters hold positions alone."""

    def __init__(self, config: TransformerConfig, backend: str | None, vocab_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        shared = (config.embed_dim, config.attention_heads, config.bias_tables)
        encoder = vocab_size is not None
        if config.text is not None:
            self.text_adapter = TextAdapter(config.text, *shared, vocab_size)
        if config.image is not None:
            self.image_adapter = ImageAdapter(config.image, *shared, stem=encoder)
        if config.audio is not None:
            self.audio_adapter = AudioAdapter(config.audio, *shared, extractor=encoder)
        self.fusion_model = Transformer(config)

    def adapter(self, modality: str) -> Adapter:
        """The adapter of a modality."""
        return self.get_submodule(f"{modality}_adapter")

    @property
    def adapters(self) -> dict[str, Adapter]:
        """All adapters, in the order of a sequence."""
        return {name: self.adapter(name) for name in self.config.modalities}

    @property
    def resolved_backend(self) -> str:
        """The backend in force for this stack's device."""
        return resolve_backend(self.backend, next(self.parameters()).device)

    def embed(self, batch: Batch, kept: Subset | None = None) -> dict[str, PaddedTokens]:
        """Embed every modality; with ``kept`` only those tokens, side by side."""
        return {name: self._embed(name, batch, kept) for name in self.config.modalities if name in batch.inputs}

    def _embed(self, name: str, batch: Batch, kept: Subset | None) -> PaddedTokens:
        valid, value = batch.valid.masks[name], batch.inputs[name]
        if kept is None:
            return PaddedTokens(self.adapter(name)(value), valid, None, valid.shape[1])
        width = max(kept.lengths[name], default=1)
        present, ids = kept_ids(kept.masks[name], width)
        return PaddedTokens(self.adapter(name)(value, ids), present, ids, valid.shape[1])

    def draw_drop_path(self, samples: int, device: torch.device) -> Tensor | None:
        """DropPath's factors of one pass, or None where nothing is dropped."""
        if not (self.training and self.config.drop_path_rate):
            return None
        return draw_keep(self.fusion_model.drop_path_rates, samples, device)

    def plan(
        self,
        tokens: Mapping[str, PaddedTokens],
        lengths: Mapping[str, Sequence[int]],
        samples: Mapping[str, Sequence[int]] | None,
    ) -> RoutePlan:
        """The route plan of padded tokens; nothing is read back from the device."""
        widths = {name: part.width for name, part in tokens.items()}
        codes = {name: self.adapter(name).codes(width) for name, width in widths.items()}
        return RoutePlan.from_masks(
            {name: part.valid for name, part in tokens.items()},
            positions={name: part.ids for name, part in tokens.items() if part.ids is not None},
            codes={name: code for name, code in codes.items() if code is not None},
            code_offsets={name: self.adapter(name).code_offset(width) for name, width in widths.items()},
            samples=samples,
            lengths=lengths,
        )

    def bias(self, widths: Mapping[str, int]) -> list[list[Tensor]]:
        """Per table, the modalities' expanded vectors; empty without a bias."""
        if not self.config.bias_tables:
            return []
        vectors = [self.adapter(name).bias_vectors(width) for name, width in widths.items()]
        return [list(table) for table in zip(*vectors, strict=True)]

    def forward(
        self,
        tokens: Mapping[str, PaddedTokens],
        lengths: Mapping[str, Sequence[int]],
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> Encoded:
        """Encode embedded tokens; ``lengths`` counts each row's real tokens on the host."""
        first = next(iter(tokens.values()))
        count = first.x.shape[0] if samples is None else len(set().union(*map(set, samples.values())))
        keep = self.draw_drop_path(count, first.x.device)
        if self.resolved_backend == "reference":
            return Encoded(encode_padded(self.fusion_model, self.adapters, tokens, samples, keep), None, None)
        plan = self.plan(tokens, lengths, samples)
        return self.encode_packed(plan.pack({name: part.x for name, part in tokens.items()}), plan, keep, tokens)

    def encode_packed(
        self, x: Tensor, plan: RoutePlan, keep: Tensor | None, tokens: Mapping[str, PaddedTokens]
    ) -> Encoded:
        """Run packed rows through the transformer."""
        plan = plan if keep is None else plan.with_keep(keep)
        bias = self.bias({name: part.width for name, part in tokens.items()})
        return Encoded(None, self.fusion_model(x, plan, bias), plan)


def kept_ids(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Position ids of the True entries of each row, ascending: whether each is real, and the ids, [rows, width] each.

    Short rows are filled with position ``width - 1``: the audio position convolutions see that frame, as upstream's do.
    """
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    present = torch.arange(width, device=mask.device) < mask.sum(1, keepdim=True)
    return present, torch.where(present, order, width - 1)
