"""Small recordings that the tool's own reference makes, in the form of public ones."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from tools.parity.mixture_of_transformers import Network
from tools.parity.recording import Recording
from tools.parity.torchscale import FIXED, Padded, cases_of

DIM, HEADS, HIDDEN, LAYERS, LENGTH, SPLIT, PADDING = 16, 2, 24, 2, 14, 6, 3
EXPERTS = 3


def multiway(buckets: int = 8) -> Recording:
    """torchscale's encoder: every case, a state, and the gradients of one case."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {}
    for name, shape in shapes(buckets).items():
        own = draw(*shape) * (1.5 / shape[1] ** 0.5 if len(shape) > 1 else 0.2)
        tensors[f"param.{name}"] = own + 1 if len(shape) == 1 and name.endswith("weight") else own
    mask = torch.zeros(2, LENGTH, dtype=torch.int64)
    mask[1, -PADDING:] = 1
    order = (torch.arange(LENGTH) - SPLIT + 1).clamp(min=0)
    tensors |= {
        "input.token_embeddings": draw(2, LENGTH, DIM), "input.encoder_padding_mask": mask,
        "input.loss_weight": draw(2, LENGTH, DIM) * (mask == 0)[..., None],
        "input.caption_attn_mask": (order > order[:, None]).long(), "input.eps_probe": 3e-3 * draw(1, 9, DIM),
    }  # fmt: skip
    sizes = {"embed_dim": DIM, "attention_heads": HEADS, "ffn_embed_dim": HIDDEN, "layers": LAYERS}
    config = {**FIXED, **{f"encoder_{name}": value for name, value in sizes.items()}}
    config |= {"rel_pos_buckets": buckets, "max_rel_pos": 10}
    metadata = {
        "upstream": "microsoft/torchscale", "multiway_split_position": str(SPLIT),
        "effective_config": json.dumps(config),
    }  # fmt: skip
    recording = Recording(tensors, metadata)
    encoder, x = Padded(recording.pick("param."), config), tensors["input.token_embeddings"].clone().requires_grad_()
    for name, case in cases_of(recording).items():
        states = encoder(tensors["input.eps_probe"] if name == "eps_probe" else x, case)
        tensors[f"out.{name}.encoder_out"] = states[-1].detach()
        if name == "split":
            tensors["mid.split.state.1"] = states[0].detach()
            (states[-1] * tensors["input.loss_weight"]).sum().backward()
    tensors["dinput.split.token_embeddings"] = x.grad
    return Recording(tensors | {f"grad.split.{name}": encoder.gradient(name) for name in encoder.parameters}, metadata)


def shapes(buckets: int) -> dict[str, tuple[int, ...]]:
    """Of each parameter under upstream's name."""
    linears, norms = {}, {"layer_norm.{}": DIM}
    for i in range(LAYERS):
        linears |= {f"layers.{i}.self_attn.{part}_proj.{{}}": (DIM, DIM) for part in ("k", "v", "q", "out")}
        linears |= {f"layers.{i}.ffn.{{}}.fc1": (HIDDEN, DIM), f"layers.{i}.ffn.{{}}.fc2": (DIM, HIDDEN)}
        norms |= {f"layers.{i}.{name}.{{}}": DIM for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm")}
        norms |= {f"layers.{i}.final_layer_norm.{{}}": DIM, f"layers.{i}.ffn.{{}}.ffn_layernorm": HIDDEN}
    found: dict[str, tuple[int, ...]] = {}
    for copy in "AB":
        found |= {f"{name.format(copy)}.weight": shape for name, shape in linears.items()}
        found |= {f"{name.format(copy)}.bias": shape[:1] for name, shape in linears.items()}
        found |= {f"{name.format(copy)}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    return found | ({"relative_position.relative_attention_bias.weight": (buckets, HEADS)} if buckets else {})


def mixture() -> Recording:
    """Mixture-of-Transformers' network, with overlapping masks and with an expert that has no token."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for m in range(EXPERTS):
        for name, shape in (("w1", (HIDDEN, DIM)), ("w2", (DIM, HIDDEN)), ("w3", (HIDDEN, DIM))):
            tensors[f"param.local_experts.{m}.{name}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"param.local_experts_ffn_norm.{m}.weight"] = 1 + 0.2 * torch.randn(DIM, generator=generator)
    for name in ("x", "loss_weight"):
        tensors[f"input.{name}"] = torch.randn(2, LENGTH, DIM, generator=generator)
    chosen = torch.randint(0, EXPERTS, (2, LENGTH), generator=generator)
    overlap = torch.randint(0, 2, (EXPERTS, 2, LENGTH), generator=generator)
    overlap[0] |= ~overlap.any(0)
    masks = {"partition": torch.stack([chosen == m for m in range(EXPERTS)]), "overlap": overlap}
    masks["empty1"] = torch.stack([chosen != 2, torch.zeros_like(chosen, dtype=torch.bool), chosen == 2])
    tensors |= {f"input.{case}.masks": mask.long() for case, mask in masks.items()}
    metadata = {
        "upstream": "facebookresearch/Mixture-of-Transformers",
        "config": json.dumps({"n_modalities": EXPERTS, "norm_eps": 1e-5}),
    }
    recording = Recording(tensors, metadata)
    for case, mask in masks.items():
        network, x = Network(recording), tensors["input.x"].clone().requires_grad_()
        out = network.padded(x, mask.bool())
        (out * tensors["input.loss_weight"]).sum().backward()
        tensors |= {f"out.{case}": out.detach(), f"dinput.{case}.x": x.grad}
        tensors |= {f"grad.{case}.{name}": value.grad for name, value in network.named_parameters()}
    return recording
