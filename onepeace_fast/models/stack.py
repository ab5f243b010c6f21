"""One stack, encoder or decoder: its adapters and its transformer, run padded (reference) or packed (fused)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from onepeace_fast.backend import resolve_backend
from onepeace_fast.checks import require
from onepeace_fast.config import TransformerConfig
from onepeace_fast.drop_path import draw_keep
from onepeace_fast.layers import AudioAdapter, ImageAdapter, TextAdapter, Transformer
from onepeace_fast.layers.adapter import Adapter
from onepeace_fast.layers.plain import inside, is_watched, unfused, watched_everywhere
from onepeace_fast.models.inputs import Batch, Subset
from onepeace_fast.models.parameters import is_sharded
from onepeace_fast.models.passes import Encoded, PaddedTokens, Part, Samples, join, sample_count, split
from onepeace_fast.models.reference import encode_padded
from onepeace_fast.route_plan import RoutePlan


class Stack(nn.Module):
    """Adapters and transformer under upstream's names. A decoder's adapters hold positions alone.

    ``adapters`` are those of the configuration's added modalities.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: str | None,
        vocab_size: int | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
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
        for name in config.added:
            self.add_module(f"{name}_adapter", adapters[name])
        self.fusion_model = Transformer(config)

    def embedder(self, modality: str) -> nn.Module:
        """What embeds a modality when it is called: its adapter, or what a user put around it."""
        return self.get_submodule(f"{modality}_adapter")

    def adapter(self, modality: str) -> Adapter:
        """The adapter of a modality, inside whatever is around it."""
        return inside(self.embedder(modality), Adapter)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """All adapters, in the order of a sequence."""
        return {name: self.adapter(name) for name in self.config.modalities}

    @property
    def resolved_backend(self) -> str:
        """The backend in force for this stack's device."""
        return resolve_backend(self.backend, next(self.parameters()).device)

    def tokens(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings without positions, which all passes of a step share, of the adapters that nothing watches.

        The others are called for every pass; with the reference backend all of them are, as upstream does.
        """
        if self.resolved_backend == "reference":
            return {}
        modules = {name: self.embedder(name) for name in batch.inputs}
        shared = [name for name, module in modules.items() if _embeds_in_two_steps(f"{name}_adapter", module)]
        return {name: self.adapter(name).tokens(batch.inputs[name]) for name in shared}

    def embed(self, batch: Batch, kept: Subset | None = None, tokens: Mapping[str, Tensor] | None = None) -> Part:
        """Embed every modality of the batch with positions; with ``kept`` only those tokens, side by side.

        ``tokens`` holds what is embedded already.
        """
        part = {}
        for name, value in batch.inputs.items():
            present, lengths, ids = batch.valid.masks[name], batch.valid.lengths[name], None
            width = present.shape[1]
            if kept is not None:
                lengths = kept.lengths[name]
                present, ids = kept_ids(kept.masks[name], max(lengths, default=1))
            if tokens and name in tokens:
                x = self.adapter(name).place(tokens[name], ids)
            else:
                x = self.embedding(name, value, ids)
            part[name] = PaddedTokens(x, present, lengths, ids, width)
        return part

    def draw_drop_path(self, samples: int) -> Tensor | None:
        """DropPath's factors of one pass, on the CPU, or None where nothing is dropped."""
        if not (self.training and self.config.drop_path_rate):
            return None
        return draw_keep(inside(self.fusion_model, Transformer).drop_path_rates, samples)

    def plan(self, tokens: Part, samples: Samples | None = None) -> RoutePlan:
        """The route plan of padded tokens; nothing is read back from the device."""
        widths = {name: part.width for name, part in tokens.items()}
        codes = {name: self.adapter(name).codes(width) for name, width in widths.items()}
        return RoutePlan.from_masks(
            {name: part.valid for name, part in tokens.items()},
            first_is_cls=True,
            positions={name: part.ids for name, part in tokens.items() if part.ids is not None},
            codes={name: code for name, code in codes.items() if code is not None},
            code_offsets={name: self.adapter(name).code_offset(width) for name, width in widths.items()},
            samples=samples,
            lengths={name: part.lengths for name, part in tokens.items()},
        )

    def embedding(self, name: str, *arguments: Tensor | None) -> Tensor:
        """What a modality's adapter makes of its arguments, called as it stands."""
        module = self.embedder(name)
        if not is_watched(module):  # what gathers its own parameters does so by hooks
            self._require_whole(name, self.adapter(name).cls_embedding)
        return module(*arguments)

    def bias(self, widths: Mapping[str, int]) -> list[list[Tensor]]:
        """Per table, the modalities' expanded vectors; empty without a bias."""
        if not self.config.bias_tables:
            return []
        for name in widths:
            self._require_whole(name, *self.adapter(name).rel_pos_table_list.parameters())
        vectors = [self.adapter(name).bias_vectors(width) for name, width in widths.items()]
        return [list(table) for table in zip(*vectors, strict=True)]

    def _require_whole(self, modality: str, *parameters: Tensor) -> None:
        require(
            not any(map(is_sharded, parameters)),
            f"{modality}_adapter: expected whole parameters where they are read, got sharded ones; give fully_shard "
            "the layers and the whole model, whose logit_scale it ignores, not a stack or an adapter",
        )

    def forward(self, passes: Sequence[Part], samples: Samples | None = None) -> list[Encoded]:
        """Encode the embedded tokens of each pass: packed as one call of the transformer, padded one after another."""
        if self.resolved_backend == "reference":
            keeps = self._draw_drop_paths(passes, samples)
            return [
                Encoded(padded=encode_padded(self.fusion_model, self.adapters, part, samples, keep))
                for part, keep in zip(passes, keeps, strict=True)
            ]
        joined, sample_of = join(passes, samples, self.config.modalities)
        plan = self.plan(joined, sample_of)
        x = plan.pack({name: part.x for name, part in joined.items()})
        return self.encode_packed(x, plan, passes, samples)

    def encode_packed(
        self, x: Tensor, plan: RoutePlan, passes: Sequence[Part], samples: Samples | None = None
    ) -> list[Encoded]:
        """Run the packed rows [C, dim] of joined passes through the transformer."""
        keeps = self._draw_drop_paths(passes, samples)
        if keeps[0] is not None:
            plan = plan.with_keep(torch.cat(keeps, dim=2))
        widths = {name: part.width for one in passes for name, part in one.items()}
        packed = self.fusion_model(x, plan, self.bias({name: widths[name] for name in plan.modalities}))
        return split(packed, plan, passes, samples)

    def _draw_drop_paths(self, passes: Sequence[Part], samples: Samples | None) -> list[Tensor | None]:
        """DropPath's factors of each pass, all drawn before the first runs."""
        return [self.draw_drop_path(sample_count(part, samples)) for part in passes]


def _embeds_in_two_steps(part: str, module: nn.Module) -> bool:
    """Whether calling a module does ``tokens``, then ``place``, and no more; where not, say so once."""
    plain = isinstance(module, Adapter) and type(module).forward is Adapter.forward and not is_watched(module)
    if plain and module._compiled_call_impl is None and not watched_everywhere():
        return True
    unfused(part, module, type(module) if isinstance(module, Adapter) else Adapter)
    return False


def kept_ids(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Position ids of the True entries of each row, ascending: whether each is real, and the ids, [rows, width] each.

    Short rows are filled with position ``width - 1``: the audio position convolutions see that frame, as upstream's do.
    """
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    present = torch.arange(width, device=mask.device) < mask.sum(1, keepdim=True)
    return present, torch.where(present, order, width - 1)
