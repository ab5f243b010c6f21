"""The public code of ONE-PEACE (arXiv 2305.11172): its adapters and its encoder, whose padding is not computed.

Recognised by the names and kinds of modules, and by what their attributes hold: scale, activation, dropout, the bias's
buckets. Trusted is that their code reads these as the public one does: the order of a layer's steps, the encoder's
``forward``, and that an adapter hands on the list of its ``get_rel_pos_bias``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.drop_path import Branch, Branches, branches
from onepeace_fast.fusion.families.one_peace_bias import TABLE_SETTINGS, AdapterBias, PositionBias
from onepeace_fast.fusion.families.one_peace_layer import Packed, SharedLayer, norm
from onepeace_fast.fusion.family import TOO_LITTLE_PADDING, FusedCall, Refusal, packing_is_chosen
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.fusion.structure import is_sharded
from onepeace_fast.layers.norms import normalized_by_modality
from onepeace_fast.layers.parameters import with_unread
from onepeace_fast.route_plan import RoutePlan

MODALITIES = ("text", "image", "audio")
MODALITIES_OF = {
    "text": ("text",), "image": ("image",), "audio": ("audio",), "vl": ("text", "image"), "al": ("text", "audio"),
}  # fmt: skip
Info = tuple[Tensor, Tensor, Any]
"""What an adapter gives: tokens [B, L, dim], padding bool [B, L], and the list of biases or None."""


class OnePeaceEncoder(FusedCall):
    """A ``fusion_model`` and the adapters beside it; the encoder's call is fused."""

    family = "ONE-PEACE"

    def __init__(self, root: Any) -> None:
        if not isinstance(getattr(root, "fusion_model", None), nn.Module):
            raise Refusal(
                "an encoder alone: expected it as fusion_model of a module with its adapters, whose tables hold the "
                "bias; fuse that module"
            )
        encoder = root.fusion_model
        if type(encoder.layers) is not nn.ModuleList:
            raise Refusal(
                f"fusion_model.layers: expected a ModuleList, got {type(encoder.layers).__name__}; LayerDrop is not "
                "known, set encoder_layerdrop to 0"
            )
        layers = list(encoder.layers)
        for number, layer in enumerate(layers):
            if "forward" in layer.__dict__:
                raise Refusal(
                    f"fusion_model.layers.{number}: expected the class's forward, got one of its own; fuse first, then "
                    "put torch's checkpoint_wrapper around it"
                )
        self.modalities = [name for name in MODALITIES if hasattr(layers[0], f"{name}_ffn")]
        first: Any = layers[0]
        if not self.modalities:
            raise Refusal("fusion_model.layers.0: expected text_ffn, image_ffn or audio_ffn, got none of them")
        self.heads, self.dim = int(encoder.num_attention_heads), int(first.self_attn.embed_dim)
        self.layers = [
            SharedLayer(f"fusion_model.layers.{number}", layer, self.dim, self.modalities)
            for number, layer in enumerate(layers)
        ]
        for number, shared in enumerate(self.layers):
            if shared.self_attn.heads != self.heads or shared.hidden != self.layers[0].hidden:
                raise Refusal(f"fusion_model.layers.{number}: expected the heads and widths of all layers, got others")
        adapters = {}
        for name in self.modalities:
            norm("fusion_model", encoder, f"{name}_layer_norm", self.dim)
            if (adapter := getattr(root, f"{name}_adapter", None)) is None:
                raise Refusal(f"{name}_adapter: expected the adapter whose tables hold the bias, got none")
            adapters[name] = AdapterBias(f"{name}_adapter", adapter, name == "image", self.heads, len(layers))
        self.encoder = encoder
        called = [encoder, *layers, *(bias.adapter for bias in adapters.values())]
        super().__init__(root, called=called, entry=encoder)
        for number, layer in enumerate(layers):
            path = f"fusion_model.layers.{number}"
            self.structure.watch(
                f"{path}.self_attn", layer.get_submodule("self_attn"), "scaling", "num_heads", "head_dim"
            )
            for name in self.modalities:
                act = layer.get_submodule(f"{name}_ffn.0.act")
                self.structure.watch(f"{path}.{name}_ffn.0.act", act, "approximate")
        for bias in adapters.values():
            tables: Any = bias.adapter.rel_pos_table_list if bias.has_bias else ()
            for number, table in enumerate(tables):
                self.structure.watch(f"{bias.path}.rel_pos_table_list.{number}", table, *TABLE_SETTINGS)
        for shared, layer in zip(self.layers, layers, strict=True):
            self.replacements.append(Replacement(shared, layer, "forward", "in_place_of"))
        for bias in adapters.values():
            if bias.has_bias:
                self.replacements.append(Replacement(bias, bias.adapter, "get_rel_pos_bias", "bias"))
                self.replacements.append(Replacement(bias, bias.adapter, "gather_features", "gathered"))

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        encoder = module._modules.get("fusion_model", module)
        layers = getattr(encoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(encoder, "num_attention_heads"):
            return False
        parts = ("self_attn", "self_attn_layer_norm", "final_layer_norm")
        direct = ("drop_path_prob", "dropout_prob", "gamma_1", "gamma_2")
        of_attention = ("embed_dim", "num_heads", "head_dim", "scaling", "dropout_p")
        return all(
            all(hasattr(layer, name) for name in (*parts, *direct))
            and all(hasattr(layer.self_attn, name) for name in of_attention)
            for layer in layers._modules.values()  # LayerDrop draws numbers where it is iterated
        )

    def declines(
        self, text_info: Info | None, image_info: Info | None, audio_info: Info | None,
        return_all_hiddens: bool = False, encoder_type: str | None = None,
    ) -> str:  # fmt: skip
        infos = _given(text_info, image_info, audio_info)
        names = MODALITIES_OF.get(encoder_type or "", ())
        if tuple(infos) != names or not set(names) <= set(self.modalities):
            return "encoder_type: expected text, image, audio, vl or al with these modalities' tokens alone"
        if any([layer.draws_dropout for layer in self.layers]):
            return "dropout in training: its random numbers are drawn by the model's own code"
        biases = [bias for _, _, bias in infos.values()]
        has_bias = biases[0] is not None
        foreign = any([not (bias is None or isinstance(bias, PositionBias)) for bias in biases])
        if foreign or any([(bias is not None) is not has_bias for bias in biases]):
            return "the bias is not that of the model's own adapters"
        if len({1 if bias is None else len(bias) for bias in biases}) > 1:
            return "the adapters have different numbers of bias tables"
        batch = next(iter(infos.values()))[0].shape[0]
        for x, padding, bias in infos.values():
            if padding.dtype != torch.bool or padding.shape != x.shape[:2] or x.shape[0] != batch or not batch:
                return "padding: expected bool [batch, length] of each modality's tokens"
            if bias is not None and bias.length != x.shape[1]:
                return "the bias is of another length than the tokens"
        x = next(iter(infos.values()))[0]
        if x.device.type != "cpu":
            return ""
        padded = sum([padding.numel() for _, padding, _ in infos.values()])
        hidden = sum([int(padding.sum()) for _, padding, _ in infos.values()]) if has_bias else 0
        of_a_row = 2 * self.dim * (4 * self.dim + 3 * (self.layers[0].hidden or 0))
        if not packing_is_chosen(x, padded, padded - hidden, of_a_row):
            return TOO_LITTLE_PADDING
        if not all([_has_cls_first(padding, bias) for _, padding, bias in infos.values()]):
            return "preserve_ids: expected 0, CLS, first and nowhere else"
        return ""

    def forward(
        self, text_info: Info | None, image_info: Info | None, audio_info: Info | None,
        return_all_hiddens: bool = False, encoder_type: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        infos = _given(text_info, image_info, audio_info)
        tokens = {name: x for name, (x, _, _) in infos.items()}
        biases: dict[str, PositionBias] = {name: bias for name, (_, _, bias) in infos.items() if bias is not None}
        masks = {name: ~padding for name, (_, padding, _) in infos.items()}
        if not biases:
            # The bias holds the mask: without one padding is seen, zeroed at first.
            tokens = {name: x * masks[name][..., None].to(x.dtype) for name, x in tokens.items()}
            masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
        plan = RoutePlan.from_masks(
            masks,
            first_is_cls=bool(biases),
            positions={name: bias.positions for name, bias in biases.items() if bias.positions is not None},
            codes={name: bias.codes for name, bias in biases.items() if bias.codes is not None},
            code_offsets={name: bias.code_offset for name, bias in biases.items()},
        )
        self.count_tokens(plan.padded_rows, plan.capacity)
        x = plan.pack(tokens)
        drop_path = self._draw_drop_path(x, plan.sample_count)
        routes = [Branches(Branch(plan), Branch(plan))] * len(self.layers)
        if drop_path is not None:
            plan = plan.with_drop_path(drop_path)
            routes = branches(plan)
        tables = [*zip(*(bias.vectors for bias in biases.values()), strict=True)]
        states: dict[str, list[Tensor]] = {name: [] for name in MODALITIES}
        for number, layer in enumerate(self.encoder.layers):
            vectors = tables[number if len(tables) > 1 else 0] if tables else ()
            x = layer(x, Packed(routes[number]), *vectors)
            if return_all_hiddens:
                for name, padded in plan.unpack(x).items():
                    states[name].append(padded.transpose(0, 1))
        x = with_unread(self._normalized(x, plan), *self._unread(plan.modalities))
        paddings = [padding for _, padding, _ in infos.values()]
        return {
            "encoder_out": [torch.cat([*plan.unpack(x).values()], dim=1).transpose(0, 1)],
            "encoder_padding_mask": paddings[0] if len(paddings) == 1 else torch.cat(paddings, dim=1),
            **{f"{name}_encoder_states": of for name, of in states.items()},
        }

    def _unread(self, modalities: Collection[str]) -> Iterator[nn.Parameter]:
        """In FSDP2 the parameters of the modalities that are not there, outside the layers."""
        if any(map(is_sharded, (self.root, self.encoder, *self.encoder.layers))):
            for name in set(self.modalities) - set(modalities):
                for module in (getattr(self.root, f"{name}_adapter"), getattr(self.encoder, f"{name}_layer_norm")):
                    yield from () if module is None else module.parameters()

    def _draw_drop_path(self, x: Tensor, samples: int) -> Tensor | None:
        """DropPath's factors, float32 [layers, 2, samples], by the numbers that the layers would draw one by one."""
        rates = [layer.drop_path_rate for layer in self.layers]
        if not any(rates):
            return None
        factors = x.new_ones(len(rates), 2, samples)
        for of_layer, rate in zip(factors, rates, strict=True):
            if rate:
                for of_branch in of_layer:
                    of_branch.copy_(x.new_empty(1, samples, 1).bernoulli_(1 - rate).div_(1 - rate).flatten())
        return factors.float()

    def _normalized(self, x: Tensor, plan: RoutePlan) -> Tensor:
        norms = {name: getattr(self.encoder, f"{name}_layer_norm") for name in plan.modalities}
        if all(norm is None for norm in norms.values()):
            return x
        return normalized_by_modality(x, plan, lambda name: nn.Identity() if norms[name] is None else norms[name])


def _given(text: Info | None, image: Info | None, audio: Info | None) -> Mapping[str, Info]:
    """What is there, by modality, in the order of a sequence."""
    found = zip(MODALITIES, (text, image, audio), strict=True)
    return {name: info for name, info in found if info is not None}


def _has_cls_first(padding: Tensor, bias: PositionBias | None) -> bool:
    """Whether of visible positions 0 is in the first column, and nowhere else."""
    if bias is None or bias.positions is None:
        return True
    first = torch.arange(padding.shape[1], device=padding.device) == 0
    return bool((((bias.positions == 0) == first) | padding).all())
