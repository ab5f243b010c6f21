"""torchscale's Multiway encoder, with the relative bias of T5's form or without one.

The reference computes padded rows by the formulas below, under upstream's parameter names; fused is the encoder of
examples/torchscale_multiway.py, over packed rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.torchscale_multiway import MultiwayEncoder, own_name
from onepeace_fast import RelativeBias
from tools.parity.recording import Recording, RecordingError
from tools.parity.report import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Report

TABLE = "relative_attention_bias.weight"
FIXED = {
    "multiway": True, "subln": True, "encoder_normalize_before": True, "normalize_output": True, "deepnorm": False,
    "layernorm_embedding": False, "no_scale_embedding": True, "xpos_rel_pos": False, "activation_fn": "gelu",
    "layernorm_eps": 1e-5, "moe_freq": 0,
}  # fmt: skip
EPS_PROBE_SPLIT = 5


class Case(NamedTuple):
    """How the recorded tokens are run; ``split`` is how many of each sample are of modality A."""

    split: int
    padding: Tensor | None = None
    captions: bool = False


class Padded:
    """Padded rows: x += Wo LN(attention(LN x)), x += W2 LN(gelu(W1 LN x)), and a last LN, each by a token's copy."""

    def __init__(self, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.parameters = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        self.config = config

    def both(self, function: Callable[..., Tensor], name: str, x: Tensor, split: int) -> Tensor:
        """The first ``split`` tokens by copy A, the others by copy B; {} in the name is the copy."""
        parts = zip("AB", (x[:, :split], x[:, split:]), strict=True)
        return torch.cat([function(name.format(copy), part) for copy, part in parts], dim=1)

    def parameter(self, name: str) -> Tensor:
        if name not in self.parameters:
            raise RecordingError(f"expected the tensor param.{name}, got a recording without it")
        return self.parameters[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, self.config["layernorm_eps"])

    def ffn(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", self.norm(f"{name}.ffn_layernorm", F.gelu(self.linear(f"{name}.fc1", x))))

    def bias(self, length: int) -> Tensor | float:
        """[heads, queries, keys]."""
        if not self.config["rel_pos_buckets"]:
            return 0.0
        return dense_bias(self.parameter(f"relative_position.{TABLE}"), length, self.config["max_rel_pos"])

    def attention(self, name: str, x: Tensor, case: Case) -> Tensor:
        """softmax(q k / sqrt(head_dim) + bias) v over what a token sees, with a norm before the output projection."""
        heads, length, split = self.config["encoder_attention_heads"], x.shape[1], case.split
        q, k, v = (
            self.both(self.linear, f"{name}.{part}_proj.{{}}", x, split).unflatten(2, (heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.bias(length)
        if case.captions:
            order = (torch.arange(length, device=x.device) - split + 1).clamp(min=0)
            score = score.masked_fill(order > order[:, None], -torch.inf)
        if case.padding is not None:
            score = score.masked_fill(case.padding[:, None, None], -torch.inf)
        attended = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        attended = self.both(self.norm, f"{name}.inner_attn_ln.{{}}", attended, split)
        return self.both(self.linear, f"{name}.out_proj.{{}}", attended, split)

    def __call__(self, x: Tensor, case: Case) -> list[Tensor]:
        """The tokens after each layer and after the last norm."""
        x = x if case.padding is None else x.masked_fill(case.padding[..., None], 0)
        states = []
        for i in range(self.config["encoder_layers"]):
            normed = self.both(self.norm, f"layers.{i}.self_attn_layer_norm.{{}}", x, case.split)
            x = x + self.attention(f"layers.{i}.self_attn", normed, case)
            normed = self.both(self.norm, f"layers.{i}.final_layer_norm.{{}}", x, case.split)
            x = x + self.both(self.ffn, f"layers.{i}.ffn.{{}}", normed, case.split)
            states.append(x)
        return [*states, self.both(self.norm, "layer_norm.{}", x, case.split)]

    def gradient(self, name: str) -> Tensor | None:
        """Of a parameter under upstream's name."""
        return self.parameters[name].grad


class Packed:
    """The example's encoder."""

    def __init__(self, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        dim, heads, hidden = (config[f"encoder_{what}"] for what in ("embed_dim", "attention_heads", "ffn_embed_dim"))
        self.encoder = MultiwayEncoder(
            dim, heads, hidden, config["encoder_layers"], config["rel_pos_buckets"], config["max_rel_pos"]
        )
        self.encoder.to(next(iter(parameters.values())).device).load_torchscale(parameters)

    def __call__(self, x: Tensor, case: Case) -> list[Tensor]:
        return self.encoder(x, *case)

    def gradient(self, name: str) -> Tensor | None:
        """Of a parameter under upstream's name."""
        return self.encoder.get_parameter(own_name(name)).grad


def bucket(distance: Tensor, buckets: int, reach: int) -> Tensor:
    """The bucket of query - key: half of them for keys behind the query; exact when near, then logarithmic."""
    base, far = buckets // 2, distance.abs().double()
    exact = base // 2
    wide = exact + (far.clamp(min=exact) / exact).log() / math.log(reach / exact) * (base - exact)
    near = torch.where(far < exact, far, wide.trunc().clamp(max=base - 1)).long()
    return near + torch.where(distance < 0, base, 0)


def dense_bias(table: Tensor, length: int, reach: int) -> Tensor:
    """The table's bias of all pairs: [heads, queries, keys]."""
    place = torch.arange(length, device=table.device)
    return table[bucket(place[:, None] - place, table.shape[0], reach)].permute(2, 0, 1)


def compare(recording: Recording, backend: str) -> Report:
    """The bias of all pairs, outputs of every case, states between layers, and every gradient."""
    report, config = Report(), config_of(recording)
    check_bias(report, recording, config, backend)
    if [*recording.pick("param.")] == [TABLE]:
        return report
    encoder = (Padded if backend == "reference" else Packed)(recording.pick("param."), config)
    x, cases = recording["input.token_embeddings"], cases_of(recording)
    for case in recording.pick("out."):
        name, _, what = case.rpartition(".")
        if what != "encoder_out" or name not in cases:
            raise RecordingError(f"expected of out. encoder_out of {', '.join(cases)}, got {case}")
        if name != "split":
            given = recording["input.eps_probe"] if name == "eps_probe" else x
            with torch.no_grad():
                check_states(report, recording, name, cases[name], encoder(given, cases[name]))
    x = x.clone().requires_grad_()
    states = encoder(x, cases["split"])
    check_states(report, recording, "split", cases["split"], states)
    loss = (states[-1] * recording["input.loss_weight"]).sum()
    if "loss.split" in recording.tensors:
        report.check("split loss", loss, recording["loss.split"], OUTPUT_TOLERANCE)
    loss.backward()
    report.check_gradient(recording, "dinput.split.token_embeddings", x.grad)
    for name in recording.pick("param."):
        report.check_gradient(recording, f"grad.split.{name}", encoder.gradient(name))
    check_sums(report, encoder, config)
    return report


def config_of(recording: Recording) -> dict[str, Any]:
    """Upstream's configuration, where it is of the form that is built here."""
    config = recording.json("effective_config")
    for key, value in FIXED.items():
        if config.get(key) != value:
            raise RecordingError(f"expected {key} {value!r} in effective_config, got {config.get(key)!r}")
    return config


def cases_of(recording: Recording) -> dict[str, Case]:
    """The cases that may have been recorded."""
    padding, split = recording["input.encoder_padding_mask"].bool(), int(recording.text("multiway_split_position"))
    mask = recording.tensors.get("input.caption_attn_mask")
    if mask is not None:
        order = (torch.arange(mask.shape[0], device=mask.device) - split + 1).clamp(min=0)
        if not torch.equal(mask.bool(), order > order[:, None]):
            raise RecordingError(
                "expected input.caption_attn_mask to let text see images and earlier text, got another"
            )
    return {
        "split": Case(split, padding), "allA": Case(padding.shape[1]), "allB": Case(0, padding),
        "caption": Case(split, padding, captions=True), "eps_probe": Case(EPS_PROBE_SPLIT),
    }  # fmt: skip


def check_states(report: Report, recording: Recording, name: str, case: Case, states: list[Tensor]) -> None:
    """What is recorded of one case: its output, and states by the number of layers before them."""
    rows = slice(None) if case.padding is None else ~case.padding
    report.check(f"{name} output", states[-1], recording[f"out.{name}.encoder_out"], OUTPUT_TOLERANCE, rows)
    for place, want in recording.pick(f"mid.{name}.state.").items():
        report.check(f"{name} state {place}", states[int(place) - 1], want, OUTPUT_TOLERANCE, rows)


def check_bias(report: Report, recording: Recording, config: Mapping[str, Any], backend: str) -> None:
    """The bias of all pairs, and the bucket of each distance key - query."""
    tables = [value for name, value in recording.pick("param.").items() if name.endswith(TABLE)]
    if not tables:
        return
    reach, (table,) = config["max_rel_pos"], tables
    bias = RelativeBias.torchscale(*table.shape[:1], reach, table.shape[1]).to(table.device)
    with torch.no_grad():
        bias.table.copy_(table)
        if "mid.rel_pos_bias" in recording.tensors:
            want = recording["mid.rel_pos_bias"]
            length = want.shape[1]
            got = dense_bias(table, length, reach) if backend == "reference" else bias.dense(length)
            report.check_bits("bias of all pairs", got, want)
        bias.table.copy_(torch.arange(table.shape[0], device=table.device)[:, None])
    if "buffer.rel_pos_bucket" in recording.tensors:
        distance = -recording["buffer.rel_pos_range"]
        length = int(distance.abs().max()) + 1
        entries = bias.vector(length)[0, distance + bias.code_offset(length)].long()
        got = bucket(distance, table.shape[0], reach) if backend == "reference" else entries
        report.check_bits("buckets", got, recording["buffer.rel_pos_bucket"])


def check_sums(report: Report, encoder: Padded | Packed, config: Mapping[str, Any]) -> None:
    """A bias of all keys changes no softmax: the gradients of its two copies sum to zero."""
    for i in range(config["encoder_layers"]):
        names = [f"layers.{i}.self_attn.k_proj.{copy}.bias" for copy in "AB"]
        one, other = (encoder.gradient(name) for name in names)
        if one is None or other is None:
            report.check(f"gradients of {names[0]} and its copy", None, torch.zeros(()), 0)
        else:
            report.check(f"sum of the gradients of {names[0]} and its copy", -one, other, GRADIENT_TOLERANCE)
