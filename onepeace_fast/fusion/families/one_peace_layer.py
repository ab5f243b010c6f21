"""This library's layer over packed rows with the modules of upstream's: no parameter of its own, none kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from onepeace_fast.drop_path import Branches
from onepeace_fast.fusion.family import Refusal
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.fusion.structure import is_sharded
from onepeace_fast.layers.parameters import with_unread
from onepeace_fast.layers.transformer import GeGLU, SelfAttention, TransformerLayer

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Packed:
    """What a layer takes with packed rows beside the bias vectors: no tree of tensors, so that nobody casts them."""

    branches: Branches


class SharedAttention(SelfAttention):
    """``SelfAttention`` of the modules of upstream's attention."""

    source: nn.Module

    def __init__(self, path: str, source: Any, dim: int) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "source", source)  # no submodule
        self.heads, self.head_dim = source.num_heads, source.head_dim
        if self.heads * self.head_dim != dim or source.scaling != self.head_dim**-0.5:
            raise Refusal(
                f"{path}: expected heads over {dim} columns, scaled by head_dim ** -0.5, got {self.heads} of "
                f"{self.head_dim}, scaled by {source.scaling}"
            )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, linear(path, source, name, dim, dim))
        if self.k_proj.bias is not None:
            raise Refusal(f"{path}.k_proj: expected no bias, got one")
        self.ln = norm(path, source, "ln", dim)
        direct(path, source, "c_attn", self.heads)

    @property
    def c_attn(self) -> Tensor | None:  # type: ignore[override]  # a parameter there
        """The heads' factors as they are now."""
        return self.source.c_attn  # type: ignore[return-value]


class SharedLayer(TransformerLayer):
    """``TransformerLayer`` of the modules of upstream's layer; ``in_place_of`` stands for its ``forward``.

    Args:
        path: of the layer, for messages.
        source: the layer.
        dim: its width.
        modalities: those that have an FFN in it.

    Raises:
        Refusal: modules that are not upstream's.
    """

    source: nn.Module

    def __init__(self, path: str, source: Any, dim: int, modalities: Collection[str]) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "source", source)
        self.modalities = modalities
        self.dropout = 0.0  # where the user's layer has some, calls keep its own code
        self.self_attn = SharedAttention(f"{path}.self_attn", source.self_attn, dim)
        self.self_attn_layer_norm = required_norm(path, source, "self_attn_layer_norm", dim)
        self.attn_ln = norm(path, source, "attn_ln", dim)
        self.final_layer_norm = required_norm(path, source, "final_layer_norm", dim)
        self.dropouts = [dropout(f"{path}.self_attn", source.self_attn, "dropout_module")]
        hidden = None
        for modality in modalities:
            name = f"{path}.{modality}_ffn"
            parts = child(path, source, f"{modality}_ffn", nn.Sequential)
            if len(parts) != 4:
                raise Refusal(f"{name}: expected GeGLU, dropout, norm and projection, got {len(parts)} modules")
            wi_0 = linear(f"{name}.0", parts[0], "wi_0", None, dim)
            hidden = wi_0.out_features if hidden is None else hidden
            gate = _gate(f"{name}.0", parts[0], hidden, dim)
            self.dropouts.append(dropout(name, parts, "1"))
            inner = parts[2] if type(parts[2]) is nn.Identity else required_norm(name, parts, "2", hidden)
            out = linear(name, parts, "3", dim, hidden)
            self.add_module(f"{modality}_ffn", nn.Sequential(gate, nn.Identity(), inner, out))
        self.hidden = hidden
        for name in ("gamma_1", "gamma_2"):
            direct(path, source, name, dim)
        rate = source.drop_path_prob
        if not (isinstance(rate, float | int) and 0 <= rate < 1):
            raise Refusal(f"{path}.drop_path_prob: expected a probability in [0, 1), got {rate!r}")

    @property
    def gamma_1(self) -> Tensor | None:  # type: ignore[override]  # a parameter there
        """The attention's LayerScale as it is now."""
        return self.source.gamma_1  # type: ignore[return-value]

    @property
    def gamma_2(self) -> Tensor | None:  # type: ignore[override]
        """The FFN's LayerScale as it is now."""
        return self.source.gamma_2  # type: ignore[return-value]

    def in_place_of(self, replacement: Replacement, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """The layer over packed rows [C, dim], with bias vectors; any other call is the user's layer's own."""
        if not (arguments and isinstance(arguments[0], Packed)):
            return replacement.original(x, *arguments, **keywords)
        packed, *vectors = arguments  # vectors one by one, so that reentrant checkpoints see them
        attention, feed_forward = packed.branches
        out = self.packed(x, attention, feed_forward, vectors, None)
        if not is_sharded(self.source):
            return out
        unread = [self.ffn(name) for name in self.modalities if name not in feed_forward.plan.modalities]
        return with_unread(out, *(parameter for ffn in unread for parameter in ffn.parameters()))

    @property
    def draws_dropout(self) -> bool:
        """Whether a call draws numbers of dropout, which this layer does not know."""
        source: Any = self.source
        own = source.training and (source.dropout_prob or source.self_attn.dropout_p)
        return bool(own) or any([_draws(module) for module in self.dropouts])

    @property
    def drop_path_rate(self) -> float:
        """DropPath's probability in this call."""
        return self.source.drop_path_prob if self.source.training else 0.0  # type: ignore[return-value]


def _gate(path: str, source: Any, hidden: int, dim: int) -> GeGLU:
    gate = GeGLU.__new__(GeGLU)
    nn.Module.__init__(gate)
    for name in ("wi_0", "wi_1"):
        module = linear(path, source, name, hidden, dim)
        if module.bias is not None:
            raise Refusal(f"{path}.{name}: expected no bias, got one")
        setattr(gate, name, module)
    activation = child(path, source, "act", nn.GELU)
    if activation.approximate != "none":
        raise Refusal(f"{path}.act: expected a GELU by erf, got {activation}")
    return gate


def _draws(module: Any) -> bool:
    return bool(getattr(module, "p", 0) and (module.training or getattr(module, "apply_during_inference", False)))


def child(path: str, parent: nn.Module, name: str, kind: type[Kind]) -> Kind:
    """A module's child of exactly a kind."""
    module = getattr(parent, name, None)
    if type(module) is not kind:
        raise Refusal(f"{path}.{name}: expected a {kind.__name__}, got {type(module).__name__}")
    return module


def linear(path: str, parent: nn.Module, name: str, rows: int | None, columns: int) -> nn.Linear:
    """A child that is a linear layer, from ``columns`` to ``rows``, or to any number."""
    module = child(path, parent, name, nn.Linear)
    rows = module.out_features if rows is None else rows
    if (module.out_features, module.in_features) != (rows, columns):
        raise Refusal(f"{path}.{name}: expected a Linear from {columns} to {rows}, got {module}")
    return module


def norm(path: str, parent: nn.Module, name: str, dim: int) -> nn.LayerNorm | None:
    """A child that is torch's LayerNorm, or None."""
    return None if getattr(parent, name, None) is None else required_norm(path, parent, name, dim)


def required_norm(path: str, parent: nn.Module, name: str, dim: int) -> nn.LayerNorm:
    """A child that is torch's LayerNorm with a weight and a bias."""
    module = child(path, parent, name, nn.LayerNorm)
    if module.normalized_shape != (dim,) or module.weight is None or module.bias is None:
        raise Refusal(f"{path}.{name}: expected a LayerNorm of {dim} with a weight and a bias, got {module}")
    return module


def dropout(path: str, parent: nn.Module, name: str) -> nn.Module:
    """A child that draws dropout by its probability ``p``, or does nothing."""
    module: Any = getattr(parent, name, None)
    known = isinstance(module, nn.Module) and (hasattr(module, "p") or type(module) is nn.Identity)
    if not known or [*module.parameters()]:
        raise Refusal(f"{path}.{name}: expected dropout with a probability p, got {type(module).__name__}")
    return module


def direct(path: str, parent: nn.Module, name: str, size: int) -> None:
    """Refuse a direct parameter that is neither None nor of a size."""
    value: Any = getattr(parent, name, None)
    if not (value is None or (isinstance(value, nn.Parameter) and tuple(value.shape) == (size,))):
        raise Refusal(f"{path}.{name}: expected a parameter [{size}] or None, got {type(value).__name__}")
