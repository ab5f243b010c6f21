"""One stack, encoder or decoder: its adapters and its transformer, run padded (reference) or packed (fused)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.backend import requested_backend, resolve_backend
from onepeace_fast.checks import require
from onepeace_fast.config import TransformerConfig
from onepeace_fast.drop_path import draw_drop_path
from onepeace_fast.layers import AudioAdapter, ImageAdapter, TextAdapter, Transformer
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.layers.plain import inside, is_watched, unfused, watched_everywhere
from onepeace_fast.models.choice import choose
from onepeace_fast.models.inputs import Batch, Subset
from onepeace_fast.models.parameter_names import is_sharded
from onepeace_fast.models.passes import Encoded, PaddedTokens, Samples, Tokens, join, sample_count, split
from onepeace_fast.models.reference import encode_padded
from onepeace_fast.ops.operation import is_untransformed
from onepeace_fast.route_plan import RoutePlan

PLANS_KEPT = 8
PAIRS_OF_A_KEPT_PLAN = 2**16  # what attention keeps of so many takes half a megabyte, and 256 KiB for each head


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
            self.add_module(f"{name}_adapter", (adapters or {})[name])
        self.fusion_model = Transformer(config)
        self._plans: dict[tuple[Any, ...], RoutePlan] = {}

    def embedder(self, modality: str) -> nn.Module:
        """What embeds a modality when it is called: its adapter, or what a user put around it."""
        return self.get_submodule(f"{modality}_adapter")

    def adapter(self, modality: str) -> Adapter:
        """The adapter of a modality, inside whatever is around it."""
        return inside(self.embedder(modality), Adapter)  # type: ignore[type-abstract]

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

    def embed(self, batch: Batch, visible: Subset | None = None, tokens: Mapping[str, Tensor] | None = None) -> Tokens:
        """Embed every modality of the batch with positions; of ``visible`` only those tokens, side by side.

        ``tokens`` holds what is embedded already.
        """
        result = {}
        for name, value in batch.inputs.items():
            valid, lengths, ids = batch.valid.masks[name], batch.valid.lengths[name], None
            width = valid.shape[1]
            if visible is not None:
                lengths = visible.lengths[name]
                valid, ids = visible_ids(visible.masks[name], max(lengths, default=1))
            if tokens and name in tokens:
                x = self.adapter(name).place(tokens[name], ids)
            else:
                x = self.embedding(name, value, ids)
            adapter = self.adapter(name)
            if ids is None and adapter.position_count is not None:
                ids, width = adapter.position_ids(value), adapter.position_count
            result[name] = PaddedTokens(x, valid, lengths, ids, width)
        return result

    def among_mask_tokens(
        self, mask_tokens: Mapping[str, Tensor], batch: Batch, visible: Tokens, encoded: Encoded
    ) -> Tokens:
        """A decoder's input: what is encoded of the visible tokens, mask tokens elsewhere, and positions.

        Upstream masks padding through the bias alone: a decoder without bias attends to its padding, zeroed at first.
        """
        result = {}
        for name, seen in visible.items():
            x, place = encoded.rows_of(name, seen)
            valid, lengths = batch.valid.masks[name], batch.valid.lengths[name]
            x = mask_tokens[name].to(x.dtype).repeat(valid.numel(), 1).index_copy(0, place, x)
            x = self.embedding(name, x.view(*valid.shape, x.shape[1]))
            if sum(lengths) < valid.numel():
                x = x * valid[..., None].to(x.dtype)
            if not self.config.use_bias:
                valid, lengths = torch.ones_like(valid), [valid.shape[1]] * valid.shape[0]
            result[name] = PaddedTokens(x, valid, lengths, None, valid.shape[1])
        return result

    def plan(self, tokens: Tokens, samples: Samples | None = None) -> RoutePlan:
        """The route plan of padded tokens; nothing is read back from the device.

        On a CPU the last plans of few tokens without padding are kept, and with them what attention makes of a plan.
        """
        if samples is not None or not _are_whole(tokens):
            return self._new_plan(tokens, samples)
        key = tuple((name, self.adapter(name), *one.valid.shape, one.width) for name, one in tokens.items())
        plan = self._plans.pop(key, None)
        if plan is None:
            with torch.inference_mode(False):  # it is kept for what has gradients, too
                plan = self._new_plan({
                    name: one._replace(valid=torch.ones(one.valid.shape, dtype=torch.bool, device=one.valid.device))
                    for name, one in tokens.items()
                })  # fmt: skip
        self._plans[key] = plan  # the last is the one used last
        for oldest in [*self._plans][:-PLANS_KEPT]:
            self._plans.pop(oldest, None)
        return plan

    def _new_plan(self, tokens: Tokens, samples: Samples | None = None) -> RoutePlan:
        adapters = {name: self.adapter(name) for name in tokens}
        codes = {
            name: adapter.remembered("codes", tokens[name].width, adapter.codes) for name, adapter in adapters.items()
        }
        return RoutePlan.from_masks(
            {name: padded.valid for name, padded in tokens.items()},
            first_is_cls=True,
            positions={name: padded.ids for name, padded in tokens.items() if padded.ids is not None},
            codes={name: code for name, code in codes.items() if code is not None},
            code_offsets={name: adapters[name].code_offset(padded.width) for name, padded in tokens.items()},
            samples=samples,
            lengths={name: padded.lengths for name, padded in tokens.items()},
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

    def forward(self, passes: Sequence[Tokens], samples: Samples | None = None) -> list[Encoded]:
        """Encode the embedded tokens of each pass: packed as one call of the transformer, padded one after another."""
        drop_path = self._draw_drop_path(passes, samples)
        if self.resolved_backend == "reference":
            return self._padded(passes, samples, drop_path)
        if self._may_choose(passes) and choose(self.config, passes, samples).backend == "reference":
            # As the packed rows come out, so that a choice by lengths changes no result.
            return [
                one.without_padding(tokens)
                for one, tokens in zip(self._padded(passes, samples, drop_path), passes, strict=True)
            ]
        tokens, sample_of = passes[0], samples
        if len(passes) > 1:
            tokens, sample_of = join(passes, samples, self.config.modalities)
        plan = self.plan(tokens, sample_of)
        if drop_path[0] is not None:
            plan = plan.with_drop_path(torch.cat(drop_path, dim=2))  # type: ignore[arg-type]  # of all passes or none
        x = plan.pack({name: padded.x for name, padded in tokens.items()})
        packed = self.fusion_model(x, plan, self.bias({name: padded.width for name, padded in tokens.items()}))
        return split(packed, plan, passes, samples)

    def _padded(
        self, passes: Sequence[Tokens], samples: Samples | None, drop_path: Sequence[Tensor | None]
    ) -> list[Encoded]:
        return [
            Encoded(padded=encode_padded(self.fusion_model, self.adapters, tokens, samples, own))
            for tokens, own in zip(passes, drop_path, strict=True)
        ]

    def _may_choose(self, passes: Sequence[Tokens]) -> bool:
        """Whether the backend may depend on the batch: none was asked for, on a CPU, and both draw the same numbers."""
        if requested_backend(self.backend) or torch.compiler.is_compiling():
            return False
        draws = self.training and self.config.dropout > 0
        return next(iter(passes[0].values())).x.device.type == "cpu" and not draws

    def _draw_drop_path(self, passes: Sequence[Tokens], samples: Samples | None) -> list[Tensor | None]:
        """DropPath's factors of each pass, on the CPU, all drawn before the first runs; None where none is dropped."""
        if not (self.training and self.config.drop_path_rate):
            return [None] * len(passes)
        rates = inside(self.fusion_model, Transformer).drop_path_rates
        return [draw_drop_path(rates, sample_count(tokens, samples)) for tokens in passes]


def _are_whole(tokens: Tokens) -> bool:
    """Whether a plan of these may be kept: few tokens on a CPU, all of them real, in plain eager execution."""
    shapes = [one.valid.shape for one in tokens.values()]
    pairs = max(rows for rows, _ in shapes) * sum(length for _, length in shapes) ** 2
    if pairs > PAIRS_OF_A_KEPT_PLAN or torch.compiler.is_compiling() or not is_untransformed(()):
        return False
    return all(
        ids is None and valid.device.type == "cpu" and lengths == [valid.shape[1]] * valid.shape[0] and valid.all()
        for _, valid, lengths, ids, _ in tokens.values()
    )


def _embeds_in_two_steps(part: str, module: nn.Module) -> bool:
    """Whether calling a module does ``tokens``, then ``place``, and no more; where not, say so once."""
    plain = isinstance(module, Adapter) and type(module).forward is Adapter.forward and not is_watched(module)
    if plain and module._compiled_call_impl is None and not watched_everywhere():
        return True
    unfused(part, module, type(module) if isinstance(module, Adapter) else Adapter)
    return False


def visible_ids(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Position ids of the True entries of each row, ascending: whether each is real, and the ids, [rows, width] each.

    Short rows are filled with position ``width - 1``: the audio position convolutions see that frame, as upstream's do.
    """
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    valid = torch.arange(width, device=mask.device) < mask.sum(1, keepdim=True)
    return valid, torch.where(valid, order, width - 1)
