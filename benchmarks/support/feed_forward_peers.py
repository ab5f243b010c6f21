"""The routed FFN by others' packages, which all need a CUDA device; each is imported where it is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support.variants import LeftOut, Variant, trained

if TYPE_CHECKING:
    from benchmarks.support.feed_forward import FeedForwardCase


def transformer_engine(case: FeedForwardCase) -> Variant:
    """Transformer Engine's grouped linear layers, one for each of the three projections."""
    module = _imported("transformer_engine.pytorch", case)
    first = case.experts[0]
    experts, counts, norms = len(case.experts), case.counts, [expert[2] for expert in case.experts]

    def grouped(weights: list[Tensor], biases: list[Tensor]) -> torch.nn.Module:
        outer, inner = weights[0].shape
        layer = module.GroupedLinear(
            experts, inner, outer, bias=bool(biases), params_dtype=case.case.dtype, device=case.case.device
        )
        with torch.no_grad():
            for m in range(experts):
                getattr(layer, f"weight{m}").copy_(weights[m])
                if biases:
                    getattr(layer, f"bias{m}").copy_(biases[m])
        return layer

    gate = grouped([expert[0].wi_0.weight for expert in case.experts], [])
    value = grouped([expert[0].wi_1.weight for expert in case.experts], [])
    out = grouped([expert[3].weight for expert in case.experts], [expert[3].bias for expert in case.experts])
    assert first[3].bias is not None

    def run(z: Tensor) -> Tensor:
        h = F.gelu(gate(z, counts)) * value(z, counts)
        n = torch.cat([norm(rows) for norm, rows in zip(norms, h.split(counts), strict=True)])
        return out(n, counts)

    parameters = [parameter for m in range(experts) for parameter in (
        getattr(gate, f"weight{m}"), getattr(value, f"weight{m}"), norms[m].weight, norms[m].bias,
        getattr(out, f"weight{m}"), getattr(out, f"bias{m}"),
    )]  # fmt: skip
    return _over_packed_rows(case, run, parameters)


def sonic_moe(case: FeedForwardCase) -> Variant:
    """sonic-moe's experts with a fixed route; they have no Sub-LayerNorm, and what checks them has none either."""
    module = _imported("sonicmoe", case)
    activation = importlib.import_module("sonicmoe.enums").ActivationType.GEGLU
    count = case.case.shape.real_tokens
    tokens = torch.arange(count, dtype=torch.int32, device=case.case.device)
    expert_of = case.plan.modality.to(torch.int32)
    scores = torch.ones(count, device=case.case.device)
    pairs = [torch.cat([expert[0].wi_0.weight, expert[0].wi_1.weight]).detach() for expert in case.experts]
    w1 = torch.stack(pairs).requires_grad_()
    w2 = torch.stack([expert[3].weight.detach() for expert in case.experts]).requires_grad_()

    def run(z: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        out, _ = module.moe_general_routing_inputs(
            z, scores, tokens, expert_of, w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, len(case.experts),
            stream, activation, concat_layout=True,
        )  # fmt: skip
        return out

    variant = _over_packed_rows(case, run, [w1, w2])
    variant.against, variant.parameter_gradients = "sliced_no_norm", None
    variant.note = "without the Sub-LayerNorm and the output's bias, which it has not"
    return variant


def sliced_no_norm(case: FeedForwardCase) -> Variant:
    """What sonic-moe is checked against: slices without Sub-LayerNorm and the output's bias."""
    if case.case.device.type != "cuda":
        raise LeftOut("nothing is held against it without a CUDA device")
    experts, counts = case.experts, case.counts

    def run(z: Tensor) -> Tensor:
        parts = zip(experts, z.split(counts), strict=True)
        return torch.cat([F.linear(expert[0](rows), expert[3].weight) for expert, rows in parts])

    weights = [w for expert in experts for w in (expert[0].wi_0.weight, expert[0].wi_1.weight, expert[3].weight)]
    variant = _over_packed_rows(case, run, weights)
    variant.against = "sliced_no_norm"
    return variant


def vllm_omni(case: FeedForwardCase) -> Variant:
    """vllm-omni's routed linear, of two modalities and for inference alone, for each of the three projections."""
    gemm = _imported("vllm_omni.diffusion.layers.mot.ops.mot_gemm", case).invoke_mot_gemm
    if len(case.experts) != 2:
        raise LeftOut("vllm-omni routes two modalities")
    modality, counts = case.plan.modality, case.counts
    indices = [(modality == m).nonzero()[:, 0].to(torch.int32) for m in range(2)]

    def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        first, second = (weight.t() for weight in weights)
        gemm(
            x, first, second, out, *biases, *indices, None, None, None, use_fp8_w8a8=False, use_int8_w8a8=False,
            use_int8_w8a16=False, use_int4_w4a16=False, A_per_channel_quant=False, B_per_channel_quant=False,
        )  # fmt: skip
        return out

    @torch.no_grad()
    def run(z: Tensor) -> Tensor:
        u, v = (
            linear(z, [getattr(e[0], name).weight for e in case.experts], [None, None]) for name in ("wi_0", "wi_1")
        )
        h = (F.gelu(u) * v).split(counts)
        n = torch.cat([expert[2](rows) for expert, rows in zip(case.experts, h, strict=True)])
        return linear(n, [expert[3].weight for expert in case.experts], [expert[3].bias for expert in case.experts])

    variant = _over_packed_rows(case, run, [])
    variant.forward_backward, variant.note = None, "forward alone, which keeps nothing: it has no backward pass"
    return variant


def _imported(name: str, case: FeedForwardCase) -> object:
    module = importlib.import_module(name)
    if case.case.device.type != "cuda":
        raise LeftOut(f"{name.partition('.')[0]} needs a CUDA device")
    return module


def _over_packed_rows(case: FeedForwardCase, run: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Variant:
    variant = trained(run, [(x.clone().requires_grad_(),) for x in case.case.packed], case.case.gradients, parameters)
    variant.rows = variant.gradient_rows = lambda rows: rows
    return variant


PEERS: dict[str, Callable[[FeedForwardCase], Variant]] = {
    "vllm_omni": vllm_omni,
    "transformer_engine": transformer_engine,
    "sliced_no_norm": sliced_no_norm,
    "sonic_moe": sonic_moe,
}
