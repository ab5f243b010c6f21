"""BAGEL's packed training (arXiv 2505.14683): a Qwen2 decoder with two experts, ``NAME`` and NAME_moe_gen."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.fusion.experts import (
    Route,
    kind_of,
    parts,
    require_linears,
    require_rms_norms,
    require_silu,
    routed_rms_norm,
)
from onepeace_fast.fusion.family import FusedCall, Refusal, routing_is_chosen
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.ops.routed_ffn import routed_ffn
from onepeace_fast.route_plan import RoutePlan

EPS = "variance_epsilon"
OF_GENERATION = "_moe_gen"
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

EVALUATION = "evaluation: forward_inference is the model's own"
PART_IN_EVALUATION = "layers: some are in evaluation mode while the model trains"
FROZEN = "freeze_und: the understanding expert is cut off from the gradients"
UNKNOWN = "arguments: others than those of forward_train"
KINDS = "packed_sequence, indexes: expected [tokens, width] in the parameters' dtype and vectors of int64 beside it"
NO_PARTITION = "indexes: a token is in both lists or in none, or one twice"
CHANGED_EPS = f"{EPS}: the two experts' differ"


class Routed:
    """What a fused layer gets beside its rows; a plain object, into which no wrapper looks for tensors to cast."""

    def __init__(self, route: Route, of_attention: dict[str, Any]) -> None:
        self.route, self.of_attention = route, of_attention


class Bagel(FusedCall):
    """The decoder, in training: each token's RMSNorms, feed-forward network and residuals over packed rows.

    Tokens are routed once for all layers. Attention is the model's own module, called with the tokens in their own
    order: rotary positions, flex attention or SDPA of each sample, projections and their routing. So is
    ``forward_inference``. It is trusted that feed-forward networks with the parts of Qwen2's compute what those do, and
    that layers of these parts put them together as BAGEL's do.
    """

    family = "BAGEL"

    def __init__(self, root: nn.Module) -> None:
        layers = root.get_submodule("layers")
        attentions = [layer._modules.get("self_attn") for layer in layers.children()]
        super().__init__(root, called=[*layers.children()], whole=[x for x in attentions if x is not None])
        for name in ("forward_train", "forward_inference"):
            if not callable(getattr(root, name, None)):
                raise Refusal(f"{name}: expected a method, got {kind_of(getattr(root, name, None))}")
        if root._modules.get("rotary_emb") is None:
            raise Refusal("rotary_emb: expected a module, got none")
        self.layers: list[Any] = [*layers.children()]
        width = _width(root)
        self.norms = [_pair(root, "norm", width)]
        for i, layer in enumerate(self.layers):
            if attentions[i] is None:
                raise Refusal(f"layers.{i}.self_attn: expected a module, got none")
            self.norms += [_pair(root, f"layers.{i}.{name}", width) for name in LAYER_NORMS]
            self._require_network(root, i, width)
            self.replace(layer, "forward", "layer")

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        own = module._modules
        layers = own.get("layers")
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not {"norm", "norm_moe_gen"} <= own.keys():
            return False
        return all({"self_attn", "mlp", "mlp_moe_gen"} <= layer._modules.keys() for layer in layers)

    def _require_network(self, root: nn.Module, layer: int, width: int) -> None:
        paths = [f"layers.{layer}.mlp{which}" for which in ("", OF_GENERATION)]
        gate, up, down = (require_linears(parts(root, [f"{path}.{name}" for path in paths])) for name in PROJECTIONS)
        for name, got, wanted in (
            ("gate_proj", gate, (gate[0], width)), ("up_proj", up, (gate[0], width)),
            ("down_proj", down, (width, gate[0])),
        ):  # fmt: skip
            if got != wanted:
                raise Refusal(f"{paths[0]}.{name}: expected a weight {[*wanted]}, got {[*got]}")
        for path in paths:
            activation = getattr(network := root.get_submodule(path), "act_fn", None)
            require_silu(f"{path}.act_fn", activation)
            if not isinstance(activation, nn.Module):
                self.structure.watch(path, network, "act_fn")

    def declines(self, *args: Any, **kwargs: Any) -> str:
        root: Any = self.root
        if not root.training:
            return EVALUATION
        if not all([layer.training for layer in self.layers]):
            return PART_IN_EVALUATION
        if any([getattr(layer, "freeze_und", False) for layer in self.layers]) or root.config.freeze_und:
            return FROZEN
        if any([getattr(und, EPS) != getattr(gen, EPS) for und, gen in self.norms]):
            return CHANGED_EPS
        try:
            call = SIGNATURE.bind(self, *args, **kwargs).arguments
        except TypeError:
            return UNKNOWN
        x, und, gen = call["packed_sequence"], call["packed_und_token_indexes"], call.get("packed_gen_token_indexes")
        if not _fits(x, self.norms[0][0].weight, und, gen):
            return KINDS
        if reason := routing_is_chosen(x):
            return reason
        return "" if _is_partition(und, gen, x) else NO_PARTITION

    def forward(
        self, packed_sequence: Tensor, sample_lens: list[int], attention_mask: Any, packed_position_ids: Tensor,
        packed_und_token_indexes: Tensor, packed_gen_token_indexes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        root: Any = self.root
        x, und, gen = packed_sequence, packed_und_token_indexes, packed_gen_token_indexes
        gen = und.new_ones(0) if gen is None else gen
        plan = RoutePlan.from_indices({"und": und, "gen": gen}, x.shape[0], device=x.device)
        position_embeddings = tuple(one.squeeze(0) for one in root.rotary_emb(x, packed_position_ids.unsqueeze(0)))
        route = Route(plan)
        routed = Routed(
            route, {"sample_lens": sample_lens, "packed_und_token_indexes": und, "packed_gen_token_indexes": gen}
        )
        rows = plan.pack(x)
        for layer in root.layers:
            rows = layer(rows, routed, attention_mask, position_embeddings)
        self.count_tokens(x.shape[0], x.shape[0])
        return route.unpack(_normed(rows, root, "norm", plan))

    def layer(self, replacement: Replacement, *args: Any, **kwargs: Any) -> Any:
        """A layer's forward: over packed rows with a plan, else its own."""
        if len(args) > 1 and isinstance(args[1], Routed):
            return self._layer(replacement.module, *args)
        return replacement.original(*args, **kwargs)

    def _layer(
        self, layer: Any, rows: Tensor, routed: Routed, attention_mask: Any, position_embeddings: tuple[Tensor, ...]
    ) -> Tensor:
        plan = routed.route.plan
        attended = layer.self_attn(
            packed_sequence=routed.route.unpack(_normed(rows, layer, LAYER_NORMS[0], plan)),
            attention_mask=attention_mask, packed_position_embeddings=position_embeddings, **routed.of_attention,
        )  # fmt: skip
        rows = rows + plan.pack(attended)
        mlps = (layer.mlp, layer.mlp_moe_gen)
        gate, up, down = ([getattr(mlp, name).weight for mlp in mlps] for name in PROJECTIONS)
        return routed_ffn(
            _normed(rows, layer, LAYER_NORMS[1], plan), gate, up, down, offsets=plan.offsets,
            row_counts=plan.row_counts, residual=rows, activation="silu",
        )  # fmt: skip


SIGNATURE = inspect.signature(Bagel.forward)


def _width(root: nn.Module) -> int:
    weight = getattr(root.get_submodule("norm"), "weight", None)
    if not isinstance(weight, Tensor):
        raise Refusal(f"norm: expected an RMSNorm with {EPS}, got {kind_of(root.get_submodule('norm'))}")
    return weight.shape[-1]


def _pair(root: nn.Module, path: str, width: int) -> tuple[Any, Any]:
    found = parts(root, [path, path + OF_GENERATION])
    require_rms_norms(found, width, EPS)
    return found[0][1], found[1][1]


def _normed(rows: Tensor, module: Any, name: str, plan: RoutePlan) -> Tensor:
    return routed_rms_norm(rows, (getattr(module, name), getattr(module, name + OF_GENERATION)), EPS, plan)


def _fits(x: Any, weight: Tensor, und: Any, gen: Any) -> bool:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype != weight.dtype:
        return False
    indexes = [und] if gen is None else [und, gen]
    return all(
        isinstance(one, Tensor) and one.dim() == 1 and one.dtype == torch.int64 and one.device == x.device
        for one in indexes
    )


def _is_partition(und: Tensor, gen: Tensor | None, x: Tensor) -> bool:
    """Whether each token is in one list, once; on a device the plan's assertion sees to what lengths do not show."""
    indexes = und if gen is None else torch.cat([und, gen])
    if len(indexes) != len(x) or x.device.type != "cpu":
        return len(indexes) == len(x)
    return torch.equal(indexes.sort().values, torch.arange(len(x), device="cpu"))
