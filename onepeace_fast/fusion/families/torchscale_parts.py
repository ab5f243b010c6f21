"""What torchscale's encoder consists of, and which of its look-alikes are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from onepeace_fast.fusion.family import Refusal
from onepeace_fast.layers.plain import is_plain, is_watched

ACTIVATIONS = {F.gelu: "gelu", F.relu: "relu", F.silu: "silu"}
COPIES = ("A", "B")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
# What decides the computation beside parameters: of every module, and of the configuration.
SETTINGS = (
    "normalize_before", "alpha", "drop_path", "scaling", "num_heads", "xpos", "inner_attn_ln", "activation_fn",
    "ffn_layernorm", "eps", "dim", "is_moe_layer", "layer_norm", "relative_position", "bidirectional", "num_buckets",
    "max_distance",
)  # fmt: skip
UNKNOWN_TO_THE_OPS = ("flash_attention", "xpos_rel_pos", "segment_length", "dilated_ratio")


def is_multiway(module: nn.Module) -> bool:
    """Whether a module is a Multiway network, a pair of copies."""
    return "split_position" in module.__dict__


def copies(module: Any, *names: str) -> list[Any]:
    """The modules of the modalities: the named copies of a Multiway network, else the module itself for each."""
    return [getattr(module, name) if is_multiway(module) else module for name in names]


def settings(root: Any, read: Iterable[nn.Module]) -> list[tuple[Any, str, Any]]:
    """Owner, name and value of what decides the computation."""
    modules = [root, *read, *([] if root.relative_position is None else [root.relative_position])]
    found = [
        (module, name, module.__dict__[name]) for module in modules for name in SETTINGS if name in module.__dict__
    ]
    configurations = {id(args): args for module in modules if (args := module.__dict__.get("args")) is not None}
    return found + [
        (args, name, getattr(args, name))
        for args in configurations.values() for name in UNKNOWN_TO_THE_OPS if hasattr(args, name)
    ]  # fmt: skip


def check_encoder(root: Any) -> None:
    """Refuse an encoder whose own parts are not those of the public one."""
    if (bias := root.relative_position) is not None:
        _require_parts("relative_position", bias, ["relative_attention_bias"])
        _require_plain("relative_position.relative_attention_bias", bias.relative_attention_bias, nn.Embedding)
        heads, columns = root.layers[0].self_attn.num_heads, bias.relative_attention_bias.embedding_dim
        if heads != columns:
            raise Refusal(f"relative_position: expected a column for each of {heads} heads, got {columns}")
    if root.layer_norm is not None:
        _check_norm("layer_norm", root.layer_norm, root.layers[0].self_attn.embed_dim)


def check_layer(path: str, layer: Any) -> None:
    """Refuse a layer that is not EncoderLayer with attention and one feed-forward network."""
    if getattr(layer, "is_moe_layer", False):
        raise Refusal(f"{path}: expected one feed-forward network, got a mixture of experts (moe_freq)")
    if "forward" in layer.__dict__:
        raise Refusal(
            f"{path}: expected the class's forward, got one of its own, such as that of fairscale's "
            "checkpoint_wrapper; build it with checkpoint_activations=False and wrap the layers after fuse"
        )
    parts = ["self_attn", "self_attn_layer_norm", "dropout_module", "ffn", "final_layer_norm"]
    _require_parts(path, layer, parts, optional=["drop_path"])
    width = layer.self_attn.embed_dim
    _check_attention(f"{path}.self_attn", layer.self_attn)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        _check_norm(f"{path}.{name}", getattr(layer, name), width)
    _require_plain(f"{path}.dropout_module", layer.dropout_module, nn.Dropout)
    if layer.drop_path is not None:
        _require_parts(f"{path}.drop_path", layer.drop_path, [])
        if not hasattr(layer.drop_path, "drop_prob"):
            raise Refusal(f"{path}.drop_path: expected one with drop_prob, got {type(layer.drop_path).__name__}")
    for name, expert in _each_copy(f"{path}.ffn", layer.ffn):
        _check_expert(name, expert, width)


def _check_attention(path: str, attention: Any) -> None:
    _require_parts(path, attention, [*PROJECTIONS, "dropout_module"], optional=["inner_attn_ln", "xpos"])
    for name in UNKNOWN_TO_THE_OPS:
        if value := getattr(attention.args, name, None):
            raise Refusal(f"{path}.args.{name}: expected it to be off, got {value!r}")
    if attention.xpos is not None:
        raise Refusal(f"{path}.xpos: expected none, got {type(attention.xpos).__name__}")
    width = attention.embed_dim
    if attention.num_heads < 1 or width % attention.num_heads:
        raise Refusal(f"{path}: expected heads that divide the width {width}, got {attention.num_heads}")
    for projection in PROJECTIONS:
        for name, linear in _each_copy(f"{path}.{projection}", getattr(attention, projection)):
            _check_linear(name, linear, width, width)
    if attention.inner_attn_ln is not None:
        _check_norm(f"{path}.inner_attn_ln", attention.inner_attn_ln, width)
    _require_plain(f"{path}.dropout_module", attention.dropout_module, nn.Dropout)


def _check_expert(path: str, expert: Any, width: int) -> None:
    parts = ["fc1", "fc2", "activation_dropout_module", "dropout_module"]
    _require_parts(path, expert, parts, optional=["ffn_layernorm"])
    if expert.activation_fn not in ACTIVATIONS:
        names = ", ".join(f"F.{name}" for name in ACTIVATIONS.values())
        raise Refusal(f"{path}.activation_fn: expected one of {names}, got {expert.activation_fn!r}")
    _require_plain(f"{path}.fc1", expert.fc1, nn.Linear)
    hidden = expert.fc1.out_features
    _check_linear(f"{path}.fc1", expert.fc1, hidden, width)
    _check_linear(f"{path}.fc2", expert.fc2, width, hidden)
    for name in ("activation_dropout_module", "dropout_module"):
        _require_plain(f"{path}.{name}", getattr(expert, name), nn.Dropout)
    if expert.ffn_layernorm is not None:
        _check_layer_norm(f"{path}.ffn_layernorm", expert.ffn_layernorm, hidden)


def _check_linear(path: str, linear: Any, rows: int, columns: int) -> None:
    _require_plain(path, linear, nn.Linear)
    if linear.weight.shape != (rows, columns):
        raise Refusal(f"{path}.weight: expected {[rows, columns]}, got {list(linear.weight.shape)}")


def _check_norm(path: str, norm: Any, width: int) -> None:
    for name, copy in _each_copy(path, norm):
        _check_layer_norm(name, copy, width)


def _check_layer_norm(path: str, norm: Any, width: int) -> None:
    _require_plain(path, norm, nn.LayerNorm)
    if norm.weight is None or norm.bias is None or norm.weight.shape != (width,):
        raise Refusal(f"{path}: expected a weight and a bias [{width}], got {norm}")


def _each_copy(path: str, module: Any) -> Iterator[tuple[str, Any]]:
    """The copies of a Multiway network over dimension 1, which must be alike, or the module itself."""
    if not is_multiway(module):
        yield path, module
        return
    _require_parts(path, module, COPIES)
    if module.dim != 1:
        raise Refusal(f"{path}.dim: expected 1, that of tokens, got {module.dim}")
    forms = [_form(copy) for copy in copies(module, *COPIES)]
    for (name, *form), (other_name, *other) in zip(*forms, strict=False):
        if (name, form) != (other_name, other):
            raise Refusal(f"{path}: expected copies A and B that are alike, got others in {name or 'the copies'}")
    for name in COPIES:
        yield f"{path}.{name}", getattr(module, name)


def _form(copy: nn.Module) -> list[tuple[str, type, dict[str, Any], list[Any]]]:
    """Of every module of a copy its name, class, the shapes of its parameters and its settings."""
    return [
        (
            name,
            type(module),
            {key: None if value is None else value.shape for key, value in module._parameters.items()},
            [module.__dict__[key] for key in SETTINGS if key in module.__dict__],
        )
        for name, module in copy.named_modules()
    ]


def _require_parts(path: str, module: Any, names: Collection[str], optional: Sequence[str] = ()) -> None:
    """Refuse a module with hooks, parameters of its own, or parts that the public class does not have."""
    if is_watched(module):
        raise Refusal(f"{path}: expected no hooks and the class's forward, got some or one of its own")
    if own := next((name for name, value in module._parameters.items() if value is not None), ""):
        raise Refusal(f"{path}: expected no parameters of its own, got {own}")
    found = {name for name, part in module._modules.items() if part is not None}
    if missing := [name for name in names if name not in found]:
        raise Refusal(f"{path}: expected a module {missing[0]}, got a {type(module).__name__} without it")
    if unknown := sorted(found.difference(names, optional)):
        raise Refusal(f"{path}.{unknown[0]}: expected no such module, got a {type(module).__name__} with it")


def _require_plain(path: str, module: Any, kind: type[nn.Module]) -> None:
    if not is_plain(module, kind):
        got = type(module).__name__
        got = f"one with hooks, a forward or weights of its own ({got})" if type(module) is kind else got
        raise Refusal(f"{path}: expected a {kind.__name__} of torch, got {got}")
