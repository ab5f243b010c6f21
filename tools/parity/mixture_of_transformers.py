"""Mixture-of-Transformers' feed-forward network (arXiv 2411.04996): a SwiGLU and an RMSNorm for each modality.

out = RMSNorm_m(W2_m (silu(W1_m x) * W3_m x)),  m the modality of the token; of overlapping masks the last wins
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast import RoutedFFN, RoutePlan
from tools.parity.recording import Recording, RecordingError
from tools.parity.report import OUTPUT_TOLERANCE, Report


class Expert(nn.Module):
    """A network under upstream's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)


class Network(nn.Module):
    """The recorded parameters under upstream's names."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        config = recording.json("config")
        hidden, dim = recording["param.local_experts.0.w1.weight"].shape
        self.local_experts = nn.ModuleList(Expert(dim, hidden) for _ in range(config["n_modalities"]))
        self.local_experts_ffn_norm = nn.ModuleList(
            nn.RMSNorm(dim, config["norm_eps"]) for _ in range(config["n_modalities"])
        )
        self.to(recording["input.x"].device).load_state_dict(recording.pick("param."))

    def padded(self, x: Tensor, masks: Tensor) -> Tensor:
        """Every token through every expert, and of those the one that its masks choose."""
        out = torch.zeros_like(x)
        for expert, norm, mask in zip(self.local_experts, self.local_experts_ffn_norm, masks, strict=True):
            y = F.linear(F.silu(expert.w1(x)) * expert.w3(x), expert.w2.weight)
            y = y * (y.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
            out = torch.where(mask[..., None], y, out)
        return out

    def routed(self, x: Tensor, masks: Tensor) -> Tensor:
        """Each token through its expert, by ``RoutedFFN``."""
        module = RoutedFFN.from_experts(
            [*self.local_experts], w0="w1", w1="w3", w2="w2", activation="silu",
            output_norm=[*self.local_experts_ffn_norm],
        )  # fmt: skip
        return module(x, RoutePlan.from_token_masks({str(m): mask for m, mask in enumerate(masks)}, last_wins=True))


def compare(recording: Recording, backend: str) -> Report:
    """Outputs, losses and every gradient of each case, and the output that shows the norm's epsilon."""
    report, network = Report(), Network(recording)
    run = network.padded if backend == "reference" else network.routed
    cases = [*recording.pick("out.")]
    if not {*cases} - {"eps_probe"}:
        raise RecordingError("expected the tensors out.CASE, got a recording without one")
    for case in cases:
        if case == "eps_probe":
            masks = recording["input.partition.masks"].bool()
            got = run(recording["input.eps_probe.x"], masks)
            report.check("eps_probe", got, recording["out.eps_probe"], OUTPUT_TOLERANCE)
        else:
            check_case(report, recording, network, run, case)
    return report


def check_case(
    report: Report, recording: Recording, network: Network, run: Callable[[Tensor, Tensor], Tensor], case: str
) -> None:
    """One case, ``_flat`` with all tokens in one row."""
    x, weight = recording["input.x"], recording["input.loss_weight"]
    masks = recording[f"input.{case.removesuffix('_flat')}.masks"].bool()
    if case.endswith("_flat"):
        x, weight, masks = x.flatten(0, 1), weight.flatten(0, 1), masks.flatten(1)
    x = x.clone().requires_grad_()
    network.zero_grad(set_to_none=True)
    out = run(x, masks)
    report.check(f"{case} output", out, recording[f"out.{case}"], OUTPUT_TOLERANCE)
    loss = (out * weight).sum()
    if f"loss.{case}" in recording.tensors:
        report.check(f"{case} loss", loss, recording[f"loss.{case}"], OUTPUT_TOLERANCE)
    loss.backward()
    report.check_gradient(recording, f"dinput.{case}.x", x.grad)
    if not case.endswith("_flat"):  # whose parameters' gradients are the same, and not recorded again
        for name, parameter in network.named_parameters():
            report.check_gradient(recording, f"grad.{case}.{name}", parameter.grad)
